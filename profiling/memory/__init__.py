"""The comparison of the source document's memory estimates with what is predicted and measured."""

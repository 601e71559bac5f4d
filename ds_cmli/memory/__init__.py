"""Memory of a training step: the document's estimates, predicted without a GPU, measured."""

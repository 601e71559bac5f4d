"""The losses, and the module that DeepSpeed trains."""

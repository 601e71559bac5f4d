"""Whether any PyTorch program's training fits on a GPU; needs torch alone."""

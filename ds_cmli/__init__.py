"""Training of image-text models with all-pairs CMLI under DeepSpeed ZeRO."""

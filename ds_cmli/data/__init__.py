"""Image-text pairs, tokenised and batched in a resumable order."""

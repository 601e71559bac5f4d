"""Image-text pairs, tokenised and batched in a resumable order: the demo's scenes, or the kinds of `sources`."""

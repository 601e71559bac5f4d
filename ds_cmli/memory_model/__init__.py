"""A model of PyTorch's CUDA caching allocator, and the replay of recorded histories.

Needs neither a GPU nor, apart from `ds_cmli.errors`, any other part of this package.
"""

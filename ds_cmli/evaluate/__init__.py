"""Evaluation of a trained student, as papers report it.

These are retrieval, zero-shot classification and pointing-game accuracy.

`python -m ds_cmli.evaluate` is the command; the training loop calls `split.evaluate_split`.
"""

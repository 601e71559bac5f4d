"""Evaluation of a trained student, as papers report it: retrieval, zero-shot classification, pointing-game accuracy.

`python -m ds_cmli.evaluate` is the command; the training loop calls `split.evaluate_split`.
"""

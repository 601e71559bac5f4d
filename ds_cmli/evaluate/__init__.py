"""Evaluation of a trained student, as papers report it.

These are retrieval, zero-shot classification, pointing-game accuracy and choices between captions.
The functions of `metrics` take the scores of any model.
"""

"""Evaluation of a trained student: retrieval, zero-shot, pointing game, choices of captions."""

"""Ablations: a plan of runs, the runs themselves, their statistics and the report."""

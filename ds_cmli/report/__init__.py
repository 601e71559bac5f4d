"""Writes one HTML file about one or several runs: `python -m ds_cmli.report RUN [RUN ...]`."""

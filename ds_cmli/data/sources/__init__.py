"""The kinds of sources, which `config/registry.py` lists and `find.py` recognises."""

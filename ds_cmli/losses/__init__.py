"""Losses over pairs and losses of distillation; `config/registry.py` lists them."""

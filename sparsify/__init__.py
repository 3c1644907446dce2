"""Sparsify: prune language models without retraining, and take them to the runtimes that serve them."""

__version__ = "0.1.0"

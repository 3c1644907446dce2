"""Sparsify: prune language models without retraining, and take them to the runtimes that serve them.

With this package imported, ``transformers`` opens the compressed checkpoints that ``sparsify export`` writes.
"""

from sparsify.hooks import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()

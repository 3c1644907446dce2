"""``python -m sparsify``."""

from sparsify.cli import main

main()

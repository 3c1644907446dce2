"""Signs of life while a task runs: what it computes may tell of nothing for hours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sparsify.errors import SparsifyError

BEAT_S = 15.0
# After it a worker is given up. Long: an assignment of SciPy's holds the interpreter for minutes where inputs are many
# (``sparsify.permute``), and so may a machine that swaps.
SILENT_S = 1800.0


@contextmanager
def beating(beat: Callable[[], object]) -> Iterator[None]:
    """Call ``beat`` in a thread every ``BEAT_S`` seconds for the length of the context."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(BEAT_S):
            # Nobody listens, or the disk is full: whoever does the task meets that too, and can say so.
            with suppress(SparsifyError, OSError):
                beat()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

"""What long work reports of itself; the command line draws it, a library user may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a run and the steps within them."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins; the one before it is over."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` of the stage are done."""

    def notice(self, text: str) -> None:
        """Something the user should know that is not an error."""


class Silent:
    """Reports nothing."""

    def stage(self, name: str, total: int) -> None:
        """Ignore."""

    def advance(self, steps: int = 1) -> None:
        """Ignore."""

    def notice(self, text: str) -> None:
        """Ignore."""

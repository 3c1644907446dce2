"""Rounds of one scenario: who is asked when, and what each answered or failed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsify.bench.request import Request, Scenario
from sparsify.bench.subjects import Subject
from sparsify.bench.workers import WorkerProcess
from sparsify.errors import SparsifyError


@dataclass(frozen=True)
class Held:
    """A subject that a worker holds open.

    Attributes:
        subject: what it is.
        baseline: label of what it is compared with; None for the baseline itself, and where there is none.
        worker: its process.
        opened: what the worker said of the session.
        loaded_bytes: resident once it was open.
    """

    subject: Subject
    baseline: str | None
    worker: WorkerProcess
    opened: dict[str, Any]
    loaded_bytes: int


@dataclass
class Taken:
    """Of one subject: its rounds, and what ended them."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: SparsifyError | None = None


def steps(request: Request, held: Sequence[Held]) -> int:
    """How often somebody is asked in a scenario."""
    return request.warm_up * len(held) + request.rounds * len(_slots(held))


def _slots(held: Sequence[Held]) -> list[tuple[int, bool]]:
    """Place in ``held`` and whether it is asked again: the baseline has the first turn and the last."""
    again = [(i, True) for i, each in enumerate(held) if i == 0 and each.baseline is None]
    return [(i, False) for i in range(len(held))] + again


def take_rounds(
    held: Sequence[Held], scenario: Scenario, request: Request, asked: Callable[[], object] = lambda: None
) -> list[Taken]:
    """Ask everybody in turn; who fails once is not asked again.

    Args:
        held: the baseline first, where there is one.
        scenario: what to ask for.
        request: rounds, calls before them, seed.
        asked: called after each turn.

    Returns:
        For each of ``held`` its rounds: what ``time_stream`` gave, with ``round``, ``position`` and ``again``.
    """
    taken = [Taken() for _ in held]
    arguments = {
        "seed": request.seed, "prompt_tokens": scenario.prompt_tokens, "batch": scenario.batch,
        "n": scenario.new_tokens,
    }  # fmt: skip

    def ask(place: int) -> dict[str, Any] | None:
        found = None
        if taken[place].error is None:
            try:
                found = held[place].worker.ask("stream", **arguments)
            except SparsifyError as error:
                taken[place].error = error
        asked()
        return found

    for _ in range(request.warm_up):
        for place in range(len(held)):
            ask(place)
    slots = _slots(held)
    for number in range(request.rounds):
        # Every second round goes the other way, so that nobody is always in the same one's wake.
        for position, (place, again) in enumerate(slots if number % 2 == 0 else slots[::-1]):
            times = ask(place)
            if times is not None:
                taken[place].rounds.append({"round": number, "position": position, "again": again, **times})
    return taken

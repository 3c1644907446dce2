"""Rounds of one scenario: who is asked when, and what each answered or failed with.

The baseline is held twice, in two processes that take part like any other: what the two differ by is what the same
thing differs by. Orders are balanced, so that everybody comes after everybody else alike but for a round or two, and
nobody is asked twice in a row. Each is woken by an untimed token first: after others have had the caches and the cores,
the first touch costs what it does not in a process that serves.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sparsify.bench.request import Request, Scenario
from sparsify.bench.subjects import Subject
from sparsify.bench.workers import WorkerProcess
from sparsify.errors import SparsifyError

# Squares to choose from, and what it weighs that somebody comes after the same one again.
_SQUARES, _FOLLOWING = 30, 3


@dataclass
class Held:
    """A subject that a worker holds open.

    Attributes:
        subject: what it is.
        baseline: label of what it is compared with; None for the baseline itself, and where there is none.
        worker: its process.
        opened: what the worker said of the session.
        loaded_bytes: resident once it was open.
        twin: the baseline's second process.
        device_bytes: most that was seen on GPUs; None where no driver tells.
    """

    subject: Subject
    baseline: str | None
    worker: WorkerProcess
    opened: dict[str, Any]
    loaded_bytes: int
    twin: bool = False
    device_bytes: int | None = None


@dataclass
class Taken:
    """Of one process: its rounds, and what ended them."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: SparsifyError | None = None


def orders(n: int, rounds: int, seed: int) -> list[list[int]]:
    """For each round an order of ``n`` places, the same for the same seed; no place follows itself.

    In a Williams square each place follows each other one, and has each position, equally often. Of the rows of many
    such squares, which the seed draws anew for each round, the one is taken that is best balanced with the rounds
    before it, from the last place of one to the first of the next as well: so that few rounds are nearly balanced too.
    """
    if n < 2:
        return [list(range(n)) for _ in range(rounds)]
    draw, found = random.Random(seed), list[list[int]]()
    after, at = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    rows = _williams(n)

    def cost(line: list[int], order: list[int]) -> int:
        # What a sum of squares grows by: whom somebody follows matters more than how early it comes.
        return _FOLLOWING * sum(after[pair] for pair in pairwise(line)) + sum(at[place] for place in enumerate(order))

    for _ in range(rounds):
        before = found[-1][-1:] if found else []
        squares = [draw.sample(range(n), n) for _ in range(_SQUARES)]
        every = [[names[place] for place in row] for names in squares for row in rows]
        able = [(cost(before + row, row), row) for row in every if row[:1] != before]
        least = min(of for of, _ in able)
        order = draw.choice([row for of, row in able if of == least])
        after.update(pairwise(before + order))
        at.update(enumerate(order))
        found.append(order)
    return found


def _williams(n: int) -> list[list[int]]:
    """The rows 0, 1, n - 1, 2, n - 2, ... shifted by each number modulo n, and the same backwards."""
    row = [(i + 1) // 2 if i % 2 else -(i // 2) % n for i in range(n)]
    rows = [[(place + shift) % n for place in row] for shift in range(n)]
    return rows + [each[::-1] for each in rows]


def steps(request: Request, held: Sequence[Held]) -> int:
    """How often somebody is asked for a scenario."""
    return (request.warm_up + request.rounds) * len(held)


def take_rounds(
    held: Sequence[Held], scenario: Scenario, request: Request, asked: Callable[[], object] = lambda: None
) -> list[Taken]:
    """Ask everybody in turn; who fails once is not asked again.

    Args:
        held: everybody.
        scenario: what to ask for.
        request: rounds, calls before them, seed.
        asked: called after each turn.

    Returns:
        For each of ``held`` its rounds: what ``time_stream`` gave, with ``round``, ``position`` and ``again``, which is
        true for the twin.
    """
    taken = [Taken() for _ in held]
    prompt = {"seed": request.seed, "prompt_tokens": scenario.prompt_tokens, "batch": scenario.batch}

    def ask(place: int, *counts: int) -> dict[str, Any] | None:
        found = None
        if taken[place].error is None:
            try:
                for n in counts:
                    found = held[place].worker.ask("stream", **prompt, n=n)
            except SparsifyError as error:
                taken[place].error, found = error, None
        asked()
        return found

    for _ in range(request.warm_up):
        for place in range(len(held)):
            ask(place, scenario.new_tokens)
    for number, order in enumerate(orders(len(held), request.rounds, request.seed)):
        for position, place in enumerate(order):
            times = ask(place, 1, scenario.new_tokens)
            if times is not None:
                head = {"round": number, "position": position, "again": held[place].twin}
                taken[place].rounds.append({**head, **times})
    return taken

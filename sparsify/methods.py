"""The methods by name, for help texts and checks. Imports nothing heavy: the functions are in ``sparsify.scores``."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.types import Group


@dataclass(frozen=True)
class Method:
    """What there is to know of a method before it runs.

    Attributes:
        needs_data: whether calibration text has to be run.
        group: the comparison group its authors use for unstructured sparsity.
        summary: one line for ``--help``.
    """

    needs_data: bool
    group: Group
    summary: str


METHODS = {
    "magnitude": Method(False, "layer", "absolute value; needs no text"),
    "wanda": Method(True, "row", "absolute value times the norm of its input"),
    "ria": Method(True, "layer", "relative importance in row and column, times the input norm to the power 0.5"),
}

"""How the report's figures look: an SVG with text alternatives, the same bytes for the same numbers.

Colours are those of Okabe and Ito that stand out from white, and never the only way to tell things apart: markers,
dashes and hatches differ with them.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

# Okabe and Ito; black is the baseline's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "\\\\\\", "xxx", "...", "+++", "---")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_BASELINE = ("#000000", "o")
_LONGEST = 28
# Inches.
_LEGEND_ROW = 0.19

STYLE: dict[str, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "sparsify",
    # A label with a dollar sign is no formula.
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Look:
    """How one artifact, or linear, looks in every figure."""

    colour: str
    marker: str
    hatch: str
    dashes: Any


@dataclass(frozen=True)
class Figure:
    """A figure with what stands in for it.

    Attributes:
        key: unique on the page, letters and digits.
        title: what it shows.
        caption: how to read it.
        details: what there is to see in it, in words, for who does not.
        head, rows: the numbers that are drawn, as text.
        svg: the drawing, one ``<svg>`` element; its own text is drawn as shapes. ``draw`` makes it.
    """

    key: str
    title: str
    caption: str
    details: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    svg: str = ""


def looks(names: Sequence[str], baselines: Sequence[str] = ()) -> dict[str, Look]:
    """A look for each name; the same order gives the same looks."""
    found, i = {}, 0
    for name in dict.fromkeys(names):
        if name in baselines:
            found[name] = Look(*_BASELINE, "", "-")
            continue
        found[name] = Look(
            COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], HATCHES[(i + 1) % len(HATCHES)],
            DASHES[(i + 1) % len(DASHES)],
        )  # fmt: skip
        i += 1
    return found


def short(label: str) -> str:
    """A label that fits into a legend: its end is cut off where it is long."""
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…"


def legend(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below ``axes``, in room of its own; matplotlib would drop labels that begin with an underscore."""
    longest = max(len(short(label)) for label in labels)
    columns = next(n for n, most in ((4, 9), (3, 14), (2, _LONGEST)) if longest <= most)
    canvas = axes.figure
    canvas.set_figheight(canvas.get_figheight() + _LEGEND_ROW * (-(-len(labels) // columns) - 1))
    made = canvas.legend(
        handles, [str(i) for i in range(len(labels))], loc="outside lower center", ncols=min(columns, len(labels))
    )
    for entry, label in zip(made.get_texts(), labels, strict=True):
        entry.set_text(short(label))


def draw(figure: Figure, fill: Callable[[Any], None], *, width: float = 4.8, height: float = 3.1) -> Figure:
    """``figure`` with the SVG of one pair of axes, which ``fill`` draws into; sizes in inches.

    Nothing of the machine's matplotlib settings and nothing of the clock is in it.
    """
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes; the table below the figure has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas = Canvas(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(canvas)
        fill(canvas.add_subplot())
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return replace(figure, svg=_inline(out.getvalue(), figure))


def _inline(svg: str, figure: Figure) -> str:
    """``svg`` as an element of a page: text alternatives in, and names that no other figure on the page has."""
    key = figure.key
    # Each text is drawn as shapes and repeated in a comment, which the title and the table make superfluous.
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    head, _, rest = svg.partition(">")
    title, description = escape(figure.title), escape(f"{figure.caption} {figure.details}".strip())
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" '
        f'role="img" aria-labelledby="{key}-title {key}-desc">\n<title id="{key}-title">{title}</title>\n'
        f'<desc id="{key}-desc">{description}</desc>{rest}'
    )

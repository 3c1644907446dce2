"""The methods by name, what they are made of, and every setting. Imports nothing heavy: the functions are elsewhere.

A method is a row of parts: a score, a mask rule, and optionally a permutation, a refinement of the mask, a solver for
the weights, a refit, an allocation of sparsity, and what the layer's output is compared with. A recipe names a method
and may replace any part.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sparsify.errors import UsageError
from sparsify.types import Group

Scalar = bool | int | float | str

# Part -> what can stand there, with a line each. The first is the one that does nothing.
PARTS: dict[str, dict[str, str]] = {
    "score": {
        "own": "the solver's own choice of mask",
        "magnitude": "|W|",
        "wanda": "|W| times the norm of the input",
        "ria": "relative importance in row and column, times a power of the input norm",
        "stochria": "ria with row and column sums over a random sample",
        "symwanda": "|W| by the norms of input and output",
    },
    "permute": {
        "none": "inputs stay in order",
        "fold": "reorder inputs where neighbouring weights can take the order over, at no cost at run time",
        "residual": "fold, and one order of the residual stream for the whole model",
        "gather": "fold where possible, elsewhere one recorded order per input, a gather at run time",
        "simulate": "one recorded order per linear, as the RIA paper evaluates it; for comparison",
    },
    "refine": {
        "none": "the mask as scored",
        "dsnot": "swap by the mean output error",
        "r2-dsnot": "the same with relative importance and a regulariser",
        "swaps": "swap while that lowers the output error",
    },
    "solver": {
        "none": "weights stay",
        "sparsegpt": "columns from left to right, errors passed on to the right",
        "mrp": "the optimal update for several removed weights at once",
        "fista": "l1 model with accelerated gradients",
        "admm": "alternating directions with growing sparsity",
        "alps": "alternating directions with a rising penalty",
    },
    "refit": {
        "none": "as the solver leaves it",
        "cg": "least squares on the mask by conjugate gradients",
        "exact": "least squares on the mask by Cholesky factorisation",
    },
    "allocate": {
        "uniform": "the same sparsity everywhere",
        "owl": "more for blocks with fewer outliers",
        "error": "least measured output error for the same number of weights",
    },
    "order": {
        "block": "statistics of a block before any of it is pruned",
        "group": "statistics of each group of linears after the earlier ones of its block are pruned",
    },
    "aim": {
        "own": "a linear's output on the inputs it sees",
        "dense": "the dense model's output on the dense model's inputs",
        "residual": "and, for what is added to the residual stream, the stream's error so far made up for",
    },
    "inputs": {
        "pruned": "a block's inputs come from the pruned blocks before it",
        "dense": "a block's inputs come from the dense model, so that blocks are independent",
    },
}


@dataclass(frozen=True)
class Setting:
    """A number or word that tunes a part.

    Attributes:
        part: the part and what must stand there for the setting to mean something, ``score=ria``; ``solving``
            for whatever solves with the matrix of inputs.
        default: its value.
        low: least value of a number, or for a word the choices.
        high: greatest value of a number.
        help: one line.
    """

    part: str
    default: Scalar
    low: float | tuple[str, ...] = 0
    high: float = float("inf")
    help: str = ""


SETTINGS: dict[str, Setting] = {
    "damping": Setting("solving", 0.01, 0, 10, "share of the mean diagonal added to a Gram matrix"),
    "ria.exponent": Setting("score=ria", 0.5, 0, 4, "power of the input norm"),
    "stochria.exponent": Setting("score=stochria", 1.0, 0, 4, "power of the input norm"),
    "stochria.share": Setting("score=stochria", 0.1, 0.001, 1, "share of rows and columns that are summed"),
    "symwanda.norms": Setting(
        "score=symwanda", "both", ("input", "output", "both", "squared", "weights", "lp"), help="which norms count"
    ),
    "symwanda.output": Setting("score=symwanda", 1.0, 0, 1e9, "weight of output norms"),
    "symwanda.units": Setting(
        "score=symwanda", "mean", ("mean", "raw"), help="both norms divided by their means, or not"
    ),
    "symwanda.p": Setting("score=symwanda", 1.0, 0, 64, "order of the norm in lp; 0 counts non-zeros"),
    "symwanda.strategy": Setting("score=symwanda", 1, 1, 4, "how lp norms enter, S1 to S4"),
    "symwanda.exponent": Setting("score=symwanda", 0.5, 0, 4, "power of the input norm in lp"),
    "permute.sweeps": Setting("permute", 4, 1, 100, "the most sweeps of assignments"),
    "permute.parts": Setting("permute", 1, 1, 1024, "parts that are solved apart: faster, a little worse"),
    "dsnot.cycles": Setting("refine=dsnot|r2-dsnot", 50, 0, 10000, "the most swaps a row"),
    "dsnot.threshold": Setting("refine=dsnot|r2-dsnot", 0.1, 0, 1e9, "mean row error, times window length, to reach"),
    "dsnot.variance": Setting("refine=dsnot|r2-dsnot", 1.0, 0, 4, "power of the variance that restoring is divided by"),
    "dsnot.safe": Setting("refine=dsnot|r2-dsnot", False, help="only swaps that lower the mean row error"),
    "dsnot.skip": Setting("refine=dsnot|r2-dsnot", "", help="glob of linears to leave; their code: *.mlp.*"),
    "r2.exponent": Setting("refine=r2-dsnot", 0.5, 0, 4, "power of the input norm"),
    "r2.reweight": Setting("refine=r2-dsnot", "grow", ("none", "grow", "prune", "both"), help="relative importance in"),
    "r2.gamma_grow": Setting("refine=r2-dsnot", 0.0, 0, 1e9, "regulariser of restoring"),
    "r2.gamma_prune": Setting("refine=r2-dsnot", 0.0, 0, 1e9, "regulariser of removing"),
    "r2.norm": Setting("refine=r2-dsnot", 2.0, 0, 8, "power in the regularisers"),
    "swaps.most": Setting("refine=swaps", 100, 0, 100000, "the most swaps a row"),
    "swaps.candidates": Setting("refine=swaps", 64, 0, 65536, "pairs tried are of this many each; 0 tries all"),
    "mrp.variant": Setting(
        "solver=mrp",
        "auto",
        ("auto", "SS", "SM", "MS", "MM"),
        help="choice of mask, then compensation; auto is MM or SM",
    ),
    "mrp.block": Setting("solver=mrp", 0, 0, 65536, "columns solved together; 0 is a group for N:M, else 16"),
    "mrp.free": Setting("solver=mrp", "all", ("right", "all"), help="weights that may move: to the right, or all"),
    "fista.start": Setting("solver=fista", "sparsegpt", ("sparsegpt", "wanda", "dense"), help="warm start"),
    "fista.steps": Setting("solver=fista", 20, 0, 10000, "gradient steps a round"),
    "fista.patience": Setting("solver=fista", 3, 0, 1000, "rounds without improvement that end it"),
    "fista.improvement": Setting("solver=fista", 1e-3, 0, 1, "relative gain of a round below which it ends"),
    "fista.threshold": Setting("solver=fista", 0.3, 0, 1, "error share of rounding above which l1 is raised"),
    "fista.scaled": Setting("solver=fista", True, help="in units of the input norms; no is the paper's own"),
    "admm.iterations": Setting("solver=admm", 20, 1, 10000, "iterations"),
    "alps.iterations": Setting("solver=alps", 300, 1, 10000, "the most iterations"),
    "alps.penalty": Setting("solver=alps", 0.1, 1e-4, 1e4, "the penalty it begins with"),
    "refit.iterations": Setting("refit=cg", 32, 1, 10000, "the most conjugate gradient steps"),
    "aim.share": Setting("aim=dense|residual", 1.0, 0, 1, "share of the correction towards dense inputs"),
    "aim.residual_share": Setting("aim=residual", 1.0, 0, 1, "share of the residual stream's error to make up for"),
    "owl.outlier": Setting("allocate=owl", 5.0, 1, 1000, "an outlier is this many times the mean"),
    "owl.spread": Setting("allocate=owl", 0.08, 0, 0.5, "half the range of sparsities over blocks"),
    "error.spread": Setting("allocate=error", 0.15, 0.001, 0.5, "greatest deviation from the mean sparsity"),
}
"""Every setting by name; ``--set NAME=VALUE``, or the key ``settings`` of a recipe file."""


# A setting that means something only where another has one of these values.
_NEEDS: dict[str, tuple[str, tuple[Scalar, ...]]] = {
    "symwanda.output": ("symwanda.norms", ("both", "squared")),
    "symwanda.p": ("symwanda.norms", ("lp",)),
    "symwanda.units": ("symwanda.norms", ("both", "squared")),
    "symwanda.strategy": ("symwanda.norms", ("lp",)),
    "symwanda.exponent": ("symwanda.norms", ("lp",)),
    "mrp.block": ("mrp.variant", ("auto", "SM", "MS", "MM")),
    "mrp.free": ("mrp.variant", ("auto", "SM", "MM")),
}


COSTS = {
    "none": "weights alone",
    "norms": "one pass of the text",
    "gram": "and a matrix of inputs per linear, factorised",
    "gram+": "and tens of products with it",
}
"""What a method takes, by name."""


@dataclass(frozen=True)
class Method:
    """A named recipe: parts and the settings it changes.

    Attributes:
        group: the comparison group its authors use for unstructured sparsity.
        cost: what it takes, see ``COSTS``.
        paper: source.
        summary: one line for ``--help``.
        for_groups: parts and settings that differ where the recipe's own pattern is N:M; empty once resolved.
        settings: values that differ from the defaults.
    """

    summary: str
    cost: str
    paper: str = ""
    group: Group = "layer"
    score: str = "own"
    permute: str = "none"
    refine: str = "none"
    solver: str = "none"
    refit: str = "none"
    allocate: str = "uniform"
    order: str = "block"
    aim: str = "own"
    inputs: str = "pruned"
    for_groups: Mapping[str, Scalar] = field(default_factory=dict)
    settings: Mapping[str, Scalar] = field(default_factory=dict)

    def setting(self, name: str) -> Any:
        """The value of a setting: this method's, or the default."""
        return self.settings.get(name, SETTINGS[name].default)

    def uses(self, name: str) -> bool:
        """Whether a setting means anything for these parts."""
        part, _, values = SETTINGS[name].part.partition("=")
        if part == "solving":
            # ADMM has a regulariser of its own; targets, and what a weight is worth to a solver, do not.
            damped = self.solver not in ("none", "admm") or self.refit != "none" or self.allocate == "error"
            worth = self.permute != "none" and self.score == "own"
            return damped or (self.solver == "admm" and (self.aim != "own" or worth))
        return getattr(self, part) in values.split("|") if values else getattr(self, part) != "none"

    @property
    def needs_gram(self) -> bool:
        """Whether Σ x xᵀ has to be collected."""
        symwanda = self.score == "symwanda" and self.setting("symwanda.norms") in ("output", "both", "squared")
        return self.solver != "none" or self.refit != "none" or self.refine == "swaps" or symwanda

    @property
    def needs_mean(self) -> bool:
        """Whether Σ x has to be collected."""
        return self.refine in ("dsnot", "r2-dsnot")

    @property
    def needs_data(self) -> bool:
        """Whether calibration text has to be run."""
        free = self.score in ("own", "magnitude") or (
            self.score == "symwanda" and self.setting("symwanda.norms") == "weights"
        )
        return self.needs_gram or self.needs_mean or not free or self.allocate != "uniform"


_WANDA = "Sun et al., arXiv 2306.11695"
_RIA = "Zhang et al., ICLR 2024"
_SYMMETRIC = "Yi and Richtárik, arXiv 2501.18980"
_HALFWAY: dict[str, Scalar] = {"aim.share": 0.5, "aim.residual_share": 0.5, "permute.sweeps": 2}
METHODS: dict[str, Method] = {
    "magnitude": Method("absolute value; needs no text", "none", score="magnitude"),
    "wanda": Method("absolute value times the norm of its input", "norms", _WANDA, "row", "wanda"),
    "ria": Method(
        "relative importance in row and column, times the input norm to the power 0.5", "norms", _RIA, score="ria"
    ),
    "ria-cp": Method(
        "ria with inputs reordered for N:M, folded into the neighbouring weights",
        "norms",
        _RIA,
        score="ria",
        permute="fold",
    ),
    "stochria": Method("ria with sums over a random tenth of rows and columns", "norms", _SYMMETRIC, score="stochria"),
    "symwanda": Method("absolute value times input norm plus output norm", "gram", _SYMMETRIC, score="symwanda"),
    "dsnot": Method(
        "wanda, then swaps that bring the mean output error to zero", "norms", "Zhang et al., arXiv 2310.08915", "row",
        "wanda", refine="dsnot",
    ),
    "r2-dsnot": Method(
        "wanda, then such swaps by relative importance", "norms", _SYMMETRIC, "row", "wanda", refine="r2-dsnot",
        for_groups={"dsnot.safe": False, "r2.reweight": "both"}, settings={"dsnot.safe": True},
    ),
    "sparsegpt": Method(
        "column by column, errors passed on to the right", "gram", "Frantar and Alistarh, arXiv 2301.00774",
        solver="sparsegpt",
    ),
    "mrp": Method(
        "several weights removed at once, the others optimal", "gram+", "Zhang et al., arXiv 2410.15567", solver="mrp"
    ),
    "fistapruner": Method(
        "l1 model with accelerated gradients, dense targets, blocks independent", "gram+",
        "Zhao et al., arXiv 2408.03728", solver="fista", order="group", aim="dense", inputs="dense",
    ),
    "admm": Method(
        "alternating directions with growing sparsity", "gram+", "Boža, arXiv 2401.02938", solver="admm"
    ),
    "alps": Method(
        "alternating directions with a rising penalty, then least squares", "gram+", "Meng et al., arXiv 2406.07831",
        solver="alps",
    ),
    "fast": Method(
        "sparsegpt aimed halfway at the dense model; reordered inputs for N:M", "gram", "docs/recipes.md",
        solver="sparsegpt", order="group", aim="residual", for_groups={"permute": "fold"}, settings=_HALFWAY,
    ),
    "best": Method(
        "alps aimed halfway at the dense model; admm and reordered inputs for N:M", "gram+", "docs/recipes.md",
        solver="alps", order="group", aim="residual", for_groups={"permute": "fold", "solver": "admm"},
        settings=_HALFWAY | {"alps.penalty": 0.3, "alps.iterations": 24},
    ),
}  # fmt: skip
"""The table: name -> method."""


def resolve(
    method: str, parts: Mapping[str, str | None], settings: Mapping[str, Scalar], *, grouped: bool = True
) -> Method:
    """The method ``method`` for an N:M pattern (``grouped``) or another, ``parts`` replaced and ``settings`` changed.

    Raises:
        UsageError: an unknown name, a value out of range, a setting of a part that is not in use, or parts that do
            not go together.
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    base = METHODS[method]
    given: dict[str, Any] = {name: value for name, value in parts.items() if value is not None}
    for name, value in given.items():
        if value not in PARTS[name]:
            raise UsageError(f"{name} {value!r} is unknown; choose one of {', '.join(PARTS[name])}")
    for name, setting in settings.items():
        _check_setting(name, setting)
    own = base.for_groups if grouped else {}
    chosen: dict[str, Any] = {**{name: value for name, value in own.items() if name in PARTS}, **given}
    tuned = {name: value for name, value in own.items() if name not in PARTS}
    plan = replace(base, **chosen, settings={**base.settings, **tuned, **settings}, for_groups={})
    plan = replace(plan, settings={name: value for name, value in plan.settings.items() if plan.uses(name)})
    for name in settings:
        if name not in plan.settings:
            raise UsageError(f"setting {name} has no effect here: it belongs to {SETTINGS[name].part}")
    _check_combination(plan)
    return plan


def setting_from(name: str, text: str) -> Scalar:
    """``text`` as a value of the setting, or as it stands where it is none, for ``resolve`` to refuse."""
    default = SETTINGS[name].default
    if isinstance(default, bool):
        return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text)
    if not isinstance(default, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(text)
    return text


def _check_setting(name: str, value: Scalar) -> None:
    if name not in SETTINGS:
        raise UsageError(f"setting {name!r} is unknown; `sparsify methods` lists them")
    setting = SETTINGS[name]
    if isinstance(setting.low, tuple):
        if value not in setting.low:
            raise UsageError(f"setting {name} {value!r} is unknown; choose one of {', '.join(setting.low)}")
    elif isinstance(setting.default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"setting {name} {value!r}: give true or false")
    elif isinstance(setting.default, str):
        if not isinstance(value, str):
            raise UsageError(f"setting {name} {value!r}: give a text")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"setting {name} {value!r} is not a number; the default is {setting.default}")
    elif isinstance(setting.default, int) and not isinstance(value, int):
        raise UsageError(f"setting {name} {value!r} is not a whole number; the default is {setting.default}")
    elif not setting.low <= value <= setting.high:
        raise UsageError(f"setting {name} {value} is outside [{setting.low:g}, {setting.high:g}]")


def _check_combination(plan: Method) -> None:
    own = plan.score == "own"
    if own and plan.solver == "none":
        raise UsageError("score own: there is no solver to choose the mask; name a score or a solver")
    if not own and plan.solver in ("fista", "alps"):
        raise UsageError(
            f"score {plan.score} with solver {plan.solver}: {plan.solver} chooses its mask while it solves; "
            "for a given mask use --set solver=none --set refit=cg or --set solver=admm, or --set score=own"
        )
    if plan.refine != "none" and own:
        other = " --set solver=admm" if plan.solver in ("fista", "alps") else ""
        raise UsageError(
            f"refine {plan.refine} with solver {plan.solver}: it needs the mask of a score; "
            f"add --set score=wanda{other}"
        )
    if plan.aim != "own" and plan.solver == "none" and plan.refit == "none":
        raise UsageError(f"aim {plan.aim} without solver and refit: weights stay, whatever the aim; add --set refit=cg")
    if plan.aim == "residual" and plan.inputs == "dense":
        raise UsageError(
            "aim residual with inputs dense: the stream that enters a block has no error; use --set aim=dense"
        )
    if plan.score == "symwanda" and 0 < plan.setting("symwanda.p") < 0.25:
        raise UsageError("symwanda.p between 0 and 0.25: such norms are beyond float32; use 0, or at least 0.25")
    if plan.permute in ("residual", "gather") and not plan.needs_data:
        raise UsageError(
            f"permute {plan.permute} with score {plan.score}: which linears share an input is seen on text, which "
            "nothing else here needs; use --set permute=fold"
        )
    if not plan.needs_data and (plan.order != "block" or plan.inputs != "pruned"):
        raise UsageError(
            f"order {plan.order} and inputs {plan.inputs} with score {plan.score}: no text is run; "
            "use --set order=block and --set inputs=pruned"
        )
    for name, (other, values) in _NEEDS.items():
        if name in plan.settings and plan.setting(other) not in values:
            raise UsageError(f"setting {name} has no effect with {other} {plan.setting(other)}")
    if plan.solver == "mrp" and not own:
        if plan.setting("mrp.variant") in ("MS", "MM"):
            raise UsageError(
                f"mrp.variant {plan.setting('mrp.variant')} with score {plan.score}: the mask is chosen already; "
                "use SS or SM, or --set score=own"
            )
        if "mrp.block" in plan.settings and plan.setting("mrp.free") == "all":
            raise UsageError("setting mrp.block has no effect with a given mask and mrp.free all")
    if "r2.norm" in plan.settings and not (plan.setting("r2.gamma_grow") or plan.setting("r2.gamma_prune")):
        raise UsageError("setting r2.norm has no effect without r2.gamma_grow or r2.gamma_prune")
    simultaneous = plan.solver == "mrp" and plan.setting("mrp.variant") not in ("SS", "MS")
    if plan.refit != "none" and simultaneous and plan.setting("mrp.free") == "all":
        raise UsageError("refit with solver mrp: mrp.free all is the least squares optimum already; drop --set refit")
    if plan.aim != "own" and plan.inputs == "dense" and plan.order == "block":
        raise UsageError(
            f"aim {plan.aim} with inputs dense and order block: dense and pruned inputs are the same; "
            "use --set order=group"
        )

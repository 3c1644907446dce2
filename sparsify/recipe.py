"""The recipe: every decision of a pruning run in one value, from options, from YAML, and back out of a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError
from sparsify.methods import PARTS, SETTINGS, Method, Scalar, resolve, setting_from
from sparsify.types import Group, LinearSpec, NofM, Pattern, check_enumerable, parse_pattern

DEFAULT_CALIBRATION = "pydoc"


@dataclass(frozen=True)
class Recipe:
    """How to prune. Equal recipes on equal models and text give equal bits.

    Attributes:
        pattern: ``2:4``, any ``N:M`` (N kept of M), or a sparsity such as ``0.5``.
        method: name in ``METHODS``, which decides every part that is None below.
        group: comparison group for a sparsity: ``layer`` or ``row``.
        score: and ``permute``, ``refine``, ``solver``, ``refit``, ``allocate``, ``order``, ``aim``, ``inputs``:
            what stands in that part, see ``PARTS``.
        settings: name -> value, see ``SETTINGS``.
        include: globs of linear names to prune; none means all.
        exclude: globs of linear names that stay dense.
        overrides: glob -> pattern for single linears; the last that matches counts.
        calibration: text source, see ``sparsify.data.load_windows``.
        windows: number of calibration windows (ids in a safetensors file come as they are).
        length: tokens per window.
        bos: start windows with BOS; None does what the tokenizer does.
        seed: seed of every draw.
        compute_dtype: dtype of the calibration forward passes; scores are float32 always.
    """

    pattern: str = "2:4"
    method: str = "fast"
    group: Group | None = None
    score: str | None = None
    permute: str | None = None
    refine: str | None = None
    solver: str | None = None
    refit: str | None = None
    allocate: str | None = None
    order: str | None = None
    aim: str | None = None
    inputs: str | None = None
    settings: dict[str, Scalar] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: dict[str, str] = field(default_factory=dict)
    calibration: str = DEFAULT_CALIBRATION
    windows: int = 32
    length: int = 512
    bos: bool | None = None
    seed: int = 0
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.group not in (None, "layer", "row"):
            raise UsageError(f"group {self.group!r} is unknown; choose layer or row")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UsageError(f"compute_dtype {self.compute_dtype!r} is unknown; choose float32 or bfloat16")
        if self.windows < 1 or self.length < 2:
            raise UsageError(f"windows {self.windows} of length {self.length}: at least 1 window of 2 tokens is needed")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed} is outside [0, 2^63)")
        patterns = [self.parsed]
        for glob, pattern in self.overrides.items():
            patterns.append(self._parse(pattern, f"overrides: {glob}"))
        self._check_patterns(patterns)

    @cached_property
    def plan(self) -> Method:
        """The method with the recipe's own parts and settings in place.

        Raises:
            UsageError: what ``methods.resolve`` refuses.
        """
        parts = {name: getattr(self, name) for name in PARTS}
        return resolve(self.method, parts, self.settings, grouped=isinstance(self.parsed, NofM))

    @cached_property
    def parsed(self) -> Pattern:
        """``pattern``, parsed."""
        return self._parse(self.pattern, "pattern")

    def _check_patterns(self, patterns: list[Pattern]) -> None:
        plan = self.plan
        grouped = [isinstance(pattern, NofM) for pattern in patterns]
        if self.group is not None and all(grouped):
            raise UsageError(
                f"group {self.group} with pattern {self.pattern}: the groups of N:M are M inputs of a row; "
                "drop --group or give a sparsity"
            )
        if plan.permute != "none" and not any(grouped):
            raise UsageError(
                f"permute {plan.permute} with pattern {self.pattern}: the order of inputs matters to N:M only; "
                "use --set permute=none or an N:M pattern"
            )
        if plan.allocate != "uniform" and any(grouped):
            raise UsageError(
                f"allocate {plan.allocate} with pattern {self.pattern}: N:M fixes the sparsity of every group; "
                "use --set allocate=uniform or a sparsity"
            )
        if plan.solver == "mrp" and plan.score == "own" and plan.setting("mrp.variant") in ("MS", "MM"):
            for pattern in patterns:
                check_enumerable(pattern)

    def _parse(self, text: str, where: str) -> Pattern:
        # The group speaks of unstructured patterns only, so that one recipe can hold both kinds.
        return parse_pattern(text, None if ":" in str(text) else self.group, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them; ``from_mapping`` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def assign(self, linears: Sequence[LinearSpec]) -> dict[str, Pattern]:
        """The pattern of each linear that is pruned, by name.

        Raises:
            UsageError: a glob that matches nothing, no linear left, or a width that M does not divide.
        """
        names = [spec.name for spec in linears]
        skip = self.plan.setting("dsnot.skip") if self.plan.uses("dsnot.skip") else ""
        for option, globs in (
            ("include", self.include),
            ("exclude", self.exclude),
            ("override", self.overrides),
            ("dsnot.skip", (skip,) if skip else ()),
        ):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    raise UsageError(f"{option} {glob!r} matches no prunable linear; names look like {names[0]}")
        assigned: dict[str, Pattern] = {}
        for spec in linears:
            if self.include and not _any_match(spec.name, self.include):
                continue
            if _any_match(spec.name, self.exclude):
                continue
            text = self.pattern
            for glob, override in self.overrides.items():
                if fnmatchcase(spec.name, glob):
                    text = override
            pattern = self._parse(text, "pattern")
            m = getattr(pattern, "m", 1)
            if spec.in_features % m:
                raise UsageError(
                    f"pattern {text}: {spec.name} has {spec.in_features} inputs, which is not a multiple of {m}; "
                    f"pass --exclude '{spec.name}' or choose another pattern"
                )
            assigned[spec.name] = pattern
        if not assigned:
            raise UsageError("include and exclude leave no linear to prune; widen them")
        return assigned


def _any_match(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


_TYPES: dict[str, tuple[type, ...]] = {
    "pattern": (str, float, int),
    "method": (str,),
    "group": (str, type(None)),
    **dict.fromkeys(PARTS, (str, type(None))),
    "settings": (dict,),
    "include": (list,),
    "exclude": (list,),
    "overrides": (dict,),
    "calibration": (str,),
    "windows": (int,),
    "length": (int,),
    "bos": (bool, type(None)),
    "seed": (int,),
    "compute_dtype": (str,),
}


def from_mapping(values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that ``values`` write; what is not named keeps its default.

    Raises:
        UsageError: an unknown key or a value of the wrong type; ``where`` names the file.
    """
    known = {f.name for f in fields(Recipe)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}; known keys: {', '.join(sorted(known))}")
        # bool is an int to Python, not to a user.
        if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and bool not in _TYPES[key]):
            wanted = " or ".join("nothing" if t is type(None) else t.__name__ for t in _TYPES[key])
            raise UsageError(f"{where}: key {key!r} is {type(value).__name__}, expected {wanted}")
        if isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise UsageError(f"{where}: key {key!r} must be a list of strings")
            value = tuple(value)
        if key == "settings":
            bad = next((name for name, item in value.items() if not isinstance(item, bool | int | float | str)), None)
            if bad is not None:
                raise UsageError(f"{where}: setting {bad!r} is {type(value[bad]).__name__}, expected one value")
            # YAML 1.1 takes 1e-3 for a word.
            value = {
                str(name): setting_from(name, item) if isinstance(item, str) and name in SETTINGS else item
                for name, item in value.items()
            }
        elif isinstance(value, dict):
            value = {str(glob): _pattern_text(pattern, where) for glob, pattern in value.items()}
        checked[key] = _pattern_text(value, where) if key == "pattern" else value
    try:
        return Recipe(**checked)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _pattern_text(value: Any, where: str) -> str:
    # YAML 1.1 reads 2:4 without quotes as the base-60 number 124, and nobody means a sparsity of 124.
    if isinstance(value, int) and value > 1:
        raise UsageError(f'{where}: pattern {value} is a whole number to YAML; write it in quotes, as in "2:4"')
    return str(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML recipe file.

    Raises:
        UsageError: missing, not YAML, not a mapping.
    """
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not YAML ({reason})") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{path}: a recipe is a mapping such as 'pattern: \"2:4\"'")
    return value

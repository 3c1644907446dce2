"""Orders of inputs for the N:M linears of a block: sought, and folded into the neighbouring weights or recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from sparsify.couplings import Coupling, couplings, fold_attention, fold_mlp, reads_residual
from sparsify.grams import Grams
from sparsify.layer import pull, salience, seed_of, target
from sparsify.methods import Method
from sparsify.model import Skeleton, weight_view
from sparsify.permute import parts_of, search
from sparsify.solvers.quadratic import Gram
from sparsify.stats import InputStats
from sparsify.types import LinearSpec, NofM, Pattern

# The order [in] that a linear's pattern holds in though its weights are not in it, or None; and how the manifest
# calls what was done.
Placed = tuple[torch.Tensor | None, str]


class Reorder:
    """Seeks orders for a run.

    Args:
        skeleton: the model; the weights of the block at hand are loaded.
        plan: the method.
        patterns: linear name -> pattern.
        seed: of the run.
        tell: receives notices.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Method,
        patterns: dict[str, Pattern],
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self.skeleton = skeleton
        self.plan = plan
        self.patterns = patterns
        self.seed = seed
        self.tell = tell
        # Asked for linear by linear, and the same for all of a block.
        self._couplings = lru_cache(maxsize=1)(partial(couplings, skeleton))

    def shared(
        self, index: int, specs: list[LinearSpec], stats: dict[str, InputStats | None], grams: Grams
    ) -> tuple[dict[str, Placed], dict[str, torch.Tensor]]:
        """Orders of block ``index`` that are known or recorded, for linears whose statistics were taken together.

        Returns:
            what became of each N:M linear that has one; and the orders found here, [in], by linear name.
        """
        plan = self.plan
        grouped = [spec for spec in specs if isinstance(self.patterns[spec.name], NofM)]
        placed: dict[str, Placed] = {}
        orders: dict[str, torch.Tensor] = {}
        if plan.permute == "residual":
            # The stream's order came with the weights.
            placed |= {spec.name: (None, "folded") for spec in grouped if reads_residual(self.skeleton, spec)}
        if plan.permute not in ("gather", "simulate"):
            return placed, orders
        # One order per input, so that one gather serves all that read it; or one each, as the paper evaluates it.
        sharing: dict[Any, list[LinearSpec]] = {}
        for spec in grouped:
            if self._coupling(index, spec) is None:
                key = (id(stats[spec.name]), self.patterns[spec.name]) if plan.permute == "gather" else spec.name
                sharing.setdefault(key, []).append(spec)
        for members in sharing.values():
            # Their targets are made again when they are solved: all at once, they would be twice as large as the block.
            worth = [self._worth(spec, stats[spec.name], grams) for spec in members]
            perm = self._search(torch.cat(worth), members[0])
            for spec in members:
                placed[spec.name], orders[spec.name] = (perm, "recorded"), perm.cpu()
        return placed, orders

    def fold(
        self, index: int, spec: LinearSpec, aim: torch.Tensor, stats: InputStats | None, gram: Gram | None
    ) -> torch.Tensor | None:
        """Fold an order of the inputs of ``spec`` into the weights around them, where that is wanted and possible.

        Args:
            index: of the block.
            spec: the linear.
            aim: [out, in], what it should compute (``layer.target``): its weight, which then follows the order, or a
                tensor of its own, which is left to the caller.
            stats: of its inputs.
            gram: of its inputs.

        Returns:
            the order, [in]; None where the inputs stay as they are.
        """
        coupling = self._coupling(index, spec)
        if coupling is None:
            return None
        score, heads, model = self._salience(spec, aim, stats, gram), coupling.heads, self.skeleton.model
        if heads is None:
            perm = self._search(score, spec)
            fold_mlp(model, coupling, perm)
            return perm
        # Query heads that read one key-value head share its order. Groups lie within heads, so moving whole heads would
        # change no group.
        by_key = score.reshape(len(score), heads.n_key, -1, heads.head_dim)
        within = [
            self._search(by_key[:, key].transpose(0, 1).reshape(-1, heads.head_dim), spec) for key in range(heads.n_key)
        ]
        return fold_attention(model, coupling, within).to(score.device)

    def again(self, index: int, spec: LinearSpec, perm: torch.Tensor) -> None:
        """Fold into a block's weights the order [in] that ``fold`` found elsewhere."""
        coupling = self._coupling(index, spec)
        assert coupling is not None
        heads, model = coupling.heads, self.skeleton.model
        if heads is None:
            fold_mlp(model, coupling, perm)
            return
        # Of the first query head of each key-value head; all that read one share its order.
        firsts = perm.reshape(heads.n_key, -1, heads.head_dim)[:, 0]
        fold_attention(model, coupling, list(firsts % heads.head_dim))

    def moves_later(self, index: int, specs: Sequence[LinearSpec]) -> bool:
        """Whether folding an order of one of ``specs`` moves rows of a later one, which has to wait for it then."""
        place = {spec.name: i for i, spec in enumerate(specs)}
        for i, spec in enumerate(specs):
            coupling = self._coupling(index, spec)
            moved = () if coupling is None else coupling.producers
            if any(place.get(producer.name, -1) >= i for producer, _ in moved):
                return True
        return False

    def _coupling(self, index: int, spec: LinearSpec) -> Coupling | None:
        """What follows the inputs of a linear that is to be folded."""
        pattern = self.patterns[spec.name]
        if not isinstance(pattern, NofM) or self.plan.permute in ("none", "simulate"):
            return None
        coupling = self._couplings(index).get(spec.name)
        if coupling is not None and coupling.heads is not None and coupling.heads.head_dim % pattern.m:
            if self.plan.permute != "gather":
                self.tell(
                    f"{spec.name}: heads of {coupling.heads.head_dim} are no multiple of {pattern.m}; "
                    "its inputs stay in order"
                )
            return None
        return coupling

    def _worth(self, spec: LinearSpec, stats: InputStats | None, grams: Grams) -> torch.Tensor:
        """``_salience`` of a linear whose target is made for it alone."""
        weight = weight_view(self.skeleton.model.get_parameter(spec.parameter), spec)
        gram = grams.of(stats, spec.name)
        aim = target(weight, gram, pull(weight, stats, self.plan)[0])
        return self._salience(spec, aim, stats, gram)

    def _salience(
        self, spec: LinearSpec, aim: torch.Tensor, stats: InputStats | None, gram: Gram | None
    ) -> torch.Tensor:
        """[out, in], what each weight of a linear is worth."""
        worth = salience(aim, stats, gram, self.plan, seed_of(spec.name, self.seed))
        if gram is not None:
            # The search needs memory, and in another order of the inputs the factor is another.
            gram.release()
        return worth

    def _search(self, score: torch.Tensor, spec: LinearSpec) -> torch.Tensor:
        pattern = self.patterns[spec.name]
        assert isinstance(pattern, NofM)
        return search(
            score,
            pattern,
            n_sweeps=self.plan.setting("permute.sweeps"),
            n_parts=parts_of(score.shape[1] // pattern.m, self.plan.setting("permute.parts")),
            seed=self.seed,
        ).perm

"""A runtime session as a model of lm-eval: its requests, in tokens, answered by a scoring function.

Contexts, truncation and rolling windows are those of lm-eval's own ``HFLM`` with the same ``max_length``, so that both
give the same figures for the same model; by itself ``HFLM`` sees as much as the model has positions for. Imported where
lm-eval is installed, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from sparsify.errors import DataError, UsageError

# (ids [1, length] int64, n) -> of the last n of them log-probabilities [n] in nats, and whether each is greedy [n].
Score = Callable[[NDArray[np.int64], int], tuple[NDArray[np.float64], NDArray[np.bool_]]]
# (ids [1, length] int64, n) -> the next n tokens, greedily. They are read one by one, and no further than needed.
Generate = Callable[[NDArray[np.int64], int], Iterable[int]]
Progress = Callable[[int, int], None]

# Tokens that a task gets where it does not say how many, as in HFLM.
DEFAULT_NEW_TOKENS = 256


class SessionLM(TemplateLM):  # type: ignore[misc]  # a class of lm-eval, which carries no types
    """lm-eval's view of a session.

    Args:
        score: ``sparsify.bench.scoring.score`` of an open session.
        tokenizer: the model's, of transformers. Whether it puts BOS before a text is left to it.
        max_length: tokens the model sees at most; ``score`` is given one more, the last to predict. Longer requests
            lose tokens at their start, and count in ``cut``.
        generate: for tasks that generate text; None where the runtime cannot.
        progress: called with (requests answered, requests) of the kind being answered.

    Attributes:
        asked: requests so far.
        cut: those of them that lost tokens.
    """

    def __init__(
        self,
        score: Score,
        tokenizer: Any,
        *,
        max_length: int,
        generate: Generate | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self._score, self._generate, self._progress = score, generate, progress
        self.asked = self.cut = 0

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None where the tokenizer has none."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or the end of the text before.

        Raises:
            DataError: the tokenizer has neither.
        """
        token = self.tokenizer.bos_token_id
        token = self.eot_token_id if token is None else token
        if token is None:
            raise DataError("the tokenizer has neither a BOS nor an EOS token to put before a text without context")
        return int(token)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with its prefix token gets no second one."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            options["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [self._likelihood(*request[1:]) for request in self._ticking(requests)]

    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not context or not continuation:
            raise DataError("lm-eval task: a context and its continuation need a token each; mend the task's texts")
        if len(continuation) > self.max_length:
            raise DataError(
                f"lm-eval task: a continuation has {len(continuation)} tokens, of which the model sees "
                f"{self.max_length}; leave the task out"
            )
        whole = context + continuation
        self.cut += len(whole) > self.max_length + 1
        ids = np.array([whole[-self.max_length - 1 :]], dtype=np.int64)
        logprobs, greedy = self._score(ids, len(continuation))
        return float(logprobs.sum()), bool(greedy.all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, each in disjoint windows with as much context as fits."""
        return [self._rolling(*request.args) for request in self._ticking(requests)]

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return sum(self._likelihood(*make_disjoint_window(window))[0] for window in windows)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts, each up to the first of its stop strings or the end of text.

        Raises:
            UsageError: the session generates nothing, or a task wants samples.
            DataError: a task wants as many tokens as the model sees.
        """
        return [self._text(*request.args) for request in self._ticking(requests)]

    def _text(self, context: str, options: dict[str, Any]) -> str:
        if self._generate is None:
            raise UsageError("this runtime generates no text here; leave out the tasks of output type generate_until")
        wanted = normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS)
        if wanted.get("do_sample") and wanted.get("temperature", 1.0):
            raise UsageError("lm-eval task: it wants samples, and sessions choose greedily; leave the task out")
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            raise DataError(
                f"lm-eval task: it wants {wanted['max_gen_toks']} new tokens of a model that sees {self.max_length}"
            )
        whole = self.tok_encode(context)
        self.cut += len(whole) > room
        ids = np.array([whole[-room:]], dtype=np.int64)
        stops, made, text = [stop for stop in wanted["until"] if stop], [], ""
        for token in self._generate(ids, wanted["max_gen_toks"]):
            if token == self.eot_token_id:
                break
            made.append(int(token))
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def _ticking(self, requests: Sequence[Any]) -> Iterator[Any]:
        for done, request in enumerate(requests, 1):
            yield request
            self.asked += 1
            if self._progress is not None:
                self._progress(done, len(requests))

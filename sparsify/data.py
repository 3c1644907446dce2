"""Text to token windows: seeded, hashed, and refused when there is too little of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError
from sparsify.extras import require

Split = Literal["calibration", "evaluation"]

# Text beyond this is not read: no calibration needs it, and a corpus of any size must not fill the memory.
MAX_TEXT_BYTES = 64 << 20
# Characters that are tokenised at once.
_PIECE = 4 << 20


@dataclass(frozen=True)
class Windows:
    """Token windows and where they come from.

    Attributes:
        ids: [n_windows, length] int64.
        source: as the user wrote it.
        bos: whether every window starts with the beginning-of-sequence token; None where ids came as they are.
        seed: seed of the choice of windows, or of the sampling for ``self``; None where nothing was drawn.
    """

    ids: NDArray[np.int64]
    source: str
    bos: bool | None
    seed: int | None

    @property
    def sha256(self) -> str:
        """Hash over shape and ids (little-endian int64)."""
        header = f"{self.ids.shape[0]}x{self.ids.shape[1]}:".encode()
        return hashlib.sha256(header + self.ids.astype("<i8").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the manifest records."""
        return {
            "source": self.source,
            "windows": self.ids.shape[0],
            "length": self.ids.shape[1],
            "bos": self.bos,
            "seed": self.seed,
            "sha256": self.sha256,
        }


def load_windows(
    source: str,
    folder: Path,
    *,
    n_windows: int,
    length: int,
    split: Split,
    seed: int = 0,
    bos: bool | None = None,
    stride: int | None = None,
    trust_remote_code: bool = False,
) -> Windows:
    """Token windows from ``source``, within the vocabulary and the context of the model in ``folder``.

    For calibration the text is cut into consecutive windows and ``n_windows`` of them are drawn with ``seed``; for
    evaluation the first ``n_windows`` are used, so that a perplexity says which text it was measured on.

    Args:
        source: ``pydoc`` (the English of Python's own help, always there; the splits share no topic), a ``.jsonl``
            file with a ``text`` key, another text file, ``FILE.safetensors:KEY`` (a [windows, length] integer tensor,
            used as it stands), ``self`` (sampled from the model), or ``hf:NAME[@CONFIG][:SPLIT[:COLUMN]]`` through
            ``datasets``.
        folder: model folder, for its tokenizer and its limits.
        n_windows: windows wanted; ids in a safetensors file come as they are.
        length: tokens per window, BOS included.
        split: which half of ``pydoc`` to use, and whether windows are drawn or taken in order.
        seed: seed of the draw.
        bos: start every window with BOS; None does what the tokenizer does by itself.
        stride: evaluation only: tokens from the start of a window to the next; None means ``length``.
        trust_remote_code: let the model's own code load.

    Raises:
        DataError: missing, empty, binary or too short text, ids outside the vocabulary, windows beyond the context.
        ModelError: the folder has no config.json.
        MissingExtraError: ``datasets`` is not installed.
    """
    if n_windows < 1 or length < 2:
        raise DataError(f"{n_windows} windows of {length} tokens: at least 1 window of 2 tokens is needed")
    vocab_size, context = model_limits(folder, trust_remote_code)
    path, _, key = source.rpartition(":")
    from_ids = path.endswith(".safetensors")
    if context is not None and length > context and not from_ids:
        raise DataError(f"length {length} exceeds the model's context of {context} tokens; give {context} or less")
    if from_ids:
        windows = Windows(_read_ids(Path(path), key), source, None, None)
    elif source.endswith(".safetensors"):
        raise DataError(f"{source}: name the tensor too, as in {source}:calibration_ids")
    elif source == "self":
        ids, from_bos = _sample_from_model(folder, n_windows, length, seed, trust_remote_code)
        windows = Windows(ids, source, from_bos, seed)
    else:
        text = _read_text(source, split)
        windows = _cut(text, source, folder, n_windows, length, split, seed, bos, stride, trust_remote_code)
    low, high = int(windows.ids.min()), int(windows.ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise DataError(
            f"{source}: token ids run from {low} to {high}, the model's vocabulary has {vocab_size}; "
            "the ids belong to another tokenizer"
        )
    if context is not None and windows.ids.shape[1] > context:
        raise DataError(
            f"{source}: windows of {windows.ids.shape[1]} tokens exceed the model's context of {context}; "
            "give shorter windows"
        )
    return windows


def model_limits(folder: Path, trust_remote_code: bool = False) -> tuple[int | None, int | None]:
    """(vocabulary size, longest context) by the config of a model folder; None where it has no such limit.

    Raises:
        ModelError: config.json is missing or not JSON.
    """
    from transformers import AutoConfig

    from sparsify.checkpoint import read_config
    from sparsify.model import quiet

    read_config(folder)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    except Exception:
        return None, None  # opening the model says what is wrong with the config

    def limit(*names: str) -> int | None:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    return limit("vocab_size"), limit("max_position_embeddings", "max_seq_len")


def _read_ids(path: Path, key: str) -> NDArray[np.int64]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            names = sorted(file.keys())
            if key not in names:
                raise DataError(f"{path}: has no tensor {key!r}; it holds {', '.join(names)}")
            ids = file.get_tensor(key)
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error})") from None
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise DataError(f"{path}:{key}: is {ids.dtype} {list(ids.shape)}; token ids are integers [windows, length]")
    return np.ascontiguousarray(ids.astype(np.int64))


def _read_text(source: str, split: Split) -> str:
    if source == "pydoc":
        return _pydoc(split)
    if source.startswith("hf:"):
        return _from_datasets(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(
            f"{source}: no such text file; give a text or .jsonl file, FILE.safetensors:KEY, pydoc, self or hf:NAME"
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TEXT_BYTES)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    # A cut in the middle of a character at the limit is not the file's fault.
    complete = len(raw) < MAX_TEXT_BYTES
    try:
        text = raw.decode("utf-8-sig", errors="strict" if complete else "ignore")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); give a text or .jsonl file") from None
    if "\0" in text:
        raise DataError(f"{path}: is a binary file; give a text or .jsonl file")
    if path.suffix == ".jsonl":
        text = _join_jsonl(path, text if complete else text[: text.rfind("\n") + 1])
    if not text.strip():
        raise DataError(f"{path}: holds no text")
    return text


def _join_jsonl(path: Path, text: str) -> str:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}: line {number} is not JSON") from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise DataError(f'{path}: line {number} has no "text" string')
        documents.append(value["text"])
    return "\n\n".join(documents)


def _pydoc(split: Split) -> str:
    from pydoc_data.topics import topics

    # Every fifth topic is kept for evaluation; the language drifts from topic to topic, so both halves see all of it.
    names = [name for i, name in enumerate(sorted(topics)) if (i % 5 == 0) == (split == "evaluation")]
    return "\n\n".join(topics[name] for name in names)


def _from_datasets(source: str) -> str:
    require("datasets", source)
    import datasets

    name, split, column = [*source.removeprefix("hf:").split(":"), "", ""][:3]
    name, _, configuration = name.partition("@")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
        parts: list[str] = []
        size = 0
        for row in rows:
            parts.append(str(row[column or "text"]))
            size += len(parts[-1])
            if size > MAX_TEXT_BYTES:
                break
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: datasets could not load it ({reason}); use a local text file instead") from error
    return "\n\n".join(parts)


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    from sparsify.model import quiet

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); give token ids as FILE.safetensors:KEY instead"
        ) from error


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces that end at a line: a tokenizer needs about a hundred times the memory of its text."""
    start = 0
    while start < len(text):
        end = start + _PIECE if start + _PIECE >= len(text) else text.rfind("\n", start, start + _PIECE) + 1
        if end <= start:
            end = start + _PIECE
        yield text[start:end]
        start = end


def _cut(
    text: str,
    source: str,
    folder: Path,
    n_windows: int,
    length: int,
    split: Split,
    seed: int,
    bos: bool | None,
    stride: int | None,
    trust_remote_code: bool,
) -> Windows:
    from sparsify.model import quiet

    tokenizer = _tokenizer(folder, trust_remote_code)
    with quiet():
        ids = np.concatenate(
            [
                np.asarray(tokenizer(piece, add_special_tokens=False)["input_ids"], dtype=np.int64)
                for piece in _pieces(text)
            ]
        )
        if bos is None:
            first = tokenizer("a")["input_ids"][:1]
            bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    if bos and tokenizer.bos_token_id is None:
        raise DataError(f"{folder}: --bos was asked for, but its tokenizer has no beginning-of-sequence token")
    body = length - int(bos)
    step = body if stride in (None, length) else stride
    if not 1 <= step <= body or (bos and step != body):
        raise DataError(f"stride {step}: want 1 to {length}; windows that start with BOS cannot overlap (--no-bos)")
    available = max(0, (len(ids) - body) // step + 1)
    if available < n_windows:
        raise DataError(
            f"{source}: {len(ids)} tokens make {available} windows of {length}; {n_windows} windows need "
            f"{(n_windows - 1) * step + body} tokens: give more text, or fewer or shorter windows"
        )
    rows = np.lib.stride_tricks.sliding_window_view(ids, body)[::step][:available]
    if split == "calibration":
        chosen = np.sort(np.random.default_rng(seed).permutation(available)[:n_windows])
        rows = rows[chosen]
    else:
        rows = rows[:n_windows]
    if bos:
        rows = np.concatenate([np.full((n_windows, 1), tokenizer.bos_token_id, dtype=np.int64), rows], axis=1)
    return Windows(np.ascontiguousarray(rows), source, bos, seed if split == "calibration" else None)


def _sample_from_model(
    folder: Path,
    n_windows: int,
    length: int,
    seed: int,
    trust_remote_code: bool,
) -> tuple[NDArray[np.int64], bool]:
    """Windows sampled from the model's own distribution, from BOS, or a random token where there is none (False).

    The whole model is in memory for this, in the dtype of its checkpoint.
    """
    import torch

    from sparsify.model import load_model

    model = load_model(folder, "auto", trust_remote_code=trust_remote_code)
    generator = torch.Generator().manual_seed(seed)
    start = model.config.get_text_config().bos_token_id
    if start is not None and not (isinstance(start, int) and 0 <= start < model.get_input_embeddings().num_embeddings):
        raise DataError(f"{folder / 'config.json'}: bos_token_id {start!r} is no token of the vocabulary; mend it")
    columns = []
    with torch.inference_mode():
        if start is None:
            token = torch.randint(model.get_input_embeddings().num_embeddings, (n_windows, 1), generator=generator)
        else:
            token = torch.full((n_windows, 1), int(start))
        columns.append(token)
        past = None
        for _ in range(length - 1):
            output = model(input_ids=token, past_key_values=past, use_cache=True)
            past = output.past_key_values
            probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1)
            if not torch.isfinite(probabilities).all():
                raise DataError(f"{folder}: the model's own probabilities are NaN; it cannot sample calibration text")
            token = torch.multinomial(probabilities, 1, generator=generator)
            columns.append(token)
    ids: NDArray[np.int64] = torch.cat(columns, dim=1).numpy()
    return ids, start is not None

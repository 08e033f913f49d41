"""Texts as token ids: tokenised once, kept flat, padded only to the longest row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]
_TEXTS_PER_CALL = 1024


@dataclass(frozen=True)
class Tokens:
    """N tokenised rows in one flat array: row i is ids[offsets[i]:offsets[i + 1]]. 4 bytes a token, 5 for pairs."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    segments: NDArray[np.int8] | None
    """token_type_ids, for pairs and tokenizers that know them."""
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, special tokens included; shape (N,)."""
        return np.diff(self.offsets)

    def batch(self, rows: Tensor | NDArray[Any]) -> dict[str, Tensor]:
        """The model's arguments for these rows, padded on the right to the longest: int64, shape (len(rows), longest).

        rows: row numbers, shape (B,), in the order wanted. Raises IndexError for a row that does not exist.
        """
        rows = np.asarray(rows, dtype=np.int64)
        starts = self.offsets[:-1][rows]
        lengths = self.offsets[1:][rows] - starts
        columns = np.arange(lengths.max(initial=0))
        present = columns < lengths[:, None]
        places = np.where(present, starts[:, None] + columns, 0)
        batch = {
            "input_ids": np.where(present, self.ids[places], self.pad_token_id).astype(np.int64),
            "attention_mask": present.astype(np.int64),
        }
        if self.segments is not None:
            batch["token_type_ids"] = np.where(present, self.segments[places], 0).astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def tokenise(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Tokens:
    """Tokenise N texts, or N pairs, cut to the tokenizer's `model_max_length`, the longer text of a pair first.

    progress: called with the number of rows done, about every thousand rows; what it raises ends the work.
    """
    with_segments = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    ids: list[NDArray[np.int32]] = []
    lengths: list[NDArray[np.int64]] = []
    segments: list[NDArray[np.int8]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = slice(start, start + _TEXTS_PER_CALL)
        encoded = tokenizer(
            list(texts[chunk]),
            None if pairs is None else list(pairs[chunk]),
            truncation="longest_first",
            max_length=tokenizer.model_max_length,
            return_attention_mask=False,
            return_token_type_ids=with_segments,
        )
        lengths.append(np.fromiter(map(len, encoded["input_ids"]), np.int64))
        ids.append(_flat(encoded["input_ids"], np.int32))
        if with_segments:
            segments.append(_flat(encoded["token_type_ids"], np.int8))
        if progress is not None:
            progress(min(chunk.stop, len(texts)))
    empty = np.zeros(0, np.int64)
    return Tokens(
        ids=np.concatenate([empty.astype(np.int32), *ids]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([empty, *lengths]))]),
        segments=np.concatenate([empty.astype(np.int8), *segments]) if with_segments else None,
        pad_token_id=tokenizer.pad_token_id,
    )


def length_sorted_batches(lengths: NDArray[np.int64], rows: NDArray[Any], tokens_per_batch: int) -> list[Rows]:
    """Cut `rows` into batches of rows of like length, each at most `tokens_per_batch` tokens once it is padded.

    lengths: of all rows, shape (N,). rows: the row numbers wanted, any order. A row longer than the budget is a batch
    of its own. The longest rows come first, so that a batch that does not fit in memory is met at once.
    """
    rows = np.asarray(rows, dtype=np.int64)
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    batches = []
    start = 0
    while start < len(rows):
        size = max(1, tokens_per_batch // max(1, int(lengths[rows[start]])))
        batches.append(rows[start : start + size])
        start += size
    return batches


def _flat(sequences: list[list[int]], dtype: type) -> NDArray[Any]:
    return np.fromiter((token for sequence in sequences for token in sequence), dtype)

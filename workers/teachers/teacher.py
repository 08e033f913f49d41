"""What every teacher is: something that says, for each row, how probable each label is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from app.options import Label
from app.pretrained import Source


@dataclass(frozen=True)
class Row:
    """One row to label. The last three fields are what the dataset itself says; only the dataset teacher reads them."""

    text: str
    text_pair: str | None = None
    label: str | None = None
    confidence: float | None = None
    distribution: dict[str, float] | None = None


@dataclass(frozen=True)
class Labeled:
    """A teacher's answers, in the order of the rows."""

    probabilities: np.ndarray
    """(N, C) float32; rows sum to 1. A row of NaN could not be labeled."""
    tokens: np.ndarray
    """(N,) int32; the tokens the teacher read for each row."""
    errors: dict[int, str]
    """Why a row could not be labeled, by its index."""


class Teacher(Protocol):
    """Made once for a job, then asked shard by shard; an answer depends on its own row alone."""

    confidence_method: str
    """How the probabilities came about, e.g. "cosine_softmax"."""
    cacheable: bool
    """Whether equal texts get equal answers, whatever dataset they stand in."""

    def __init__(self, options: Any, labels: list[Label], source: Source | None) -> None: ...

    def label(self, rows: list[Row]) -> Labeled: ...

    def report(self) -> dict[str, Any]:
        """What the job should record about this teacher."""
        ...

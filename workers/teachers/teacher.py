"""What every teacher is: something that says, for each row, how probable each label is."""

from __future__ import annotations

from collections.abc import Callable
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
    cost: float | None = None
    """What these answers cost; null where the teacher has no price."""
    unasked: frozenset[int] = frozenset()
    """Rows without an answer or an error, because of what `ended` says; NaN in `probabilities`."""
    ended: Exception | None = None
    """What kept the teacher from going on: the rows that have an answer are kept, then this is raised."""


class TeacherAway(Exception):
    """The teacher cannot be asked for a while; the rows are to wait. The message has the reason."""


class AskedToStop(Exception):
    """The worker is stopping, has lost its shard, or the job is paused; the teacher has left the rest of the rows."""


def never() -> bool:
    """For a teacher that nobody asks to stop."""
    return False


class Teacher(Protocol):
    """Made once for a job, then asked shard by shard; an answer depends on its own row alone."""

    cacheable: bool
    """Whether equal texts get equal answers, whatever dataset they stand in."""
    should_stop: Callable[[], bool]
    """Set by the shard's worker. A teacher that takes long asks it between batches; then `label` ends with AskedToStop."""

    def __init__(self, options: Any, labels: list[Label], source: Source | None) -> None: ...

    @property
    def confidence_method(self) -> str:
        """How the probabilities came about, e.g. "cosine_softmax"; "none": they are 1 at the label and say no more."""
        ...

    def label(self, rows: list[Row]) -> Labeled: ...

    def report(self) -> dict[str, Any]:
        """What the job should record about this teacher."""
        ...

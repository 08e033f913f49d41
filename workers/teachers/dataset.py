"""The teacher that repeats what the dataset already says: a label, a label and a confidence, or a distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from app import options as spec
from app.options import Label
from app.pretrained import Source
from workers.teachers.teacher import Labeled, Row, never

TOLERANCE = 1e-6


class DatasetTeacher:
    """Labels hang on the row, not on its text, so equal texts may get different answers."""

    confidence_method = "dataset"
    cacheable = False

    def __init__(self, options: spec.DatasetTeacher, labels: list[Label], source: Source | None = None) -> None:
        self.should_stop = never
        self._default_confidence = options.default_confidence
        self._index = {label.name: number for number, label in enumerate(labels)}

    def label(self, rows: list[Row]) -> Labeled:
        """The rows' own distributions, shape (N, C); a row that has none, or an impossible one, becomes an error."""
        probabilities = np.full((len(rows), len(self._index)), np.nan, np.float32)
        errors: dict[int, str] = {}
        for number, row in enumerate(rows):
            try:
                probabilities[number] = self._distribution(row)
            except Unlabelable as error:
                errors[number] = str(error)
        return Labeled(probabilities, np.zeros(len(rows), np.int32), errors)

    def report(self) -> dict[str, Any]:
        return {"mode": "dataset", "default_confidence": self._default_confidence}

    def _distribution(self, row: Row) -> np.ndarray:
        if row.distribution is not None:
            return self._given(row.distribution)
        if row.label is None:
            raise Unlabelable("row has no label")
        return self._around(row.label, self._default_confidence if row.confidence is None else row.confidence)

    def _given(self, distribution: dict[str, float]) -> np.ndarray:
        """The row's distribution over the job's labels; those it does not name get 0."""
        probabilities = np.zeros(len(self._index))
        for name, mass in distribution.items():
            if not (math.isfinite(mass) and mass >= 0):
                raise Unlabelable(f"distribution gives {name!r} {mass}; a probability is a number from 0 to 1")
            if name in self._index:
                probabilities[self._index[name]] = mass
            elif mass > TOLERANCE:
                raise Unlabelable(f"distribution gives {mass:g} to {name!r}, which is not one of the job's labels")
        total = probabilities.sum()
        if abs(total - 1) > 1e-3:
            raise Unlabelable(f"distribution sums to {total:g}; it must sum to 1")
        return probabilities / total

    def _around(self, name: str, confidence: float) -> np.ndarray:
        """`confidence` on one label, the rest spread evenly over the others."""
        classes = len(self._index)
        if name not in self._index:
            raise Unlabelable(f"label {name!r} is not one of the job's labels")
        if not (math.isfinite(confidence) and confidence <= 1):
            raise Unlabelable(f"confidence {confidence} is not a probability from 0 to 1")
        # At 1/C or below, another label would be as probable or more, and the row would teach what it does not say.
        if confidence <= 1 / classes + TOLERANCE:
            raise Unlabelable(
                f"confidence {confidence:g} is not above {1 / classes:.3g} (1 over {classes} labels), so {name!r} would "
                "not be the most probable label; give a distribution instead"
            )
        probabilities = np.full(classes, (1 - confidence) / (classes - 1))
        probabilities[self._index[name]] = confidence
        return probabilities


class Unlabelable(Exception):
    """The row holds no usable label."""

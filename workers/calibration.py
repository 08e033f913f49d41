"""The confidence of a teacher, made honest on the labeled validation rows before training reads it.

The stored answers and the label cache keep what the teacher said; the temperature is applied when they are read, so a
job that calibrates otherwise asks for no label again, and every worker finds the same temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.algorithms import abstention, calibration
from workers.algorithms.metrics import expected_calibration_error

MIN_ROWS = 32
"""Validation rows with a true label and an answer; fewer say too little about a confidence."""


def measure(probabilities: NDArray[np.float32], gold: Sequence[str | None], labels: Sequence[str]) -> dict[str, Any]:
    """What the validation rows say about the teacher's confidence: (N, C) distributions and true names -> a report.

    `temperature` is fitted on all rows, or null if they are too few. The figures `after` are of rows that the temperature was
    not fitted on: each half is scaled by the temperature of the other half.
    """
    ids = {name: index for index, name in enumerate(labels)}
    known = [row for row, name in enumerate(gold) if name in ids and not np.isnan(probabilities[row, 0])]
    if len(known) < MIN_ROWS:
        return {"rows": len(known), "temperature": None, "reason": f"fewer than {MIN_ROWS} validation rows are labeled"}
    before = torch.from_numpy(probabilities[known]).double()
    truth = torch.tensor([ids[str(gold[row])] for row in known])
    even = torch.arange(len(known)) % 2 == 0
    after = torch.empty_like(before)
    for half in (even, ~even):
        after[half] = abstention.soften(before[half], _temperature(before[~half], truth[~half]))
    return {
        "rows": len(known),
        "temperature": _temperature(before, truth),
        "before": _figures(before, truth),
        "after": _figures(after, truth),
        "per_class": _per_class(before, after, truth, labels),
    }


def rescale(answers: pa.Table, temperature: float) -> pa.Table:
    """The answers with every distribution scaled and its confidence; a row without an answer stays without."""
    column = answers.column("distribution").combine_chunks()
    valid = np.asarray(column.is_valid())
    if not valid.any():
        return answers
    given = np.asarray(column.drop_null().flatten(), np.float32).reshape(valid.sum(), -1)
    scaled = abstention.soften(torch.from_numpy(given.copy()), temperature).float().numpy()
    distributions: list[list[float] | None] = [None] * len(valid)
    confidences: list[float | None] = [None] * len(valid)
    for row, distribution in zip(np.flatnonzero(valid), scaled, strict=True):
        distributions[row], confidences[row] = distribution.tolist(), float(distribution.max())
    for name, values in (("distribution", distributions), ("confidence", confidences)):
        position = answers.schema.get_field_index(name)
        answers = answers.set_column(
            position, answers.schema.field(name), pa.array(values, answers.schema.field(name).type)
        )
    return answers


def _temperature(probabilities: Tensor, truth: Tensor) -> float:
    """Rounded, so that machines which differ in the last bits agree."""
    return round(abstention.fit_temperature(probabilities, truth), 4)


def _figures(probabilities: Tensor, truth: Tensor) -> dict[str, Any]:
    bins = calibration.reliability(probabilities, truth)
    return {
        "expected_calibration_error": round(expected_calibration_error(probabilities, truth), 4),
        "log_loss": round(calibration.log_loss(probabilities, truth), 4),
        "reliability": [
            {
                "up_to": round((number + 1) / len(bins), 2),
                "rows": rows,
                "confidence": round(sure, 4),
                "accuracy": round(hit, 4),
            }
            for number, (rows, sure, hit) in enumerate(bins)
            if rows
        ],
    }


def _per_class(before: Tensor, after: Tensor, truth: Tensor, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each class that the teacher gave: how many rows, how sure it was of them, and how often it was right."""
    predicted = before.argmax(dim=1)
    classes: dict[str, dict[str, Any]] = {}
    for number in predicted.unique().tolist():
        mine = predicted == number
        classes[labels[number]] = {
            "rows": int(mine.sum()),
            "confidence_before": round(float(before[mine, number].mean()), 4),
            "confidence_after": round(float(after[mine, number].mean()), 4),
            "accuracy": round(float((truth[mine] == number).double().mean()), 4),
        }
    return classes

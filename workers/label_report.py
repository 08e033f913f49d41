"""The label report: how good are the teacher's labels, as far as can be told, and which rows should a person look at?

Counts, confidence and calibration hold for all labeled rows. Two lists name rows: labels that are probably wrong, by
confident learning (Northcutt et al. 2021, the library cleanlab), and texts that are almost the same but labeled
differently. Texts are cut and lists bounded, so the report stays small whatever the dataset.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

CONFIDENCE_BINS = 10
MOST_ROWS = 100
"""Of each list."""
MOST_CHARACTERS = 300
"""Of a text in a list."""
MOST_CONFUSIONS = 20
MOST_SCORED = 5000
"""Rows the student is asked about for the first list."""
FEWEST_SCORED = 20
MOST_COMPARED = 20_000
"""Rows compared with each other for the second list."""
SIMILARITY = 0.7
"""Jaccard similarity of two texts' word pairs from which on they are near-duplicates."""
PERMUTATIONS = 64
MOST_CANDIDATES = 50
"""Of near-duplicates looked at for one text: a template that thousands of rows follow would need millions of looks."""


@dataclass(frozen=True)
class Rows:
    """The N rows of a split and what the teacher said about them."""

    texts: Sequence[str]
    lines: Sequence[int | None]
    probabilities: NDArray[np.float32]
    """(N, C); NaN where the row is not labeled."""
    gold: Sequence[str | None]

    @property
    def labeled(self) -> NDArray[np.int64]:
        """The rows that are labeled, ascending."""
        return np.flatnonzero(~np.isnan(self.probabilities[:, 0]))

    def told(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        """One row of a list."""
        text, probabilities = self.texts[row], self.probabilities[row]
        best = int(probabilities.argmax())
        return {
            "row": int(row),
            "line": self.lines[row],
            "text": text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…",
            "label": names[best],
            "confidence": round(float(probabilities[best]), 4),
        }


def report(
    train: Rows, held_out: dict[str, Rows], names: Sequence[str], confidence_method: str | None,
    never_trained: NDArray[np.bool_], predict: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    check: Callable[[], object] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """The report of a label set.

    held_out: validation and test rows, where the teacher labeled them. names: the C labels. never_trained: (N,) rows
    whose labels the student's weights have never seen. predict: the student's probabilities, (M, C), for M train rows.
    check: called about every thousand texts; what it raises ends the work.
    """
    labeled = train.labeled
    counts = np.bincount(train.probabilities[labeled].argmax(axis=1), minlength=len(names))
    splits = {"train": train, **held_out}
    knows_confidence = confidence_method != "none"
    return {
        "rows": len(train.texts),
        "rows_labeled": len(labeled),
        "class_counts": dict(zip(names, counts.tolist(), strict=True)),
        "confidence": _confidence(train.probabilities[labeled], confidence_method) if knows_confidence else None,
        "gold": {
            split: _against_gold(rows, names, knows_confidence) if confidence_method != "dataset" else None
            for split, rows in splits.items()
        },
        "likely_wrong": likely_wrong(train, names, never_trained, predict),
        "near_duplicates": near_duplicates(train, names, check),
    }


def _confidence(probabilities: NDArray[np.float32], method: str | None) -> dict[str, Any]:
    confidence = probabilities.max(axis=1)
    rows = np.bincount(_bin_of(confidence), minlength=CONFIDENCE_BINS + 1)[1:]
    return {
        "method": method,
        "mean": round(float(confidence.mean()), 4) if len(confidence) else None,
        "histogram": [
            {"from": number / CONFIDENCE_BINS, "to": (number + 1) / CONFIDENCE_BINS, "rows": count}
            for number, count in enumerate(rows.tolist())
        ],
    }


def _bin_of(confidence: NDArray[np.float32]) -> NDArray[np.int64]:
    """(N,) the bin of each confidence, from 1 for (0, 0.1] to 10 for (0.9, 1]."""
    return np.clip(np.ceil(confidence * CONFIDENCE_BINS), 1, CONFIDENCE_BINS).astype(np.int64)


def _against_gold(rows: Rows, names: Sequence[str], knows_confidence: bool) -> dict[str, Any] | None:
    """Agreement with the true labels, the commonest confusions, and calibration: ECE is the mean gap of the bins."""
    known = np.array([row for row in rows.labeled if rows.gold[row] is not None], np.int64)
    if len(known) == 0:
        return None
    said = rows.probabilities[known]
    labels = [names[index] for index in said.argmax(axis=1)]
    gold = [str(rows.gold[row]) for row in known]
    right = np.array([label == truth for label, truth in zip(labels, gold, strict=True)])
    pairs: dict[tuple[str, str], int] = {}
    for label, truth in zip(labels, gold, strict=True):
        if label != truth:
            pairs[label, truth] = pairs.get((label, truth), 0) + 1
    commonest = sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_CONFUSIONS]
    bins = reliability(said.max(axis=1), right)
    return {
        "rows": len(known),
        "agreement": round(float(right.mean()), 4),
        "confusions": [{"teacher": label, "gold": truth, "rows": count} for (label, truth), count in commonest],
        "expected_calibration_error": calibration_error(bins) if knows_confidence else None,
        "reliability": bins if knows_confidence else None,
    }


def reliability(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Mean confidence and accuracy of N rows, (N,) each, in bins of confidence (0, 0.1] to (0.9, 1]; empty ones left out."""
    bin_of_row = _bin_of(confidence)
    bins = []
    for number in range(1, CONFIDENCE_BINS + 1):
        inside = bin_of_row == number
        if inside.any():
            bins.append({
                "from": (number - 1) / CONFIDENCE_BINS,
                "to": number / CONFIDENCE_BINS,
                "rows": int(inside.sum()),
                "confidence": round(float(confidence[inside].mean()), 4),
                "accuracy": round(float(right[inside].mean()), 4),
            })  # fmt: skip
    return bins


def calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Mean |accuracy - confidence| over the bins, weighted by rows (Guo et al., arXiv:1706.04599)."""
    gaps = sum(entry["rows"] * abs(entry["accuracy"] - entry["confidence"]) for entry in bins)
    return round(gaps / sum(entry["rows"] for entry in bins), 4)


# --- labels that are probably wrong ---------------------------------------------------------------------------------


def likely_wrong(
    train: Rows, names: Sequence[str], never_trained: NDArray[np.bool_],
    predict: Callable[[NDArray[np.int64]], NDArray[np.float32]],
) -> dict[str, Any]:  # fmt: skip
    """Rows whose label the student contradicts, most doubtful first, by confident learning.

    Confident learning needs predictions by a model that has not seen the row's label. Those are the rows that the rule
    never selected, of which at most MOST_SCORED, spread over the dataset, are scored; a student trained on every row
    has none, and training several on parts of the rows would cost as many trainings.
    """
    labeled = train.labeled
    unseen = labeled[never_trained[labeled]]
    answer: dict[str, Any] = {
        "method": "cleanlab on the student's probabilities for rows it was never trained on",
        "rows_scored": 0,
        "found": 0,
        "rows": [],
        "reason": None,
    }
    if len(unseen) > MOST_SCORED:
        unseen = unseen[np.arange(MOST_SCORED) * len(unseen) // MOST_SCORED]
    given = train.probabilities[unseen].argmax(axis=1)
    if len(unseen) < FEWEST_SCORED or len(np.unique(given)) < 2:
        answer["reason"] = (
            f"Of {len(labeled)} labeled rows the student was never trained on {len(unseen)}; at least {FEWEST_SCORED} of "
            "two labels are needed to tell anything out of sample."
        )
        return answer
    from cleanlab.filter import find_label_issues  # takes seconds to import

    probabilities = predict(unseen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with few rows, which it then leaves alone
        found = find_label_issues(given, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    answer["rows_scored"], answer["found"] = len(unseen), len(found)
    for place in found[:MOST_ROWS]:
        suggested = int(probabilities[place].argmax())
        answer["rows"].append({
            **train.told(unseen[place], names),
            "suggested": names[suggested],
            "student_probability": round(float(probabilities[place, suggested]), 4),
        })  # fmt: skip
    return answer


# --- texts that are almost the same ---------------------------------------------------------------------------------


def near_duplicates(train: Rows, names: Sequence[str], check: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Pairs of rows whose texts are almost the same and whose labels differ, most similar first.

    Similar is a Jaccard similarity of the sets of word pairs of at least SIMILARITY; candidates are found by MinHash
    (Broder 1997, the library datasketch) and then compared exactly. The first MOST_COMPARED labeled rows are compared.
    """
    compared = train.labeled[:MOST_COMPARED]
    labels = train.probabilities.argmax(axis=1) if len(compared) else np.zeros(0, np.int64)
    firsts: dict[frozenset[str], dict[int, int]] = {}
    for row in compared:
        firsts.setdefault(shingles(train.texts[row]), {}).setdefault(int(labels[row]), int(row))
    pairs: list[tuple[float, int, int]] = []
    for rows in firsts.values():
        one, *others = rows.values()
        pairs += [(1.0, one, other) for other in others]
    pairs += _similar(firsts, check)
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return {
        "rows_compared": len(compared),
        "similarity": SIMILARITY,
        "found": len(pairs),
        "pairs": [
            {"similarity": round(similarity, 4), "rows": [train.told(row, names) for row in rows]}
            for similarity, *rows in pairs[:MOST_ROWS]
        ],
    }


def _similar(firsts: dict[frozenset[str], dict[int, int]], check: Callable[[], object]) -> list[tuple[float, int, int]]:
    """Pairs of different texts: similarity, and a row of each that differ in label."""
    texts = [text for text in firsts if text]
    index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    found: list[tuple[float, int, int]] = []
    for number, text in enumerate(texts):
        if number % 1000 == 0:
            check()
        hashed = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32)
        hashed.update_batch([shingle.encode() for shingle in sorted(text)])
        for other in sorted(index.query(hashed))[:MOST_CANDIDATES]:
            similarity = len(text & texts[other]) / len(text | texts[other])
            differing = next(
                (
                    (here, there)
                    for label, here in firsts[text].items()
                    for other_label, there in firsts[texts[other]].items()
                    if label != other_label
                ),
                None,
            )
            if similarity >= SIMILARITY and differing is not None:
                found.append((similarity, min(differing), max(differing)))
        index.insert(number, hashed, check_duplication=False)
    return found


def shingles(text: str) -> frozenset[str]:
    """The pairs of neighbouring words, without case and punctuation; the words themselves where there are fewer than three."""
    words = re.findall(r"\w+", text.casefold())
    return frozenset(words if len(words) < 3 else (f"{one} {two}" for one, two in pairwise(words)))


# --- the short form -------------------------------------------------------------------------------------------------


def summary(full: dict[str, Any]) -> dict[str, Any]:
    """The figures without the rows: for the model card, which is passed on and must not carry texts."""
    gold = full["gold"]
    return {
        "rows_labeled": full["rows_labeled"],
        "class_counts": full["class_counts"],
        "mean_confidence": full["confidence"]["mean"] if full["confidence"] else None,
        "agreement_with_gold": {split: scores["agreement"] for split, scores in gold.items() if scores},
        "expected_calibration_error": {
            split: scores["expected_calibration_error"] for split, scores in gold.items() if scores
        },
        "likely_wrong": {name: full["likely_wrong"][name] for name in ("rows_scored", "found")},
        "near_duplicates_with_different_labels": full["near_duplicates"]["found"],
    }

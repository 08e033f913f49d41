"""What a trainer sees of the waves of labels: which one it trains on, and what its student has shown."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2_contingency
from sklearn.metrics import cohen_kappa_score

from app.models import Job, LabelShard
from app.statistics import paired_bootstrap
from app.storage import Storage
from app.waves import CERTAINTY
from workers.training import resume
from workers.training.run import Run

MENDED_BY_MORE_ROWS = {"teacher_constant", "nothing_to_train_on", "nothing_to_choose_by", "nothing_to_feed_back"}
"""Failures that say that a wave is too small to train on, as long as another follows."""
DRIFT = 1e-4
"""Two waves are mixed differently when so large a difference between their labels had this probability by chance."""
LEARNED = 0.1
"""Cohen's kappa of a student's answers and the true classes below which it has learned nothing to be compared by."""


@dataclass(frozen=True)
class Wave:
    """The last wave that is labeled."""

    number: int
    """From 1."""
    first: int
    """Its first train row."""
    rows: int
    """Train rows asked about so far, those of earlier waves included."""
    of_rows: int
    """Train rows in all."""
    is_followed: bool
    """Whether there are train rows nobody was asked about."""


def current(history: Sequence[dict[str, Any]], shards: Sequence[LabelShard]) -> Wave:
    """The wave that a training of these labels belongs to, after those that are recorded; without waves, the only one.

    A number is never trained under twice with other labels, so that the state it saved is known by it.
    """
    train = [shard for shard in shards if shard.split == "train"]
    asked = [shard for shard in train if shard.status == "done"]
    last = max((shard.wave for shard in asked), default=1)
    has_stopped = bool(history) and history[-1]["stopped"] is not None
    return Wave(
        number=len(history) if has_stopped else len(history) + 1,
        first=min((shard.start for shard in asked if shard.wave == last), default=0),
        rows=sum(shard.stop - shard.start for shard in asked),
        of_rows=sum(shard.stop - shard.start for shard in train),
        is_followed=any(shard.status == "withheld" for shard in train),
    )


def shown(
    wave: Wave, probabilities: NDArray[np.float32], run: Run | None, gain_at_most: float | None = None
) -> dict[str, Any]:
    """What shards.end_wave records, and app.waves.reason_to_stop reads; without a run nothing could be trained.

    probabilities: (N, C) the teacher's distributions over the train rows; NaN where there is none.
    """
    return {
        "wave": wave.number,
        "rows": wave.rows,
        "epochs": None if run is None else run.progress.epoch,
        "selected": 0 if run is None else int((run.ledger.selected > 0).sum()),
        "macro_f1": None if run is None else run.progress.best_metrics["validation_macro_f1"],
        "gain_at_most": gain_at_most,
        "drifted": wave.first > 0 and drifted(probabilities[: wave.first], probabilities[wave.first :]),
    }


def gain_since(
    job: Job, wave: Wave, files: Storage, answers: NDArray[np.int64], macro_f1: float, confirm: Callable[[], object]
) -> float | None:
    """How far this wave's student may be above that of the last wave that has a score; None where that cannot be told.

    answers: as `gain_at_most` takes them; they are left in the storage for the next wave. `confirm` as in Storage.put.
    """
    content = io.BytesIO()
    np.save(content, answers)
    files.put_bytes(_key(job.id, wave.number), content.getvalue(), confirm=confirm)
    scored = [known for known in job.waves if known["wave"] < wave.number and known["macro_f1"] is not None]
    if not scored:
        return None
    before = np.load(io.BytesIO(files.read(_key(job.id, scored[-1]["wave"]))), allow_pickle=False)
    if np.array_equal(before[:2], answers[:2]):
        return gain_at_most(before, answers)
    return float(macro_f1 - scored[-1]["macro_f1"])


def _key(job_id: str, wave: int) -> str:
    return f"{resume.folder(job_id)}/wave-{wave}.npy"


def gain_at_most(before: NDArray[np.int64], after: NDArray[np.int64]) -> float | None:
    """Upper end of the gain in macro-F1, with CERTAINTY, by a bootstrap that draws the same rows for both students.

    before, after: (3, V) number, true class and answer of each validation row; the first two are the same. None where the
    later student is at chance: one that has learned nothing, for want of steps say, tells nothing of what labels add.
    """
    if not cohen_kappa_score(after[1], after[2]) >= LEARNED:  # NaN where all is one class
        return None
    return paired_bootstrap(before[1], [before[2]], [after[2]], level=2 * CERTAINTY - 1)["macro_f1"][2]


def drifted(before: NDArray[np.float32], after: NDArray[np.float32]) -> bool:
    """Whether the labels of two stretches of rows are mixed differently, beyond chance, as in a file sorted by label.

    (N, C) and (M, C) distributions; NaN where there is none. By the chi-squared test of their counts.
    """
    classes = before.shape[1]
    counts = np.array(
        [
            np.bincount(stretch[~np.isnan(stretch[:, 0])].argmax(axis=1), minlength=classes)
            for stretch in (before, after)
        ]
    )
    counts = counts[:, counts.any(axis=0)]
    if not counts.any(axis=1).all():
        return False
    return bool(chi2_contingency(counts).pvalue < DRIFT)

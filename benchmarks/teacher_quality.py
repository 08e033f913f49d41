"""How good the embedding teacher is, and how honest its confidence: accuracy, macro-F1 and ECE on public data sets.

    python -m benchmarks.teacher_quality [data set …]

Examples come from the train rows (a draw per seed, the same number for each class), scores from 2,000 test rows.
ECE before is that of the last layer's regression alone, as it comes; ECE is what the teacher says.
"""

from __future__ import annotations

import sys
from typing import ClassVar

import numpy as np
import torch
from scipy.special import softmax
from sklearn.metrics import f1_score

from app import pretrained
from app.options import EmbeddingTeacher, Example, Label
from benchmarks.data import SHARED, read_split
from workers.algorithms import metrics
from workers.teachers import Row, embedding

DATA_SETS = ("emotion", "csabstruct", "yahoo-answers-titles", "banking77")
EXAMPLES_A_CLASS = (0, 8, 16, 32)
SEEDS = 3
TEST_ROWS = 2000


def main(names: list[str]) -> None:
    if not SHARED.is_dir():
        print(f"teacher_quality: skipped, the data sets are not at {SHARED}")
        return
    print("| data set | examples a class | accuracy | macro-F1 | ECE before | ECE |\n|---|---|---|---|---|---|")
    for name in names or DATA_SETS:
        for count in EXAMPLES_A_CLASS:
            scores = np.array([measure(name, count, seed) for seed in range(SEEDS if count else 1)])
            accuracy, f1, before, after = scores.mean(axis=0)
            spread = f" ± {100 * scores[:, 0].std(ddof=1):.1f}" if count else ""
            print(
                f"| {name} | {count} | {100 * accuracy:.1f}{spread} | {100 * f1:.1f} | {before:.3f} | {after:.3f} |",
                flush=True,
            )


def measure(name: str, count: int, seed: int) -> tuple[float, float, float, float]:
    """Accuracy, macro-F1, ECE before calibration and after."""
    train, test = read_split(name, "train"), read_split(name, "test")
    names = sorted({row["label"] for row in train})
    draw = np.random.default_rng(seed)
    train = [train[number] for number in draw.permutation(len(train))]
    examples = [row for label in names for row in [row for row in train if row["label"] == label][:count]]
    test = [test[number] for number in np.random.default_rng(0).permutation(len(test))[:TEST_ROWS]]
    source = pretrained.resolve(pretrained.BUNDLED, purpose="encoder_teacher", roots=[], allow_hub=False)
    options = EmbeddingTeacher(kind="embedding", examples=[Example(**row) for row in examples])
    # A data set's names are written for programs; a client would describe the labels in words.
    labels = [Label(name=n, description=n.replace("_", " ")) for n in names]
    teacher = embedding.EmbeddingTeacher(options, labels, source)
    rows = [Row(row["text"], row.get("text_pair")) for row in test]
    truth = np.array([names.index(row["label"]) for row in test])
    probabilities = teacher.label(rows).probabilities
    chosen = probabilities.argmax(axis=1)
    f1 = f1_score(truth, chosen, average="macro", labels=np.arange(len(names)), zero_division=0)
    before, after = (
        metrics.expected_calibration_error(torch.from_numpy(said), torch.from_numpy(truth))
        for said in (uncalibrated(teacher, rows), probabilities)
    )
    return float((chosen == truth).mean()), f1, before, after


def uncalibrated(teacher: embedding.EmbeddingTeacher, rows: list[Row]) -> np.ndarray:
    head = teacher._head
    if head is None:
        return teacher.label(rows).probabilities
    views, _, _ = teacher._look_at([(row.text, row.text_pair) for row in rows])
    return softmax(views[0] @ head.coefficients[0] + head.biases[0], axis=1)


class RememberingEncoder(embedding.Encoder):
    """Embeds the same test rows once, not once for each draw of examples."""

    seen: ClassVar[dict[int, embedding.Embedded]] = {}

    def embed(self, texts: list[str]) -> embedding.Embedded:
        key = hash(tuple(texts))
        if key not in self.seen:
            self.seen[key] = super().embed(texts)
        return self.seen[key]


if __name__ == "__main__":
    embedding.Encoder = RememberingEncoder  # type: ignore[misc]
    main(sys.argv[1:])

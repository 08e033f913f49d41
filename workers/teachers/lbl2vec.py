"""The teacher that finds out from the unlabeled texts where each label lies: Lbl2TransformerVec (Schopf et al. 2022).

Published code adds outlier cleaning, which does nothing for sentence embeddings, and takes one text a label by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from app import options as spec
from app.options import Label
from app.pretrained import Source
from workers.teachers.embedding import ZERO_SHOT_TEMPERATURE, Encoder
from workers.teachers.teacher import Labeled, Row, never


class Lbl2VecTeacher:
    """softmax(cosine(text, label) / temperature), where a label is the centroid of the texts nearest to its keywords."""

    confidence_method = "cosine_softmax"
    cacheable = True

    def __init__(self, options: spec.Lbl2VecTeacher, labels: list[Label], source: Source | None) -> None:
        if source is None:
            raise ValueError("this teacher needs the model it embeds with")
        self.should_stop: Callable[[], bool] = never
        self._encoder = Encoder(source, lambda: self.should_stop())
        self._options = options
        self._labels = np.stack([self._mean(self._keywords(label)) for label in labels])
        """(C, D) unit vectors: of the keywords, and once it has learned, of the labels."""
        self._counts: list[int] = []
        self.documents = options.documents
        """How many rows `learn` is to be given at most."""

    def learn(self, rows: list[Row]) -> None:
        """Take each label's vector from the texts near its keywords; to be called once, with the unlabeled rows.

        Raises AskedToStop.
        """
        texts = list(dict.fromkeys(map(_joined, rows)))
        documents = self._encoder.embed(texts).last
        found = [
            label_vector(
                documents, keywords, offset=self._options.similarity_offset, at_least=self._options.min_documents,
                at_most=self._options.max_documents,
            )
            for keywords in self._labels
        ]  # fmt: skip
        self._labels = np.stack([vector for vector, _ in found])
        self._counts = [count for _, count in found]

    def label(self, rows: list[Row]) -> Labeled:
        """Probabilities (N, C) for N rows; no row is refused. Raises AskedToStop."""
        if not rows:
            return Labeled(np.zeros((0, len(self._labels)), np.float32), np.zeros(0, np.int32), {})
        read = self._encoder.embed([_joined(row) for row in rows])
        similarity = read.last @ self._labels.T
        probabilities = softmax(similarity / (self._options.temperature or ZERO_SHOT_TEMPERATURE), axis=1)
        return Labeled(probabilities.astype(np.float32), read.tokens, {})

    def report(self) -> dict[str, Any]:
        return {"mode": "lbl2vec", "documents_of_each_label": self._counts}

    def _keywords(self, label: Label) -> list[str]:
        words = (label.description or label.name).split(",")
        return (
            self._options.keywords.get(label.name) or [word.strip() for word in words if word.strip()] or [label.name]
        )

    def _mean(self, texts: list[str]) -> NDArray[np.float32]:
        return _unit(self._encoder.embed(texts).last.mean(axis=0))


def label_vector(
    documents: NDArray[np.float32], keywords: NDArray[np.float32], *, offset: float, at_least: int, at_most: int | None
) -> tuple[NDArray[np.float32], int]:
    """The unit centroid (D,) of the texts that count for a label, and how many they are.

    documents (N, D), keywords (D,): unit vectors. A text counts when its cosine with the keywords is at least the largest
    one less `offset`; where these are fewer than `at_least` or more than `at_most`, the nearest so many.
    """
    similarity = documents @ keywords
    nearest = np.argsort(-similarity, kind="stable")
    count = max(at_least, int((similarity >= similarity.max() - offset).sum()))
    count = min(count, at_most or count, len(documents))
    return _unit(documents[nearest[:count]].mean(axis=0)), count


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _joined(row: Row) -> str:
    return f"{row.text} {row.text_pair}" if row.text_pair else row.text

"""Which examples a language model is shown: all of them, or a choice that is balanced, diverse, or similar to the row.

A choice depends on the candidates and the options alone, and a row's prompt on the row besides: every worker makes the
same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from app import pretrained
from app.options import Example, Label, LLMTeacher
from workers.teachers.embedding import Encoder
from workers.teachers.prompts import Prompt, build_prompt

TextAndPair = tuple[str, str | None]


class Prompts:
    """The prompts of a teacher; more than one only where the examples are those similar to the row."""

    prompts: list[Prompt]

    def __init__(self, options: LLMTeacher, labels: Sequence[Label]) -> None:
        few_shot, candidates = options.few_shot, options.examples
        self._encoder: Encoder | None = None
        chosen = [list(candidates)]
        if few_shot is not None and few_shot.how == "balanced":
            chosen = [balanced(candidates, few_shot.count)]
        elif few_shot is not None and candidates:
            source = pretrained.resolve(pretrained.BUNDLED, purpose="encoder_teacher", roots=[], allow_hub=False)
            self._encoder = Encoder(source)
            vectors = self._embed([(example.text, example.text_pair) for example in candidates])
            if few_shot.how == "diverse":
                chosen = [[candidates[row] for row in diverse(vectors, few_shot.count)]]
            else:
                self._centres = centres(vectors, few_shot.clusters)
                chosen = [
                    [candidates[row] for row in nearest(vectors, centre, few_shot.count)] for centre in self._centres
                ]
        self.prompts = [build_prompt(options, labels, shown) for shown in chosen]

    def assign(self, texts: Sequence[TextAndPair]) -> list[int]:
        """Which of the prompts each text is asked under: that of the nearest centre."""
        if len(self.prompts) == 1 or not texts:
            return [0] * len(texts)
        return (self._embed(texts) @ self._centres.T).argmax(axis=1).tolist()

    def of(self, text: str, text_pair: str | None) -> Prompt:
        """The prompt of one text."""
        return self.prompts[self.assign([(text, text_pair)])[0]]

    def _embed(self, texts: Sequence[TextAndPair]) -> NDArray[np.float32]:
        assert self._encoder is not None
        return self._encoder.embed([f"{text} {pair}" if pair else text for text, pair in texts]).last


def balanced(candidates: Sequence[Example], count: int) -> list[Example]:
    """The first `count` examples when the labels take turns, each giving its examples in their order."""
    turns: dict[str, int] = {}
    order: list[tuple[int, int]] = []
    for position, example in enumerate(candidates):
        order.append((turns.get(example.label, 0), position))
        turns[example.label] = turns.get(example.label, 0) + 1
    return [candidates[position] for _, position in sorted(order)[:count]]


def diverse(vectors: NDArray[np.float32], count: int) -> list[int]:
    """Rows of unit vectors (N, D) that lie far apart: the most central one, then always the farthest from those taken."""
    taken = [int((vectors @ vectors.mean(axis=0)).argmax())]
    closeness = vectors @ vectors[taken[0]]
    while len(taken) < min(count, len(vectors)):
        closeness[taken] = np.inf
        taken.append(int(closeness.argmin()))
        closeness = np.maximum(closeness, vectors @ vectors[taken[-1]])
    return taken


def centres(vectors: NDArray[np.float32], clusters: int) -> NDArray[np.float32]:
    """(K, D) unit vectors: the centres of at most `clusters` clusters of unit vectors (N, D), by k-means from a fixed seed."""
    distinct = len(np.unique(vectors, axis=0))
    found = KMeans(n_clusters=min(clusters, distinct), random_state=0, n_init=4).fit(vectors).cluster_centers_
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def nearest(vectors: NDArray[np.float32], centre: NDArray[np.float32], count: int) -> list[int]:
    """The rows of unit vectors (N, D) nearest to a centre (D,), the nearest last, where it stands next to the row asked about."""
    return np.argsort(-(vectors @ centre), kind="stable")[:count][::-1].tolist()

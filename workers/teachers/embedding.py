"""The teacher that compares sentence embeddings: with the labels' descriptions, or by a linear head on examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sentence_transformers import SentenceTransformer

from app import options as spec
from app.options import Label
from app.pretrained import Source
from workers.teachers import linear_head
from workers.teachers.linear_head import LinearHead, View
from workers.teachers.teacher import AskedToStop, Labeled, Row, never

ZERO_SHOT_TEMPERATURE = 0.05
BATCH_SIZE = 32

TextAndPair = tuple[str, str | None]


class EmbeddingTeacher:
    """Without examples: softmax(cosine(text, label) / temperature). With examples of two labels or more: a linear head.

    A pair is embedded as one text, unless examples have pairs: then the head reads both texts and their difference.
    """

    cacheable = True

    def __init__(self, options: spec.EmbeddingTeacher, labels: list[Label], source: Source | None) -> None:
        if source is None:
            raise ValueError("an embedding teacher needs the model it embeds with")
        self.should_stop: Callable[[], bool] = never
        self._encoder = Encoder(source, lambda: self.should_stop())
        self._temperature = options.temperature or ZERO_SHOT_TEMPERATURE
        self._prompts = self._encoder.embed(
            [options.template.replace("{label}", label.description or label.name) for label in labels]
        )
        self._examples = options.examples if len({example.label for example in options.examples}) >= 2 else []
        self._pairs = any(example.text_pair is not None for example in self._examples)
        self._head = self._fit([label.name for label in labels]) if self._examples else None
        self.confidence_method = "linear_head_calibrated" if self._head else "cosine_softmax"

    def label(self, rows: list[Row]) -> Labeled:
        """Probabilities (N, C) for N rows; equal rows are embedded once. No row is refused. Raises AskedToStop."""
        texts = list(dict.fromkeys((row.text, row.text_pair) for row in rows))
        if not texts:
            return Labeled(np.zeros((0, len(self._prompts.last)), np.float32), np.zeros(0, np.int32), {})
        views, similarity, tokens = self._look_at(texts)
        if self._head:
            probabilities = self._head.probabilities(views, similarity)
        else:
            probabilities = softmax(similarity / self._temperature, axis=1)
        place = {text: number for number, text in enumerate(texts)}
        order = [place[row.text, row.text_pair] for row in rows]
        return Labeled(probabilities.astype(np.float32)[order], tokens[order], {})

    def report(self) -> dict[str, Any]:
        if self._head is None:
            return {"mode": "zero_shot", "temperature": self._temperature}
        return {
            "mode": "linear_head",
            "examples": len(self._examples),
            "pairs": self._pairs,
            "out_of_fold_accuracy": self._head.out_of_fold_accuracy,
            "inverse_regularisation": dict(zip(("last_layer", "middle_layer"), self._head.strengths, strict=False)),
            "weights": {
                **dict(zip(("last_layer", "middle_layer"), self._head.weights, strict=False)),
                "similarity": self._head.similarity_weight,
            },
        }

    def _fit(self, names: list[str]) -> LinearHead:
        views, similarity, _ = self._look_at([(example.text, example.text_pair) for example in self._examples])
        labels = np.array([names.index(example.label) for example in self._examples])
        prompts = [self._prompts.last, self._prompts.middle]
        if self._pairs:  # a description has no second half: it makes a pair with itself
            prompts = [pair_features(prompt, prompt) for prompt in prompts]
        return linear_head.fit([View(*view) for view in zip(views, prompts, strict=True)], similarity, labels)

    def _look_at(self, texts: list[TextAndPair]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The views the head reads, (N, D) each; the cosines with the prompts, (N, C); the tokens read, (N,)."""
        if not self._pairs:
            one = self._encoder.embed([f"{text} {pair}" if pair else text for text, pair in texts])
            return [one.last, one.middle], one.last @ self._prompts.last.T, one.tokens
        first = self._encoder.embed([text for text, _ in texts])
        second = self._encoder.embed([pair or "" for _, pair in texts])
        views = [pair_features(first.last, second.last), pair_features(first.middle, second.middle)]
        return views, (first.last + second.last) @ self._prompts.last.T / 2, first.tokens + second.tokens


def pair_features(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[u, v, |u - v|, u * v, u . v] (InferSent, Conneau et al. 2017, and the cosine): (N, D), (N, D) -> (N, 4 D + 1)."""
    product = first * second
    return np.hstack([first, second, np.abs(first - second), product, product.sum(axis=1, keepdims=True)])


@dataclass(frozen=True)
class Embedded:
    """Texts as unit vectors, float32, and what reading them took."""

    last: np.ndarray
    """(N, D); the model's own sentence embedding."""
    middle: np.ndarray
    """(N, H); the mean over the tokens' states half-way up. Topics show in the last layer, but how a sentence is built
    (csabstruct: method, result, background) has been averaged out there: 32 examples a class, 35 % against 47 %."""
    tokens: np.ndarray
    """(N,) int32"""


class Encoder:
    """A sentence-transformers model that also reads texts longer than its window."""

    def __init__(self, source: Source, should_stop: Callable[[], bool] = never) -> None:
        self._should_stop = should_stop
        self._model = SentenceTransformer(
            str(source.path or source.name),
            revision=source.revision if source.kind == "hub" else None,
            local_files_only=source.kind != "hub",
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
            config_kwargs={"output_hidden_states": True},
        )
        self._model.eval()

    def embed(self, texts: list[str]) -> Embedded:
        """Embed N texts; one over the window becomes the mean of its chunks (Lbl2TransformerVec, Schopf et al. 2022)."""
        pieces: list[str] = []
        owners: list[int] = []
        tokens = np.zeros(len(texts), np.int32)
        for number, (text, offsets) in enumerate(zip(texts, self._offsets(texts), strict=True)):
            chunks = self._chunks(text, offsets)
            tokens[number] = len(offsets) + 2 * len(chunks)
            pieces += chunks
            owners += [number] * len(chunks)
        last, middle = self._encode(pieces)
        return Embedded(_unit_sums(last, owners, len(texts)), _unit_sums(middle, owners, len(texts)), tokens)

    @torch.inference_mode()
    def _encode(self, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # Equal lengths together: padding would cost as much as reading.
        order = sorted(range(len(pieces)), key=lambda number: len(pieces[number]))
        last: list[np.ndarray] = []
        middle: list[np.ndarray] = []
        for start in range(0, len(order), BATCH_SIZE):
            if start and self._should_stop():
                raise AskedToStop
            inputs = self._model.preprocess([pieces[number] for number in order[start : start + BATCH_SIZE]])
            inputs = {
                name: value.to(self._model.device) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
            }
            outputs = self._model(inputs)
            layers = outputs["all_layer_embeddings"]
            mask = outputs["attention_mask"].unsqueeze(-1).to(layers[0].dtype)
            states = (layers[len(layers) // 2] * mask).sum(1) / mask.sum(1)
            last.append(torch.nn.functional.normalize(outputs["sentence_embedding"].float()).cpu().numpy())
            middle.append(torch.nn.functional.normalize(states.float()).cpu().numpy())
        back = np.argsort(order)
        return np.concatenate(last)[back], np.concatenate(middle)[back]

    def _offsets(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        encoded = self._model.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["offset_mapping"]

    def _chunks(self, text: str, offsets: list[tuple[int, int]]) -> list[str]:
        """The text in pieces of about equal numbers of tokens, each fitting the window with its [CLS] and [SEP]."""
        window = self._model.max_seq_length - 2
        if len(offsets) <= window:
            return [text]
        count = math.ceil(len(offsets) / window)
        starts = [offsets[number * len(offsets) // count][0] for number in range(count)]
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _unit_sums(vectors: np.ndarray, owners: list[int], count: int) -> np.ndarray:
    sums = np.zeros((count, vectors.shape[1]), np.float32)
    np.add.at(sums, owners, vectors)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)

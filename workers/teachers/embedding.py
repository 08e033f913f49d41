"""The teacher that compares sentence embeddings: with the labels' descriptions, or by a linear head on examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import softmax
from sentence_transformers import SentenceTransformer

from app import options as spec
from app.options import Label
from app.pretrained import Source
from workers.teachers import linear_head
from workers.teachers.teacher import Labeled, Row

ZERO_SHOT_TEMPERATURE = 0.05
BATCH_SIZE = 32

Texts = tuple[str, str | None]


class EmbeddingTeacher:
    """Zero-shot without examples: softmax(cosine(text, label) / temperature). With examples: a linear head.

    Examples count from two labels on. A label without examples stands by its description or name alone.
    """

    cacheable = True

    def __init__(self, options: spec.EmbeddingTeacher, labels: list[Label], source: Source | None) -> None:
        if source is None:
            raise ValueError("an embedding teacher needs the model it embeds with")
        self._encoder = Encoder(source)
        self._temperature = options.temperature or ZERO_SHOT_TEMPERATURE
        prompts = [options.template.replace("{label}", label.description or label.name) for label in labels]
        numbers = {label.name: number for number, label in enumerate(labels)}
        examples = [example for example in options.examples if example.label in numbers]
        self._examples = len(examples) if len({example.label for example in examples}) >= 2 else 0
        self._pairs = any(example.text_pair is not None for example in examples) and self._examples > 0
        self._prompts, _ = self._encoder.embed(prompts)
        self._head: linear_head.LinearHead | None = None
        if self._examples:
            vectors, _ = self._vectors([(example.text, example.text_pair) for example in examples])
            answers = np.array([numbers[example.label] for example in examples])
            # A description has no second half: it counts as a pair of itself.
            prompts_as_rows, _ = self._vectors([(prompt, prompt if self._pairs else None) for prompt in prompts])
            self._head = linear_head.fit(vectors, answers, prompts_as_rows)
        self.confidence_method = "linear_head_calibrated" if self._head else "cosine_softmax"

    def label(self, rows: list[Row]) -> Labeled:
        """Probabilities (N, C) for N rows; equal texts are embedded once. No row is ever refused."""
        texts = list(dict.fromkeys((row.text, row.text_pair) for row in rows))
        place = {pair: number for number, pair in enumerate(texts)}
        order = np.array([place[row.text, row.text_pair] for row in rows], np.int64)
        if not texts:
            return Labeled(np.zeros((0, len(self._prompts)), np.float32), np.zeros(0, np.int32), {})
        vectors, tokens = self._vectors(texts)
        if self._head:
            probabilities = self._head.probabilities(vectors)
        else:
            probabilities = softmax(vectors @ self._prompts.T / self._temperature, axis=1)
        return Labeled(probabilities.astype(np.float32)[order], tokens[order], {})

    def report(self) -> dict[str, Any]:
        if self._head is None:
            return {"mode": "zero_shot", "temperature": self._temperature}
        return {
            "mode": "linear_head",
            "examples": self._examples,
            "out_of_fold_accuracy": self._head.out_of_fold_accuracy,
            "temperature": self._head.temperature,
            "inverse_regularisation": self._head.inverse_regularisation,
        }

    def _vectors(self, texts: list[Texts]) -> tuple[np.ndarray, np.ndarray]:
        """One vector for each text or pair, (N, D), and the tokens it cost, (N,).

        Examples with pairs make the head read [u, v, |u - v|, u * v] (Conneau et al. 2017, InferSent); otherwise a
        pair is embedded as one text.
        """
        if not self._pairs:
            return self._encoder.embed([f"{text} {pair}" if pair else text for text, pair in texts])
        both, tokens = self._encoder.embed([text for text, _ in texts] + [pair or "" for _, pair in texts])
        first, second = np.split(both, 2)
        vectors = np.hstack([first, second, np.abs(first - second), first * second])
        return vectors, tokens[: len(texts)] + tokens[len(texts) :]


class Encoder:
    """A sentence-transformers model that also reads texts longer than its window."""

    def __init__(self, source: Source) -> None:
        self._model = SentenceTransformer(
            str(source.path or source.name),
            revision=source.revision if source.kind == "hub" else None,
            local_files_only=source.kind != "hub",
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )

    def embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (N, D) float32, and the tokens each text has (N,) int32.

        A text over the window is embedded in chunks, and their mean is taken (Lbl2TransformerVec, Schopf et al. 2022).
        """
        pieces: list[str] = []
        owners: list[int] = []
        tokens = np.zeros(len(texts), np.int32)
        for number, (text, offsets) in enumerate(zip(texts, self._offsets(texts), strict=True)):
            chunks = self._chunks(text, offsets)
            tokens[number] = len(offsets) + 2 * len(chunks)
            pieces += chunks
            owners += [number] * len(chunks)
        vectors = self._model.encode(
            pieces, batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
        )
        sums = np.zeros((len(texts), vectors.shape[1]), np.float32)
        np.add.at(sums, owners, vectors)
        return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12), tokens

    def _offsets(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        return self._model.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]

    def _chunks(self, text: str, offsets: list[tuple[int, int]]) -> list[str]:
        """The text in pieces of equal numbers of tokens that fit the window, [CLS] and [SEP] included."""
        window = self._model.max_seq_length - 2
        if len(offsets) <= window:
            return [text]
        count = math.ceil(len(offsets) / window)
        starts = [offsets[number * len(offsets) // count][0] for number in range(count)]
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]

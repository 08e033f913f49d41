"""The student's forward pass in numpy, so that the server can answer for a few texts without torch; and abstention.

RoBERTa as in arXiv:1907.11692, post-norm, with the classification head of transformers (dense, tanh, projection), from
the very files of the checkpoint: model.safetensors, config.json, tokenizer.json, calibration.json.
"""

from __future__ import annotations

import json
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load
from tokenizers import Encoding, Tokenizer

from app.config import settings
from app.errors import TooLarge, Unprocessable
from app.models import Checkpoint
from app.storage import Storage

Array = NDArray[np.float32]
TEXTS_PER_BATCH = 16
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Prediction:
    """What the student says of one text."""

    label: str
    probabilities: dict[str, float]
    """Calibrated, in the order of the classes."""
    confidence: float
    """The largest of them."""
    abstain: bool | None
    """Whether the confidence lies below the calibrated threshold; None where the checkpoint has none."""


class Student:
    """A checkpoint that is loaded: what it takes to classify texts."""

    def __init__(self, files: dict[str, bytes]) -> None:
        """Read the files of a checkpoint, by name. Raises Unprocessable for a student that numpy cannot compute."""
        self.config: dict[str, Any] = json.loads(files["config.json"])
        if self.config.get("architectures") != ["RobertaForSequenceClassification"]:
            raise Unprocessable("This checkpoint is no RobertaForSequenceClassification; download it to use it.")
        if self.config["hidden_act"] not in ACTIVATIONS:
            raise Unprocessable(
                f"Activation {self.config['hidden_act']!r} is not computed here; download the checkpoint."
            )
        self.activation = ACTIVATIONS[self.config["hidden_act"]]
        self.weights = {name: tensor.astype(np.float32) for name, tensor in load(files["model.safetensors"]).items()}
        self.labels = [self.config["id2label"][str(index)] for index in range(len(self.config["id2label"]))]
        self.tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        most = json.loads(files["tokenizer_config.json"])["model_max_length"]
        self.tokenizer.enable_truncation(most, strategy="longest_first")
        self.tokenizer.no_padding()
        calibration = json.loads(files["calibration.json"]) if "calibration.json" in files else None
        self.temperature: float = calibration["temperature"] if calibration else 1.0
        self.threshold: float | None = calibration["threshold"] if calibration else None
        self.is_calibrated = calibration is not None
        self.bytes = sum(tensor.nbytes for tensor in self.weights.values())

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """What the student says of each text, or pair. A threshold that nothing reached in training abstains always."""
        scores = self.logits(texts, pairs).astype(np.float64) / self.temperature
        probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        return [self._prediction(row) for row in probabilities]

    def _prediction(self, row: NDArray[np.float64]) -> Prediction:
        confidence = float(row.max())
        abstain = (self.threshold is None or confidence < self.threshold) if self.is_calibrated else None
        named = dict(zip(self.labels, row.tolist(), strict=True))
        return Prediction(self.labels[int(row.argmax())], named, confidence, abstain)

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
        """(N, C) what the classifier puts out, before any softmax."""
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self.tokenizer.encode_batch(inputs)
        scores = np.empty((len(encoded), len(self.labels)), np.float32)
        by_length = np.argsort([-len(entry.ids) for entry in encoded], kind="stable")
        for start in range(0, len(encoded), TEXTS_PER_BATCH):
            rows = by_length[start : start + TEXTS_PER_BATCH]
            scores[rows] = self._forward([encoded[row] for row in rows])
        return scores

    # --- the forward pass; B texts, L tokens, H hidden units ---

    def _forward(self, encoded: list[Encoding]) -> Array:
        pad, longest = self.config["pad_token_id"], max(len(entry.ids) for entry in encoded)
        ids = np.full((len(encoded), longest), pad, np.int64)
        types = np.zeros_like(ids)
        present = np.zeros(ids.shape, bool)
        for row, entry in enumerate(encoded):
            ids[row, : len(entry.ids)] = entry.ids
            types[row, : len(entry.ids)] = entry.type_ids
            present[row, : len(entry.ids)] = True
        if self.config["type_vocab_size"] == 1:
            types[:] = 0
        # Positions count the tokens that are not padding, from pad_token_id + 1.
        positions = np.cumsum(ids != pad, axis=1) * (ids != pad) + pad
        place = "roberta.embeddings"
        hidden = self.weights[f"{place}.word_embeddings.weight"][ids]
        hidden = hidden + self.weights[f"{place}.token_type_embeddings.weight"][types]
        hidden = self._norm(hidden + self.weights[f"{place}.position_embeddings.weight"][positions], place)
        bias = np.where(present, np.float32(0), np.finfo(np.float32).min)[:, None, None, :]
        for layer in range(self.config["num_hidden_layers"]):
            hidden = self._layer(hidden, bias, f"roberta.encoder.layer.{layer}")
        first = np.tanh(self._dense(hidden[:, 0], "classifier.dense"))
        return self._dense(first, "classifier.out_proj")

    def _layer(self, hidden: Array, bias: Array, place: str) -> Array:
        """(B, L, H) -> (B, L, H); bias (B, 1, 1, L) is added to the attention's scores."""
        mixed = self._dense(self._attention(hidden, bias, f"{place}.attention.self"), f"{place}.attention.output.dense")
        hidden = self._norm(hidden + mixed, f"{place}.attention.output")
        wide = self.activation(self._dense(hidden, f"{place}.intermediate.dense"))
        return self._norm(hidden + self._dense(wide, f"{place}.output.dense"), f"{place}.output")

    def _attention(self, hidden: Array, bias: Array, place: str) -> Array:
        texts, tokens, width = hidden.shape
        heads = self.config["num_attention_heads"]
        shape = (texts, tokens, heads, width // heads)
        query, key, value = (
            self._dense(hidden, f"{place}.{name}").reshape(shape).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32(np.sqrt(width // heads)) + bias
        weights: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Array = (weights @ value).transpose(0, 2, 1, 3).reshape(texts, tokens, width)
        return mixed

    def _dense(self, values: Array, place: str) -> Array:
        result: Array = values @ self.weights[f"{place}.weight"].T + self.weights[f"{place}.bias"]
        return result

    def _norm(self, values: Array, place: str) -> Array:
        centred: Array = values - values.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        scaled: Array = centred / np.sqrt(variance + np.float32(self.config["layer_norm_eps"]))
        return scaled * self.weights[f"{place}.LayerNorm.weight"] + self.weights[f"{place}.LayerNorm.bias"]


def _erf(x: Array) -> Array:
    """The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26), which is float32's own precision."""
    t: Array = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * np.abs(x))
    series: Array = np.zeros_like(x)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(coefficient)) * t
    result: Array = np.sign(x) * (np.float32(1) - series * np.exp(-x * x))
    return result


def _gelu(x: Array) -> Array:
    return x * np.float32(0.5) * (1 + _erf(x / np.float32(np.sqrt(2))))


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return x * np.float32(0.5) * (1 + np.tanh(inner))


def _relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "relu": _relu,
}  # fmt: skip


# --- the students that are loaded -----------------------------------------------------------------------------------


class Shelf:
    """The students used last, as many as fit into `most_bytes`; loaded once, also when several requests ask at once."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._students: OrderedDict[str, Student] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, checkpoint: Checkpoint, storage: Storage) -> Student:
        """The student of a checkpoint. Raises TooLarge when it alone does not fit, Unprocessable, FileNotFoundError."""
        size = next(
            (file["bytes"] for file in checkpoint.files if file["name"] == "model.safetensors"), checkpoint.bytes
        )
        if size > self.most_bytes:
            raise TooLarge(
                f"The student takes {size:,} bytes, and this server predicts with at most {self.most_bytes:,}; "
                "download the checkpoint to use it."
            )
        with self._lock:
            if (student := self._students.get(checkpoint.id)) is None:
                while self._students and self._bytes() + size > self.most_bytes:
                    self._students.popitem(last=False)
                student = self._students[checkpoint.id] = Student(read_files(checkpoint, storage))
            self._students.move_to_end(checkpoint.id)
            return student

    def _bytes(self) -> int:
        return sum(student.bytes for student in self._students.values())


def read_files(checkpoint: Checkpoint, storage: Storage) -> dict[str, bytes]:
    """The files of a checkpoint's tar that a prediction needs, by name. Raises FileNotFoundError."""
    with storage.open(checkpoint.key) as stream, tarfile.open(fileobj=stream) as archive:
        wanted = [entry for entry in archive if entry.name in (*FILES, "calibration.json")]
        files = {entry.name: file.read() for entry in wanted if (file := archive.extractfile(entry)) is not None}
    if missing := set(FILES) - set(files):
        raise Unprocessable(f"This checkpoint has no {', '.join(sorted(missing))}.")
    return files


_shelf: Shelf | None = None
_shelf_lock = threading.Lock()


def shelf() -> Shelf:
    """The one of this process."""
    global _shelf
    with _shelf_lock:
        if _shelf is None or _shelf.most_bytes != settings().predict_bytes:
            _shelf = Shelf(settings().predict_bytes)
        return _shelf

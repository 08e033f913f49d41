"""A regularised linear classifier on a few labeled vectors, with a temperature that makes its confidence honest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
FOLDS = 5


@dataclass(frozen=True)
class LinearHead:
    """p(class | x) = softmax((x W + b) / temperature)."""

    weights: np.ndarray
    """(D, C)"""
    bias: np.ndarray
    """(C,)"""
    temperature: float
    inverse_regularisation: float
    out_of_fold_accuracy: float | None

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C)."""
        return softmax((vectors @ self.weights + self.bias) / self.temperature, axis=1)


def fit(vectors: np.ndarray, labels: np.ndarray, prompts: np.ndarray) -> LinearHead:
    """Fit on examples (N, D) with label numbers (N,), and on each label's prompt (C, D) as one more example of it."""
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds < 2:
        return _head(vectors, labels, prompts, 10.0, 1.0, None)
    scores = {strength: _out_of_fold(vectors, labels, prompts, strength, folds) for strength in STRENGTHS}
    temperatures = {strength: _best_temperature(logits, labels) for strength, logits in scores.items()}
    losses = {strength: _log_loss(scores[strength] / temperatures[strength], labels) for strength in STRENGTHS}
    best = min(STRENGTHS, key=lambda strength: losses[strength])
    accuracy = float((scores[best].argmax(1) == labels).mean())
    return _head(vectors, labels, prompts, best, temperatures[best], accuracy)


def _head(
    vectors: np.ndarray, labels: np.ndarray, prompts: np.ndarray, strength: float, temperature: float,
    accuracy: float | None,
) -> LinearHead:  # fmt: skip
    weights, bias = _regress(vectors, labels, prompts, strength)
    return LinearHead(weights, bias, temperature, strength, accuracy)


def _regress(
    vectors: np.ndarray, labels: np.ndarray, prompts: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    model = LogisticRegression(C=strength, max_iter=300)
    model.fit(np.vstack([vectors, prompts]), np.concatenate([labels, np.arange(len(prompts))]))
    if len(prompts) == 2:  # scikit-learn keeps one column for two classes
        return np.hstack([-model.coef_.T / 2, model.coef_.T / 2]), np.array([-1, 1]) * model.intercept_ / 2
    return model.coef_.T, model.intercept_


def _out_of_fold(
    vectors: np.ndarray, labels: np.ndarray, prompts: np.ndarray, strength: float, folds: int
) -> np.ndarray:
    scores = np.zeros((len(labels), len(prompts)))
    for train, held_out in StratifiedKFold(folds, shuffle=True, random_state=0).split(vectors, labels):
        weights, bias = _regress(vectors[train], labels[train], prompts, strength)
        scores[held_out] = vectors[held_out] @ weights + bias
    return scores


def _best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    found = minimize_scalar(
        lambda log: _log_loss(logits / np.exp(log), labels), bounds=(np.log(0.01), np.log(10)), method="bounded"
    )
    return float(np.exp(found.x))


def _log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())

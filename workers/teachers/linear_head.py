"""A linear classifier on a few labeled texts, seen from several sides, with confidence made honest out of fold.

Each view of the texts (say, one layer of an encoder) gets a multinomial logistic regression. What they say is added to
the similarity of text and label, each with a weight of its own, and the weights are fitted on predictions for examples
that the regressions had not seen (stacking, Wolpert 1992). That calibrates too: with a single view and no similarity
the weight is the inverse temperature of Guo et al. 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""scikit-learn's C, the inverse of the regularisation, to choose from."""
FOLDS = 5
UNTESTED_STRENGTH = 10.0
UNTESTED_SIMILARITY_WEIGHT = 10.0
LARGEST_WEIGHT = 50.0


@dataclass(frozen=True)
class View:
    """The same texts as vectors of one kind; the prompts stand for the labels, one each."""

    examples: np.ndarray
    """(N, D)"""
    prompts: np.ndarray
    """(C, D)"""


@dataclass(frozen=True)
class LinearHead:
    """p(label | x) = softmax(sum over views v of weight_v (x_v W_v + b_v) + similarity_weight similarity(x))."""

    coefficients: list[np.ndarray]
    """W of each view, (D, C)."""
    biases: list[np.ndarray]
    """b of each view, (C,)."""
    strengths: list[float]
    weights: list[float]
    similarity_weight: float
    out_of_fold_accuracy: float | None
    """None where there were too few examples to hold any back."""

    def probabilities(self, views: list[np.ndarray], similarity: np.ndarray) -> np.ndarray:
        """Views (N, D) in the order of fitting and cosines with the labels' prompts (N, C) -> (N, C)."""
        logits = self.similarity_weight * similarity
        for view, coefficients, bias, weight in zip(views, self.coefficients, self.biases, self.weights, strict=True):
            logits = logits + weight * (view @ coefficients + bias)
        return softmax(logits, axis=1)


def fit(views: list[View], similarity: np.ndarray, labels: np.ndarray) -> LinearHead:
    """A head for N examples with label numbers (N,) and cosines with the labels' prompts (N, C).

    Every prompt is one more example of its label, so a label without examples is known by its name alone. With fewer
    than two examples a label nothing can be held back: then only the first view counts, with weights that did well on
    four public data sets.
    """
    if len(labels) < 2 * len(np.unique(labels)):
        strengths = [UNTESTED_STRENGTH] * len(views)
        weights = np.array([1.0, *[0.0] * (len(views) - 1), UNTESTED_SIMILARITY_WEIGHT])
        accuracy = None
    else:
        chosen = [_best_strength(view, similarity, labels) for view in views]
        strengths = [strength for strength, _ in chosen]
        scores = np.stack([*(logits for _, logits in chosen), similarity])
        weights = _stacking_weights(scores, labels)
        accuracy = float((np.tensordot(weights, scores, 1).argmax(axis=1) == labels).mean())
    fitted = [_regress(view, labels, strength) for view, strength in zip(views, strengths, strict=True)]
    return LinearHead(
        coefficients=[coefficients for coefficients, _ in fitted],
        biases=[bias for _, bias in fitted],
        strengths=strengths,
        weights=weights[:-1].tolist(),
        similarity_weight=float(weights[-1]),
        out_of_fold_accuracy=accuracy,
    )


def _best_strength(view: View, similarity: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The strength with the lowest log loss out of fold, beside the similarity; and its logits out of fold, (N, C)."""
    candidates = {strength: _out_of_fold(view, labels, strength) for strength in STRENGTHS}

    def loss(strength: float) -> float:
        scores = np.stack([candidates[strength], similarity])
        return _log_loss(_stacking_weights(scores, labels), scores, _softened(labels, similarity.shape[1]))[0]

    best = min(STRENGTHS, key=loss)
    return best, candidates[best]


def _out_of_fold(view: View, labels: np.ndarray, strength: float) -> np.ndarray:
    """Logits (N, C) for each example by a regression that has not seen it."""
    logits = np.zeros((len(labels), len(view.prompts)))
    folds = _folds(labels)
    for fold in np.unique(folds):
        seen = folds != fold
        coefficients, bias = _regress(View(view.examples[seen], view.prompts), labels[seen], strength)
        logits[~seen] = view.examples[~seen] @ coefficients + bias
    return logits


def _folds(labels: np.ndarray) -> np.ndarray:
    """The fold of each example, (N,): each label's examples are dealt out in turn, so every fold gets its share."""
    folds = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        folds[mine] = (np.arange(len(mine)) + label) % FOLDS
    return folds


def _regress(view: View, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression on examples and prompts: coefficients (D, C) and bias (C,)."""
    classes = len(view.prompts)
    model = LogisticRegression(C=strength, max_iter=300)
    model.fit(np.vstack([view.examples, view.prompts]).astype(np.float64), np.append(labels, np.arange(classes)))
    if classes == 2:  # scikit-learn keeps one column, the log odds of the second class
        return np.hstack([-model.coef_.T, model.coef_.T]) / 2, np.append(-model.intercept_, model.intercept_) / 2
    return model.coef_.T, model.intercept_


def _stacking_weights(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The non-negative weights (S,) of S scores (S, N, C) with the lowest log loss; a convex problem."""
    targets = _softened(labels, scores.shape[2])
    found = minimize(
        _log_loss,
        np.ones(len(scores)),
        args=(scores, targets),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, LARGEST_WEIGHT)] * len(scores),
    )
    return found.x


def _log_loss(weights: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy of softmax(weights . scores) with targets (N, C), and its gradient (S,)."""
    logs = log_softmax(np.tensordot(weights, scores, 1), axis=1)
    gradient = np.tensordot(scores, np.exp(logs) - targets, 2) / len(targets)
    return -float((targets * logs).sum()) / len(targets), gradient


def _softened(labels: np.ndarray, classes: int) -> np.ndarray:
    """Targets (N, C) with (N+1)/(N+2) on the label (Platt 1999), or few separable examples would promise certainty."""
    rest = 1 / (len(labels) + 2)
    targets = np.full((len(labels), classes), rest / (classes - 1))
    targets[np.arange(len(labels)), labels] = 1 - rest
    return targets

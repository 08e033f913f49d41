"""LLKD: keep the rows the teacher is sure of and the student is not (arXiv:2411.08028).

With conf = max_c p_T(c), unc = H(p_S), ŷ = argmax p_T, moving averages (momentum λ) give two thresholds per class:

    τ_T(c) = a_T(c) / unit(a_T) · mean conf       τ_S(c) = a_S(c) / unit(a_S) · mean unc
    selected  <=>  conf >= τ_T(ŷ)  and  unc >= τ_S(ŷ)

where a(c) depends on `class_scaling`: the mean over the rows labeled c, the mean probability of c (FreeMatch), or 1; and
unit(a) on `class_norm`: the largest a(c), which is the paper's MaxNorm and puts every threshold at its level or below,
so that most rows pass; or the mean of a(ŷ) over the batch, which puts the thresholds at the level on average.
The averages take in the batch before it is judged, and start with the first values seen. A class not seen so far has no
average yet and meets the unscaled level.

Beyond the paper, each by an option: the level of τ_S comes from the current batch (`student_threshold`), the student's
threshold rests until the student agrees with the teacher (`warm_up`), and a share of each batch is always trained on
(`floor`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.algorithms.losses import entropy
from workers.algorithms.selection.rule import (
    REASONS,
    Rule,
    Selection,
    Signals,
    State,
    at_least,
    decide,
    first_of,
    moving_average,
)

Side = Literal["teacher", "student"]


@dataclass(frozen=True)
class LLKD(Rule):
    """Two class-dependent moving thresholds; only rows that pass the teacher's are sent through the student."""

    weighted: bool = False
    use_teacher_confidence: bool = True
    use_student_uncertainty: bool = True
    momentum: float = 0.9
    class_scaling: Literal["class_mean", "freematch", "none"] = "class_mean"
    class_norm: Literal["mean", "max"] = "mean"
    student_threshold: Literal["batch_level", "moving_average"] = "batch_level"
    warm_up: Literal["auto", "none"] = "auto"
    warm_up_agreement: float = 0.2
    floor: float = 0.05

    @property
    def needs_student(self) -> bool:
        """Without the student's threshold only the weights ask for the student's uncertainty."""
        return self.use_student_uncertainty or self.weighted

    def initial(self, classes: int) -> State:
        """Empty averages of both sides; warming up where that is asked for."""
        return {
            **_no_averages("teacher", classes),
            **_no_averages("student", classes),
            "warming_up": torch.tensor(self.warm_up == "auto" and self.use_student_uncertainty),
            "agreement": torch.tensor(0.0, dtype=torch.float64),
        }

    def offer(self, state: State, teacher: Tensor, subset: Tensor) -> tuple[Tensor, State]:
        """Move the teacher's threshold by the whole batch, then offer the rows that reach it."""
        if not self.use_teacher_confidence:
            return subset, state
        teacher = teacher.double()
        confidence, labels = teacher.max(dim=1)
        state = self._average(state, "teacher", confidence, labels, teacher, self.momentum)
        return subset & at_least(confidence, _thresholds(state, "teacher")[labels]), state

    def select(self, state: State, signals: Signals) -> tuple[Selection, State]:
        """Move the student's threshold by the offered rows, then keep those whose uncertainty reaches it."""
        offered = signals.offered
        confidence, labels = signals.teacher.double().max(dim=1)
        uncertainty = torch.full_like(confidence, torch.nan)
        threshold = torch.full_like(confidence, torch.nan)
        mask = offered
        if self.needs_student:
            student = signals.student.double()
            uncertainty[offered] = entropy(student[offered])
        if self.use_student_uncertainty:
            level_momentum = 0.0 if self.student_threshold == "batch_level" else self.momentum
            state = self._average(
                state, "student", uncertainty[offered], labels[offered], student[offered], level_momentum
            )
            state = self._watch_agreement(state, labels[offered], student[offered].argmax(dim=1))
            if not state["warming_up"]:
                threshold[offered] = _thresholds(state, "student")[labels[offered]]
                mask = self._with_floor(offered & at_least(uncertainty, threshold), offered, uncertainty)
        reasons = torch.where(offered, REASONS.index("student_sure"), REASONS.index("teacher_unsure"))
        selection = decide(
            mask,
            rejected=reasons,
            weights=_weights(mask, confidence * uncertainty) if self.weighted else None,
            teacher_threshold=_thresholds(state, "teacher")[labels] if self.use_teacher_confidence else None,
            student_threshold=threshold,
            uncertainty=uncertainty,
        )
        return selection, state

    def thresholds(self, state: State) -> dict[str, Tensor]:
        """Both thresholds per class, without those that are switched off."""
        used = {"teacher": self.use_teacher_confidence, "student": self.use_student_uncertainty}
        return {side: _thresholds(state, side) for side in ("teacher", "student") if used[side]}

    def summary(self, state: State) -> dict[str, float]:
        """Whether the rule is warming up, and the agreement (kappa) that ends it."""
        return {"warming_up": float(state["warming_up"]), "agreement": float(state["agreement"])}

    def _average(
        self, state: State, side: Side, values: Tensor, labels: Tensor, probabilities: Tensor, level_momentum: float
    ) -> State:
        """Take (n,) values, (n,) pseudo-labels and (n, C) probabilities into one side's level and class averages."""
        if len(values) == 0:
            return state
        old, seen = state[f"{side}_class"], state[f"{side}_seen"]
        counts = torch.bincount(labels, minlength=len(old))
        present = counts > 0 if self.class_scaling == "class_mean" else torch.ones_like(seen)
        if self.class_scaling == "class_mean":
            new = torch.zeros_like(old).index_add(0, labels, values) / counts.clamp_min(1)
        elif self.class_scaling == "freematch":
            new = probabilities.mean(dim=0)
        else:
            new = torch.ones_like(old)
        moved = torch.where(seen, moving_average(old, new, self.momentum), new)
        mean = values.mean()
        level = moving_average(state[f"{side}_level"], mean, level_momentum) if seen.any() else mean
        by_class = torch.where(present, moved, old)
        unit = by_class[labels].mean() if self.class_norm == "mean" else by_class.max()
        return state | {
            f"{side}_level": level,
            f"{side}_class": by_class,
            f"{side}_unit": unit.clamp_min(1e-12),
            f"{side}_seen": seen | present,
        }

    def _watch_agreement(self, state: State, labels: Tensor, predicted: Tensor) -> State:
        """Follow how far the student agrees with the teacher beyond chance; warm-up ends for good when it is enough.

        In the first epoch the rows are new to the student, so agreement is knowledge and not memory. The average starts
        at 0 and not at the first batch, so that one lucky batch cannot end the warm-up.
        """
        kappa = _kappa(labels, predicted, len(state["student_class"]))
        if not state["warming_up"] or kappa is None:
            return state
        agreement = moving_average(state["agreement"], kappa, self.momentum)
        return state | {"agreement": agreement, "warming_up": agreement <= self.warm_up_agreement}

    def _with_floor(self, mask: Tensor, offered: Tensor, uncertainty: Tensor) -> Tensor:
        """Add the most uncertain offered rows until `floor` of the whole batch is selected, or none is left."""
        wanted = math.ceil(self.floor * len(mask) - 1e-9)
        missing = min(wanted, int(offered.sum())) - int(mask.sum())
        if missing <= 0:
            return mask
        spare = torch.where(offered & ~mask, uncertainty, -torch.inf)
        return mask | first_of(spare.argsort(descending=True, stable=True), missing)


def _no_averages(side: Side, classes: int) -> State:
    return {
        f"{side}_level": torch.tensor(0.0, dtype=torch.float64),
        f"{side}_class": torch.zeros(classes, dtype=torch.float64),
        f"{side}_unit": torch.tensor(1.0, dtype=torch.float64),
        f"{side}_seen": torch.zeros(classes, dtype=torch.bool),
    }


def _thresholds(state: State, side: Side) -> Tensor:
    """(C,) level x class averages in their unit; the level itself for a class not seen so far."""
    scale = torch.where(state[f"{side}_seen"], state[f"{side}_class"] / state[f"{side}_unit"], 1.0)
    return state[f"{side}_level"] * scale


def _kappa(labels: Tensor, predicted: Tensor, classes: int) -> Tensor | None:
    """Cohen's kappa of two (n,) labelings, scalar; None where chance alone explains everything."""
    if len(labels) == 0:
        return None
    shares = [torch.bincount(each, minlength=classes).double() / len(each) for each in (labels, predicted)]
    chance = (shares[0] * shares[1]).sum()
    if chance >= 1 - 1e-9:
        return None
    return ((labels == predicted).double().mean() - chance) / (1 - chance)


def _weights(mask: Tensor, importance: Tensor) -> Tensor:
    """Eq. 9: confidence x uncertainty, scaled to mean 1 over the selected rows, so that LLKD_w takes LLKD's step size."""
    chosen = torch.where(mask, importance, 0.0)
    mean = chosen.sum() / mask.sum()
    return chosen / mean if mean > 0 else mask.double()

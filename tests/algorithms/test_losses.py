"""The losses against hand-computed numbers and plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from tests.algorithms.batches import distributions, random_batches
from workers.algorithms import losses

TEACHER = torch.cat([teacher for teacher, _ in random_batches(3)]).double()
LOGITS = torch.cat([student for _, student in random_batches(3)]).double().log() + 0.7


def slow_softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def slow_soften(row: list[float], temperature: float) -> list[float]:
    powers = [p ** (1 / temperature) for p in row]
    return [power / sum(powers) for power in powers]


def slow_cross_entropy(target: list[float], predicted: list[float]) -> float:
    return -sum(p * math.log(q) for p, q in zip(target, predicted, strict=True) if p > 0)


def test_entropy_by_hand() -> None:
    rows = distributions([1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0])
    assert losses.entropy(rows).tolist() == pytest.approx([0.0, math.log(4), math.log(2)])


def test_pseudo_label_loss_by_hand() -> None:
    values = losses.pseudo_label_loss(distributions([0.0, 0.0], [1.0, 0.0]), distributions([0.9, 0.1], [0.4, 0.6]))
    assert values.tolist() == pytest.approx([math.log(2), math.log(1 + math.e)])


def test_softening_is_softmax_of_divided_logits() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64)
    for temperature in (0.5, 1.0, 4.0):
        assert torch.allclose(losses.soften(logits.softmax(1), temperature), (logits / temperature).softmax(1))
    assert losses.soften(torch.eye(3), 4.0).tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_losses_equal_slow_versions_of_themselves(temperature: float) -> None:
    rows = list(zip(TEACHER.tolist(), LOGITS.tolist(), strict=True))
    soft, divergence, loss_form, target_form = [], [], [], []
    for teacher, logits in rows:
        target, student, plain = (
            slow_soften(teacher, temperature),
            slow_softmax(logits, temperature),
            slow_softmax(logits, 1),
        )
        trust, label = max(teacher), teacher.index(max(teacher))
        soft.append(slow_cross_entropy(target, student))
        divergence.append(temperature**2 * sum(p * math.log(p / q) for p, q in zip(target, student, strict=True)))
        loss_form.append(trust * soft[-1] - (1 - trust) * math.log(plain[label]))
        mixed = [trust * p + (1 - trust) * (c == label) for c, p in enumerate(target)]
        target_form.append(slow_cross_entropy(mixed, student))
    assert losses.soft_label_loss(LOGITS, TEACHER, temperature).tolist() == pytest.approx(soft)
    assert losses.kd(LOGITS, TEACHER, temperature).tolist() == pytest.approx(divergence)
    assert losses.cckd_l(LOGITS, TEACHER, temperature).tolist() == pytest.approx(loss_form)
    assert losses.cckd_t(LOGITS, TEACHER, temperature).tolist() == pytest.approx(target_form)


def test_kd_is_zero_where_student_and_teacher_agree_and_positive_elsewhere() -> None:
    for temperature in (1.0, 2.0):
        assert torch.allclose(losses.kd(TEACHER.log() + 3, TEACHER, temperature), torch.zeros(48).double(), atol=1e-12)
        assert (losses.kd(LOGITS, TEACHER, temperature) > 0).all()


def test_cckd_l_of_a_certain_teacher_is_pure_distillation() -> None:
    one_hot = torch.eye(5).double()[TEACHER.argmax(1)]
    assert torch.allclose(losses.cckd_l(LOGITS, one_hot, 2.0), losses.soft_label_loss(LOGITS, one_hot, 2.0))


def test_cckd_of_a_teacher_hardly_sure_is_almost_pure_cross_entropy() -> None:
    classes = 1000
    unsure = torch.full((1, classes), 1 / classes, dtype=torch.float64)
    unsure[0, 7] += 1e-9
    logits = torch.randn(1, classes, dtype=torch.float64)
    label_loss = float(losses.pseudo_label_loss(logits, unsure))
    assert float(losses.cckd_l(logits, unsure)) == pytest.approx(label_loss, rel=0.01)
    assert float(losses.cckd_t(logits, unsure)) == pytest.approx(label_loss, rel=0.01)


def test_the_two_cckd_forms_agree_without_a_temperature() -> None:
    assert torch.allclose(losses.cckd_l(LOGITS, TEACHER), losses.cckd_t(LOGITS, TEACHER))


def test_a_weighted_mean_does_not_change_with_the_scale_of_its_weights() -> None:
    values, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 2.0, 1.0])
    assert float(losses.weighted_mean(values, weights)) == pytest.approx(11 / 4)
    assert float(losses.weighted_mean(values, 7 * weights)) == pytest.approx(11 / 4)

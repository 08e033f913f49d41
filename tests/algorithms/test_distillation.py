"""The distances between teacher and student: by hand, and what does not change them."""

from __future__ import annotations

import math

import pytest
import torch

from workers.algorithms.distillation import (
    LOSSES,
    between_classes,
    between_rows,
    ce,
    dist,
    kl,
    layer_pairs,
    mse,
    patient,
    spherical,
)
from workers.algorithms.losses import entropy

LUCK = torch.Generator().manual_seed(0)
TARGET, LOGITS = (torch.randn(6, 4, dtype=torch.float64, generator=LUCK) for _ in range(2))


def test_kl_and_ce_by_hand() -> None:
    target, logits = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl(target, logits).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert ce(target, logits).item() == pytest.approx(math.log(2), rel=1e-6)
    # softened by 2: sqrt(3) : 1
    p = math.sqrt(3) / (1 + math.sqrt(3))
    assert kl(target, logits, 2.0).item() == pytest.approx(
        math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p), rel=1e-5
    )


def test_mse_by_hand() -> None:
    assert mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).tolist() == [2.5]


def test_dist_by_hand() -> None:
    """Two rows, two classes: correlations over two values are 1 or -1."""
    agree, differ = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    assert dist(agree, 3 * agree).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert dist(agree, differ).tolist() == pytest.approx([4.0, 4.0], abs=1e-6)


def test_dist_is_the_paper_s_two_parts_in_plain_python() -> None:
    def correlation(left: list[float], right: list[float]) -> float:
        a = [value - sum(left) / len(left) for value in left]
        b = [value - sum(right) / len(right) for value in right]
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    p, q = TARGET.softmax(dim=1).tolist(), LOGITS.softmax(dim=1).tolist()
    between = sum(1 - correlation(p[row], q[row]) for row in range(6)) / 6
    within = sum(1 - correlation([row[c] for row in p], [row[c] for row in q]) for c in range(4)) / 4
    assert dist(TARGET, LOGITS).mean().item() == pytest.approx(between + within, rel=1e-9)


@pytest.mark.parametrize("name", ["kl", "mse", "dist"])
def test_a_distance_is_zero_where_both_agree_and_positive_elsewhere(name: str) -> None:
    assert LOSSES[name](TARGET, TARGET, 1.0).abs().max() < 1e-12
    assert LOSSES[name](TARGET, LOGITS, 1.0).min() > 0


def test_ce_is_kl_and_the_targets_entropy() -> None:
    for temperature in (1.0, 3.0):
        softened = (TARGET / temperature).softmax(dim=1)
        assert torch.allclose(ce(TARGET, LOGITS, temperature), kl(TARGET, LOGITS, temperature) + entropy(softened))


def test_a_constant_on_the_logits_changes_nothing_but_mse() -> None:
    shift = torch.randn(6, 1, dtype=torch.float64, generator=LUCK)
    for name in ("kl", "ce", "dist"):
        assert torch.allclose(LOSSES[name](TARGET + shift, LOGITS - shift, 2.0), LOSSES[name](TARGET, LOGITS, 2.0))


def test_no_factor_of_the_temperature_is_hidden_in_the_losses() -> None:
    """For high temperatures KL falls as 1/τ²; with the factor τ² it would not."""
    assert (kl(TARGET, LOGITS, 100.0) / kl(TARGET, LOGITS, 200.0)).tolist() == pytest.approx([4.0] * 6, rel=0.05)


def test_dist_stays_finite_where_one_side_does_not_vary() -> None:
    flat = torch.zeros(3, 4, requires_grad=True)
    value = dist(TARGET[:3].float(), flat).mean()
    value.backward()
    assert value.item() == pytest.approx(2.0)
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()


def test_spherical_logits_by_hand_and_what_does_not_change_them() -> None:
    placed = spherical(torch.tensor([[1.0, 3.0, 5.0]]), 2.0)
    assert placed.tolist()[0] == pytest.approx([-math.sqrt(6), 0.0, math.sqrt(6)], rel=1e-6)
    assert torch.allclose(spherical(3 * LOGITS + 7, 2.5), spherical(LOGITS, 2.5))
    assert torch.isfinite(spherical(torch.zeros(2, 3), 2.0)).all()


def test_two_classes_on_the_sphere_still_have_a_gradient() -> None:
    logits = torch.tensor([[0.4, -0.1]], requires_grad=True)
    spherical(logits, 2.0)[0, 0].backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 1


def test_hidden_states_are_compared_by_direction_alone() -> None:
    theirs, own = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert patient([theirs], [own]).tolist() == pytest.approx([(0.6**2 + 0.2**2) / 2])
    assert torch.allclose(patient([TARGET], [LOGITS]), patient([5 * TARGET], [LOGITS / 3]))
    assert patient([TARGET], [2 * TARGET]).abs().max() < 1e-12
    assert patient([], []).item() == 0


def test_the_layers_of_a_student_follow_those_of_the_paper() -> None:
    assert layer_pairs(12, 6, "skip") == [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5)]
    assert layer_pairs(12, 6, "last") == [(7, 1), (8, 2), (9, 3), (10, 4), (11, 5)]
    assert layer_pairs(6, 2, "skip") == [(3, 1)]
    assert layer_pairs(2, 4, "last") == [(1, 1), (1, 2), (1, 3)]


def test_correlations_do_not_see_an_affine_change_of_the_probabilities() -> None:
    p, q = TARGET.softmax(dim=1), LOGITS.softmax(dim=1)
    assert torch.allclose(between_classes(2 * p + 1, q), between_classes(p, q))
    assert torch.allclose(between_rows(p * torch.tensor([1, 2, 3, 4]) + 5, q), between_rows(p, q))
    assert between_classes(p, 3 * p + 2).abs().max() < 1e-12

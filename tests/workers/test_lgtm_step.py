"""The step of LGTM against slow versions of itself, against the authors' algorithm, and against what it should do."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from app import options
from benchmarks.plain_lgtm import plain_step
from tests.workers.pairs import CLASSES, TRAINING, batch, feedback, lgtm, model, optimizer, pair
from workers.algorithms import influence as influences
from workers.algorithms.distillation import LOSSES, ce, kl
from workers.training.dml import learn_dml
from workers.training.lgtm import along_direction, feedback_gradient, learn_lgtm, teacher_loss
from workers.training.online import learn_online
from workers.training.prokt import learn_prokt
from workers.training.step import Batch, Pair, auxiliary_loss, evaluating, student_loss

Gradient = list[Tensor]


def logits(of: Any, arguments: Any) -> Tensor:
    result: Tensor = of(**arguments).logits
    return result


def relative(mine: Gradient, theirs: Gradient) -> float:
    difference = sum((one - other).detach().square().sum() for one, other in zip(mine, theirs, strict=True))
    return float((difference / sum(other.detach().square().sum() for other in theirs)).sqrt())


def direction_of(of: Pair, rows: Batch, method: options.LGTM) -> dict[str, Tensor]:
    return dict(
        feedback_gradient(
            of, rows, logits(of.teacher, rows.teacher), logits(of.student, rows.student), feedback(), method, TRAINING
        )[0]
    )


def gradient_of_teacher(
    of: Pair, rows: Batch, method: options.LGTM, direction: dict[str, Tensor] | None = None
) -> Gradient:
    teacher_logits, student_logits = logits(of.teacher, rows.teacher), logits(of.student, rows.student)
    along = along_direction(of, rows, direction or direction_of(of, rows, method), method)
    _, loss = teacher_loss(of, rows, teacher_logits, student_logits, along, method)
    return list(torch.autograd.grad(loss, list(of.teacher.parameters())))


def state(of: Pair) -> list[bytes]:
    """Weights and moments of both, bit for bit."""
    tensors = [*of.student.parameters(), *of.teacher.parameters()]
    for each in (of.student_optimizer, of.teacher_optimizer):
        tensors += [value for entry in each.state_dict()["state"].values() for value in entry.values()]
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


# --- influence ------------------------------------------------------------------------------------------------------


def slow_influences(of: Pair, rows: Batch, direction: dict[str, Tensor], method: options.LGTM) -> Tensor:
    """One gradient for each row, and its product with the direction."""
    teacher_logits = logits(of.teacher, rows.teacher).detach()
    found = []
    with torch.enable_grad():
        of.student.eval()
        for row in range(len(rows.labels)):
            said = logits(of.student, rows.student)
            losses = LOSSES[method.distillation_loss](teacher_logits, said, method.temperature)
            slopes = torch.autograd.grad(losses[row], list(of.student.parameters()))
            found.append(sum((slope * v).sum() for slope, v in zip(slopes, direction.values(), strict=True)))
        of.student.train()
    return torch.stack(found)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_exact_influence_is_each_rows_gradient_times_the_direction(loss: str, dtype: torch.dtype, bound: float) -> None:
    of, rows, method = pair(dtype=dtype), batch(), lgtm(distillation_loss=loss, temperature=2.0)
    direction = direction_of(of, rows, method)
    teacher_logits = logits(of.teacher, rows.teacher)
    along = along_direction(of, rows, direction, method)
    mine, _ = teacher_loss(of, rows, teacher_logits, logits(of.student, rows.student), along, method)
    theirs = slow_influences(of, rows, direction, method)
    assert ((mine - theirs).norm() / theirs.norm()).item() < bound
    assert len({round(value, 9) for value in mine.tolist()}) == len(mine), "the rows differ, or the test says little"


def test_influences_of_a_loss_that_couples_rows_average_to_the_derivative_of_its_mean() -> None:
    of, rows, method = pair(), batch(), lgtm(distillation_loss="dist")
    direction = direction_of(of, rows, method)
    teacher_logits = logits(of.teacher, rows.teacher)
    along = along_direction(of, rows, direction, method)
    mine, _ = teacher_loss(of, rows, teacher_logits, logits(of.student, rows.student), along, method)
    with evaluating(of.student), torch.enable_grad():
        mean = LOSSES["dist"](teacher_logits.detach(), logits(of.student, rows.student), 1.0).mean()
        slopes = torch.autograd.grad(mean, list(of.student.parameters()))
    theirs = sum((slope * v).sum() for slope, v in zip(slopes, direction.values(), strict=True))
    assert mine.mean().item() == pytest.approx(float(theirs), rel=1e-11)


def test_the_error_of_the_finite_difference_falls_with_the_square_of_its_radius() -> None:
    of, rows = pair(), batch()
    direction = direction_of(of, rows, lgtm())
    teacher_logits = logits(of.teacher, rows.teacher).detach()

    def found(method: options.LGTM) -> Tensor:
        along = along_direction(of, rows, direction, method)
        return along.derivative(lambda moved: kl(teacher_logits, moved)).detach()

    exact = found(lgtm())
    errors = [
        (found(lgtm(influence="finite_difference", finite_difference_radius=radius)) - exact).norm().item()
        for radius in (1e-1, 1e-2, 1e-3)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log10(coarse / fine) == pytest.approx(2, abs=0.1)


def test_influence_does_not_change_with_constants_on_the_logits_and_grows_with_the_direction() -> None:
    of, rows, method = pair(), batch(), lgtm()
    direction = direction_of(of, rows, method)
    teacher_logits = logits(of.teacher, rows.teacher).detach()
    along = along_direction(of, rows, direction, method)
    plain = along.derivative(lambda moved: kl(teacher_logits, moved))
    moved = along.derivative(lambda moved: kl(teacher_logits + torch.randn(5, 1).double(), moved - 2.5))
    assert torch.allclose(plain, moved, rtol=1e-10)
    tripled = along_direction(of, rows, {name: 3 * entry for name, entry in direction.items()}, method)
    assert torch.allclose(tripled.derivative(lambda z: kl(teacher_logits, z)), 3 * plain, rtol=1e-10)
    assert isinstance(along, influences.Tangent)
    p = along.logits.softmax(dim=1)
    shift = p * (along.velocity - (p * along.velocity).sum(dim=1, keepdim=True))
    assert shift.sum(dim=1).abs().max() < 1e-13 < shift.abs().max()


def test_equal_rows_have_equal_influence_wherever_they_stand() -> None:
    of, method = pair(), lgtm()
    order = torch.tensor([2, 0, 1, 2])
    three = batch(3)
    four = Batch({n: t[order] for n, t in three.student.items()}, {n: t[order] for n, t in three.teacher.items()}, three.labels[order])  # fmt: skip
    direction = direction_of(of, three, method)
    found = []
    for rows in (three, four):
        along = along_direction(of, rows, direction, method)
        found.append(teacher_loss(of, rows, logits(of.teacher, rows.teacher), logits(of.student, rows.student), along, method)[0])  # fmt: skip
    assert torch.allclose(found[1], found[0][order], rtol=1e-10)


def test_dropout_in_the_influence_pass_is_drawn_once_and_only_where_it_is_asked_for() -> None:
    of, rows = pair(dropout=0.3), batch()
    direction = direction_of(of, rows, lgtm())

    def velocity(method: options.LGTM, seed: int) -> Tensor:
        torch.manual_seed(seed)
        along = along_direction(of, rows, direction, method)
        return along.derivative(lambda moved: kl(torch.zeros_like(moved), moved)).detach()

    assert torch.equal(velocity(lgtm(), 1), velocity(lgtm(), 2))
    with_dropout = lgtm(influence_dropout=True)
    assert torch.equal(velocity(with_dropout, 1), velocity(with_dropout, 1))
    assert not torch.equal(velocity(with_dropout, 1), velocity(with_dropout, 2))
    fine = lgtm(influence_dropout=True, influence="finite_difference", finite_difference_radius=1e-4)
    # The same masks ahead and behind: another pair of masks would be far off.
    torch.manual_seed(1)
    ahead = along_direction(of, rows, direction, fine)
    assert isinstance(ahead, influences.Difference)
    assert (ahead.ahead - ahead.behind).abs().max() < 1e-2


# --- the teacher's gradient -----------------------------------------------------------------------------------------


def test_the_teachers_gradient_is_that_of_the_authors_algorithm() -> None:
    method = lgtm(influence="finite_difference", influence_scale=300.0, distillation_share=0.7)
    of, rows = pair(), batch()
    theirs = plain_step(copy_of(of), rows, feedback(), method, TRAINING)
    assert relative(gradient_of_teacher(of, rows, method), theirs) < 1e-11
    without = gradient_of_teacher(of, rows, lgtm(influence_scale=0.0))
    assert relative(without, theirs) > 1e-3, "influence weighs something, or the test says nothing"
    exact = relative(gradient_of_teacher(of, rows, method.model_copy(update={"influence": "exact"})), theirs)
    finer = method.model_copy(update={"finite_difference_radius": 1e-3})
    closer = relative(
        gradient_of_teacher(of, rows, method.model_copy(update={"influence": "exact"})),
        plain_step(copy_of(of), rows, feedback(), finer, TRAINING),
    )
    assert math.log10(exact / closer) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_whole_step_is_that_of_the_authors_algorithm(temperature: float) -> None:
    """Also with softened distributions: neither knows a factor of the temperature's square."""
    method = lgtm(influence="finite_difference", influence_scale=300.0, temperature=temperature, distillation_share=0.8)
    mine, theirs = pair(), pair()
    for number in range(3):
        rows, back = batch(seed=20 + number), feedback(seed=30 + number)
        learn_lgtm(mine, rows, back, method, TRAINING)
        plain_step(theirs, rows, back, method, TRAINING)
    for one, other in ((mine.student, theirs.student), (mine.teacher, theirs.teacher)):
        assert relative(list(one.parameters()), list(other.parameters())) < 1e-10


def copy_of(of: Pair) -> Pair:
    """Models and optimizers of their own, in the same state."""
    student, teacher = copy.deepcopy(of.student), copy.deepcopy(of.teacher)
    made = Pair(student, optimizer(student), teacher, optimizer(teacher))
    made.student_optimizer.load_state_dict(copy.deepcopy(of.student_optimizer.state_dict()))
    made.teacher_optimizer.load_state_dict(copy.deepcopy(of.teacher_optimizer.state_dict()))
    return made


def test_the_official_mode_is_a_shift_of_the_soft_target() -> None:
    of, rows, method = pair(), batch(), lgtm(influence_scale=500.0)
    direction = direction_of(of, rows, method)
    along = along_direction(of, rows, direction, method)
    assert isinstance(along, influences.Tangent)
    p = logits(of.student, rows.student).softmax(dim=1).detach()
    shift = p * (along.velocity - (p * along.velocity).sum(dim=1, keepdim=True))
    target = p - 500.0 * of.teacher_optimizer.param_groups[0]["lr"] * shift
    teacher_logits = logits(of.teacher, rows.teacher)
    loss = 0.4 * -(target * teacher_logits.log_softmax(dim=1)).sum(dim=1).mean()
    loss = loss + 0.6 * functional.cross_entropy(teacher_logits, rows.labels)
    theirs = list(torch.autograd.grad(loss, list(of.teacher.parameters())))
    assert relative(gradient_of_teacher(of, rows, method, direction), theirs) < 1e-12


def test_the_meta_mode_is_the_gradient_through_a_step_of_gradient_descent() -> None:
    of, rows, method = pair(), batch(), lgtm(mode="meta", distillation_share=0.6)
    rate = of.student_optimizer.param_groups[0]["lr"] = 0.05
    arguments, labels = feedback()
    of.student.set_attn_implementation("eager")  # the fused kernels have no second derivative
    weights = dict(of.student.named_parameters())
    teacher_logits = logits(of.teacher, rows.teacher)
    student_logits = logits(of.student, rows.student)
    loss = 0.6 * kl(teacher_logits, student_logits).mean() + 0.4 * functional.cross_entropy(student_logits, rows.labels)
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    pilot = {name: weight - rate * slope for (name, weight), slope in zip(weights.items(), slopes, strict=True)}
    feedback_loss = functional.cross_entropy(functional_call(of.student, pilot, (), arguments).logits, labels)
    direction = torch.autograd.grad(feedback_loss, list(pilot.values()), retain_graph=True)
    theirs = list(torch.autograd.grad(feedback_loss, list(of.teacher.parameters())))
    mine = gradient_of_teacher(of, rows, method, dict(zip(pilot, direction, strict=True)))
    assert relative(mine, theirs) < 1e-11


def test_official_and_meta_agree_where_teacher_and_student_do() -> None:
    """Their influence terms differ by which side is the target; where both say the same, the gradients are one."""
    of, rows = pair(), batch()
    of = Pair(of.student, of.student_optimizer, copy.deepcopy(of.student), optimizer(of.student))
    direction = direction_of(of, rows, lgtm())
    along = along_direction(of, rows, direction, lgtm())
    teacher_logits = logits(of.teacher, rows.teacher)
    official = along.derivative(lambda moved: kl(moved, teacher_logits)).mean()
    meta = along.derivative(lambda moved: kl(teacher_logits, moved)).mean()
    parameters = list(of.teacher.parameters())
    mine = torch.autograd.grad(official, parameters, retain_graph=True)
    assert relative(list(mine), list(torch.autograd.grad(meta, parameters))) < 1e-11


@dataclass
class Constant:
    """Influence that is the same for every row."""

    value: float
    logits: Tensor

    def derivative(self, loss: Any) -> Tensor:
        return torch.full_like(loss(self.logits), self.value)


@pytest.mark.parametrize(("influence", "weight"), [(1.0, 1.0), (-0.5, -0.5), (70.0, 2.0), (-70.0, -2.0)])
def test_the_weighted_mode_weighs_the_distillation_losses_and_clips(influence: float, weight: float) -> None:
    of, rows, method = (
        pair(),
        batch(),
        lgtm(mode="weighted", influence_clip=2.0, distillation_loss="ce", temperature=3.0),
    )
    teacher_logits, student_logits = logits(of.teacher, rows.teacher), logits(of.student, rows.student).detach()
    along: Any = Constant(influence, student_logits)
    found, loss = teacher_loss(of, rows, teacher_logits, student_logits, along, method)
    auxiliary = 0.4 * ce(student_logits, teacher_logits, 3.0).mean() + 0.6 * functional.cross_entropy(
        teacher_logits, rows.labels
    )
    assert (loss - auxiliary).item() == pytest.approx(
        weight * ce(teacher_logits, student_logits, 3.0).mean().item(), rel=1e-9
    )
    assert found.tolist() == [influence] * 5


def test_without_influence_the_step_is_that_of_prokt_bit_for_bit() -> None:
    mine, theirs = pair(dtype=torch.float32), pair(dtype=torch.float32)
    prokt = options.ProKT(kind="prokt")
    for number in range(3):
        rows = batch(seed=number)
        one = learn_lgtm(mine, rows, feedback(seed=number), lgtm(influence_scale=0.0), TRAINING)
        assert one.loss == learn_prokt(theirs, rows, prokt, TRAINING).loss
        assert state(mine) == state(theirs)


# --- the whole step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["official", "weighted", "meta"])
@pytest.mark.parametrize("how", ["exact", "finite_difference"])
def test_measuring_influence_leaves_the_student_and_its_optimizer_as_they_were(mode: str, how: str) -> None:
    of, rows, method = pair(dropout=0.1, dtype=torch.float32), batch(), lgtm(mode=mode, influence=how)
    before = state(of)
    along_direction(of, rows, direction_of(of, rows, method), method)
    assert state(of) == before
    assert of.student.training
    assert all(parameter.grad is None for parameter in (*of.student.parameters(), *of.teacher.parameters()))
    learn_lgtm(of, rows, feedback(), method, TRAINING)
    assert of.student.training
    assert of.teacher.training
    assert of.student.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in (*of.student.parameters(), *of.teacher.parameters()))


def test_the_same_seed_gives_the_same_step() -> None:
    found = []
    for seed in (5, 5, 6):
        of = pair(dropout=0.2, dtype=torch.float32)
        torch.manual_seed(seed)
        learn_lgtm(of, batch(), feedback(), lgtm(), TRAINING)
        found.append(state(of))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["prokt", "lgtm"])
def test_the_teacher_is_taken_without_dropout_where_the_student_learns_from_it(kind: str) -> None:
    told = []
    for seed in (1, 2):
        of, rows = pair(), batch()
        resting = Pair(of.student, of.student_optimizer, model(2, 2, dropout=0.4), of.teacher_optimizer)
        torch.manual_seed(seed)
        if kind == "lgtm":
            told.append(learn_lgtm(resting, rows, feedback(), lgtm(), TRAINING).loss)
        else:
            told.append(learn_prokt(resting, rows, options.ProKT(kind="prokt"), TRAINING).loss)
        assert resting.teacher.training
    assert told[0] == told[1]


def test_prokts_teacher_is_held_near_the_student_without_dropout() -> None:
    told = []
    for seed in (1, 2):
        of = pair()
        of = Pair(model(1, 1, dropout=0.4), of.student_optimizer, of.teacher, of.teacher_optimizer)
        torch.manual_seed(seed)
        told.append(learn_prokt(of, batch(), options.ProKT(kind="prokt"), TRAINING).figures["teacher_loss"])
    assert told[0] == told[1]


@pytest.mark.parametrize("learn", [learn_online, learn_dml])
def test_peers_hear_each_other_with_dropout(learn: Any) -> None:
    told = set()
    for seed in (1, 2):
        of = pair()
        of = Pair(of.student, of.student_optimizer, model(2, 2, dropout=0.4), of.teacher_optimizer)
        torch.manual_seed(seed)
        told.add(learn(of, batch(), options.DML(kind="dml"), TRAINING).loss)
    assert len(told) == 2


def test_the_student_learns_from_the_teacher_of_after_its_step() -> None:
    of, rows = pair(), batch()
    before = logits(of.student, rows.student).detach()
    for group in of.teacher_optimizer.param_groups:
        group["lr"] = 0.05
    old = kl(logits(of.teacher, rows.teacher), before).mean().item()
    told = learn_lgtm(of, rows, feedback(), lgtm(distillation_share=1.0), TRAINING).loss
    new = kl(logits(of.teacher, rows.teacher), before).mean().item()
    assert told == pytest.approx(new, rel=1e-9)
    assert abs(new - old) > 1e-3


def test_zero_heads_say_nothing_at_first_and_only_the_last_layer_learns() -> None:
    of, rows = pair(), batch()
    for each in (of.student, of.teacher):
        for parameter in each.classifier.out_proj.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(logits(of.teacher, rows.teacher), torch.zeros(5, CLASSES, dtype=torch.float64))
    gradient = gradient_of_teacher(of, rows, lgtm())
    names = [name for name, _ in of.teacher.named_parameters()]
    learning = {name for name, slope in zip(names, gradient, strict=True) if slope.abs().max() > 1e-15}
    assert learning == {"classifier.out_proj.weight", "classifier.out_proj.bias"}


# --- by hand --------------------------------------------------------------------------------------------------------


class Slope(nn.Module):
    """Two classes, one weight: logits (weight * x, 0)."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        first = self.weight * x
        return type("Output", (), {"logits": torch.stack([first, torch.zeros_like(first)], dim=1)})


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def by_hand(student: float = 0.5, teacher: float = -0.3) -> Pair:
    models = Slope(student), Slope(teacher)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=rate, weight_decay=0.0) for each, rate in zip(models, (0.1, 0.2), strict=True)]  # fmt: skip
    return Pair(models[0], optimizers[0], models[1], optimizers[1])


ONE_ROW = Batch({"x": torch.tensor([1.0]).double()}, {"x": torch.tensor([1.0]).double()}, torch.tensor([0]))
FREE = options.Training(learning_rate=0.1, max_grad_norm=1000.0)


def test_a_step_of_prokt_by_hand() -> None:
    of = by_hand()
    learn_prokt(of, ONE_ROW, options.ProKT(kind="prokt", distillation_share=1.0), FREE)
    # Teacher: 0.4 (p_T - p_S) + 0.6 (p_T - 1) < 0, so AdamW's first step is + 0.2. Student: p_S - p_T > 0, so - 0.1.
    assert of.teacher.weight.item() == pytest.approx(-0.3 + 0.2, abs=1e-6)
    assert sigmoid(0.5) > sigmoid(-0.1)
    assert of.student.weight.item() == pytest.approx(0.5 - 0.1, abs=1e-6)


@pytest.mark.parametrize("kind", ["online", "dml"])
def test_a_step_of_online_distillation_and_of_mutual_learning_by_hand(kind: str) -> None:
    """They differ where the teacher's step takes it past the student: the student then turns the other way."""
    of = by_hand(student=-0.2)
    learn = {"online": learn_online, "dml": learn_dml}[kind]
    wish = {"kind": kind, "distillation_share": 1.0, "teacher_distillation_share": 0.4}
    learned = learn(of, ONE_ROW, {"online": options.Online, "dml": options.DML}[kind].model_validate(wish), FREE)
    p_s, p_t = sigmoid(-0.2), sigmoid(-0.3)
    # Teacher: 0.4 (p_T - p_S) + 0.6 (p_T - 1) < 0, so + 0.2, from below the student to above it.
    teacher_loss = 0.4 * divergence(p_s, p_t) - 0.6 * math.log(p_t)
    assert of.teacher.weight.item() == pytest.approx(-0.3 + 0.2, abs=1e-6)
    assert learned.figures["teacher_loss"] == pytest.approx(teacher_loss, rel=1e-6)
    heard, step = {"online": (p_t, -0.1), "dml": (sigmoid(-0.1), 0.1)}[kind]
    assert of.student.weight.item() == pytest.approx(-0.2 + step, abs=1e-6)
    assert learned.loss == pytest.approx(divergence(heard, p_s), rel=1e-5)


def test_mutual_learning_is_symmetric_and_half_of_the_papers_loss() -> None:
    rows, wish = batch(), options.DML(kind="dml")
    one, other = (logits(model, rows.student) for model in (pair().student, pair().teacher))
    mine = student_loss(other, one, rows.labels, wish)
    assert mine.item() == auxiliary_loss(one, other, rows.labels, wish).item()
    paper = functional.cross_entropy(one, rows.labels) + kl(other, one).mean()
    assert mine.item() == pytest.approx(paper.item() / 2, rel=1e-12)


def divergence(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("mode", ["official", "weighted", "meta"])
def test_a_step_of_lgtm_by_hand(mode: str) -> None:
    of, method = by_hand(), lgtm(mode=mode, influence_scale=2.0, distillation_share=1.0)
    back = {"x": torch.tensor([2.0]).double()}, torch.tensor([1])
    p_s, p_t = sigmoid(0.5), sigmoid(-0.3)
    # The student's gradient p_S - p_T is positive: AdamW's first step takes the pilot to 0.4.
    v = 2 * sigmoid(2 * 0.4)  # d/dw CE(class 1, (2 w, 0)) = 2 p
    influence = (p_s - p_t) * v
    slope_of_p = p_s * (1 - p_s) * v
    auxiliary = 0.4 * (p_t - p_s) + 0.6 * (p_t - 1)
    log_odds = math.log(p_t / (1 - p_t)) - math.log(p_s / (1 - p_s))
    expected = {
        "official": auxiliary + 2.0 * 0.2 * 0.4 * slope_of_p,
        "weighted": auxiliary + min(1.0, 2.0 * influence) * p_t * (1 - p_t) * log_odds,
        "meta": 2.0 * 0.1 * p_t * (1 - p_t) * v,
    }
    teacher_logits, student_logits = logits(of.teacher, ONE_ROW.teacher), logits(of.student, ONE_ROW.student)
    direction, told = feedback_gradient(of, ONE_ROW, teacher_logits, student_logits, back, method, FREE)
    assert direction["weight"].item() == pytest.approx(v, rel=1e-6)
    assert told == pytest.approx(-math.log(1 - sigmoid(0.8)), rel=1e-6)
    along = along_direction(of, ONE_ROW, direction, method)
    found, loss = teacher_loss(of, ONE_ROW, teacher_logits, student_logits, along, method)
    assert found.item() == pytest.approx(influence, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, list(of.teacher.parameters()))
    assert gradient.item() == pytest.approx(expected[mode], rel=1e-6)

    learned = learn_lgtm(by_hand(), ONE_ROW, back, method, FREE)
    assert learned.measured is not None
    assert learned.measured.influence.item() == pytest.approx(influence, rel=1e-6)
    assert learned.measured.student[0].tolist() == pytest.approx([p_s, 1 - p_s])
    assert learned.measured.teacher[0].tolist() == pytest.approx([p_t, 1 - p_t])


def test_no_feedback_is_a_step_of_prokt_and_in_meta_mode_one_of_the_student_alone() -> None:
    mine, theirs = pair(dtype=torch.float32), pair(dtype=torch.float32)
    learned = learn_lgtm(mine, batch(), None, lgtm(), TRAINING)
    assert (learned.measured, set(learned.figures)) == (None, {"teacher_loss"})
    learn_prokt(theirs, batch(), options.ProKT(kind="prokt"), TRAINING)
    assert state(mine) == state(theirs)
    of = pair(dtype=torch.float32)
    before = [parameter.clone() for parameter in of.teacher.parameters()]
    learn_lgtm(of, batch(), None, lgtm(mode="meta"), TRAINING)
    assert all(torch.equal(one, other) for one, other in zip(before, of.teacher.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["official", "weighted", "meta"])
def test_a_step_in_parts_is_the_step_of_the_whole(mode: str) -> None:
    steps = {parts: TRAINING.model_copy(update={"gradient_accumulation": parts}) for parts in (1, 3)}
    pairs = {parts: pair(dropout=0.0) for parts in steps}
    told = {
        parts: learn_lgtm(pairs[parts], batch(), feedback(), lgtm(mode=mode), training)
        for parts, training in steps.items()
    }
    assert told[3].figures == pytest.approx(told[1].figures, rel=1e-9)
    assert told[1].measured is not None
    assert told[3].measured is not None
    torch.testing.assert_close(told[3].measured.influence, told[1].measured.influence)
    for one, other in ((pairs[1].student, pairs[3].student), (pairs[1].teacher, pairs[3].teacher)):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            # Rounding moves what has a gradient of zero, such as the bias of the keys, by AdamW's step of it.
            torch.testing.assert_close(theirs, mine, rtol=1e-9, atol=1e-10)

"""The methods whose teacher learns before the student: a step of each by hand, or against its formula in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sqlalchemy import Engine
from torch.func import functional_call
from torch.nn import functional

from app import options
from app.errors import InvalidSpec
from tests.support import add_dataset, run, sentences, submit, tiny_spec
from tests.workers.pairs import CLASSES, TRAINING, batch, feedback, model, optimizer, pair
from tests.workers.test_lgtm_job import TEACHER, series
from tests.workers.test_lgtm_step import FREE, ONE_ROW, by_hand, divergence, sigmoid
from workers.training.fixed_teacher import anchor_of, dist_loss, learn_from_fixed, pkd_loss, skd_loss
from workers.training.meta_distill import learn_meta_distill, meta_loss
from workers.training.pesf_kd import learn_pesf_kd
from workers.training.run import Adapter


def method(kind: str, **values: Any) -> Any:
    return TypeAdapter(options.Method).validate_python({"kind": kind, **values})


@pytest.mark.parametrize("kind", ["kd", "takd", "rco"])
def test_a_step_of_distillation_from_a_fixed_teacher_by_hand(kind: str) -> None:
    of = by_hand(student=0.5, teacher=-0.3)
    learned = learn_from_fixed(of, ONE_ROW, method(kind, distillation_share=0.25), FREE)
    p_s, p_t = sigmoid(0.5), sigmoid(-0.3)
    assert learned.loss == pytest.approx(0.25 * divergence(p_t, p_s) - 0.75 * math.log(p_s), rel=1e-5)
    # 0.25 (p_S - p_T) + 0.75 (p_S - 1) < 0, so AdamW's first step is + 0.1.
    assert of.student.weight.item() == pytest.approx(0.6, abs=1e-6)
    assert of.teacher.weight.item() == pytest.approx(-0.3)


@pytest.mark.parametrize(("squared", "factor"), [(True, 9.0), (False, 1.0)])
def test_the_square_of_the_temperature_is_there_when_asked_for(squared: bool, factor: float) -> None:
    wish = {"temperature": 3.0, "temperature_squared": squared, "distillation_share": 1.0}
    learned = learn_from_fixed(by_hand(), ONE_ROW, method("kd", **wish), FREE)
    assert learned.loss == pytest.approx(factor * divergence(sigmoid(-0.1), sigmoid(0.5 / 3)), rel=1e-5)
    plain = [
        learn_from_fixed(
            by_hand(),
            ONE_ROW,
            method(
                "kd",
                distillation_loss="mse",
                **wish,
            ),
            FREE,
        ).loss
        for wish in (wish, {"distillation_share": 1.0})
    ]
    assert plain[0] == plain[1] == pytest.approx(0.32)


def test_a_step_of_skd_by_hand() -> None:
    """Two classes: the student's logits are at +- 2, the teacher's on the other side."""
    of = by_hand(student=0.5, teacher=-0.3)
    learned = learn_from_fixed(of, ONE_ROW, method("skd", multiplier=2.0, distillation_share=0.5), FREE)
    # The label's cross-entropy is of the logits on the sphere, too.
    assert learned.loss == pytest.approx(
        0.5 * divergence(sigmoid(-4), sigmoid(4)) - 0.5 * math.log(sigmoid(4)), rel=1e-5
    )
    assert of.student.weight.item() == pytest.approx(0.4, abs=1e-6)


def test_skd_does_not_see_shift_and_scale_of_the_logits() -> None:
    of, wish = pair(), method("skd", temperature=2.0)
    before = skd_loss(of, batch(), wish, TRAINING)
    with torch.no_grad():
        for each, scale in ((of.student, 3.0), (of.teacher, 0.2)):
            each.classifier.out_proj.weight.mul_(scale)  # type: ignore[union-attr, operator]
            each.classifier.out_proj.bias.mul_(scale).add_(1.5)  # type: ignore[union-attr, operator]
    assert skd_loss(of, batch(), wish, TRAINING).item() == pytest.approx(before.item(), rel=1e-9)


def test_a_step_of_dist_by_hand() -> None:
    """One row of two classes: the correlation over the classes is -1 or 1, over one row there is none."""
    of = by_hand(student=0.5, teacher=-0.3)
    wish = method("dist", row_weight=3.0, class_weight=5.0, distillation_share=0.5)
    loss = dist_loss(of, ONE_ROW, wish, FREE)
    assert loss.item() == pytest.approx(0.5 * (3 * 2 + 5 * 1) - 0.5 * math.log(sigmoid(0.5)), rel=1e-5)


def test_dist_softens_both_sides_and_has_no_square_of_the_temperature() -> None:
    of = pair()
    softened = dist_loss(of, batch(), method("dist", temperature=2.0, distillation_share=1.0), TRAINING)
    with torch.no_grad():
        for each in (of.student, of.teacher):
            for parameter in each.classifier.out_proj.parameters():  # type: ignore[union-attr]
                parameter.div_(2)
    halved = dist_loss(of, batch(), method("dist", distillation_share=1.0), TRAINING)
    assert softened.item() == pytest.approx(halved.item(), rel=1e-9)
    assert softened.item() > 0.1


@pytest.mark.parametrize("kind", ["kd", "skd", "dist", "pkd", "pesf_kd", "meta_distill"])
def test_a_teacher_that_has_learned_teaches_without_dropout(kind: str) -> None:
    told = []
    for seed in (1, 2):
        of = pair()
        of = type(of)(of.student, of.student_optimizer, model(2, 2, dropout=0.4), of.teacher_optimizer)
        if kind == "pesf_kd":
            of.teacher.adapter = Adapter(16, 8, CLASSES, dropout=0.0).double()
            of = type(of)(of.student, of.student_optimizer, of.teacher, optimizer(of.teacher.adapter))
        torch.manual_seed(seed)
        if kind == "pesf_kd":
            told.append(learn_pesf_kd(of, batch(), method(kind), TRAINING).loss)
        elif kind == "meta_distill":
            told.append(learn_meta_distill(of, batch(), feedback(), method(kind), TRAINING).figures)
        else:
            told.append(learn_from_fixed(of, batch(), method(kind), TRAINING).loss)
    assert told[0] == told[1]


def test_pkd_is_its_formula() -> None:
    of, rows = pair(), batch()
    of = type(of)(
        of.teacher, of.student_optimizer, of.student, of.teacher_optimizer
    )  # student of 2 layers, teacher of 1
    wish = method("pkd", hidden_weight=7.0, distillation_share=0.4, temperature=2.0)
    said, own = (each(**rows.student, output_hidden_states=True) for each in (of.teacher.eval(), of.student))
    unit = [output.hidden_states[1][:, 0] / output.hidden_states[1][:, 0].norm(dim=1, keepdim=True) for output in (said, own)]  # fmt: skip
    inner = (unit[0] - unit[1]).square().mean()
    p, q = (output.logits.div(2).softmax(dim=1) for output in (said, own))
    kl = (p * (p / q).log()).sum(dim=1).mean()
    expected = 0.4 * 4 * kl + 0.6 * functional.cross_entropy(own.logits, rows.labels) + 7 * inner
    assert pkd_loss(of, rows, wish, TRAINING).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_anchors_take_turns_for_equal_times_and_the_last_comes_last() -> None:
    assert [anchor_of(epoch, 6, 3) for epoch in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [anchor_of(epoch, 2, 3) for epoch in range(2)] == [1, 2]
    assert [anchor_of(epoch, 3, 1) for epoch in range(3)] == [0, 0, 0]


def test_an_adapter_that_adds_nothing_teaches_like_its_teacher_and_then_learns() -> None:
    mine, theirs, rows = pair(dtype=torch.float32), pair(dtype=torch.float32), batch()
    adapter = Adapter(16, 8, CLASSES, dropout=0.0)
    mine.teacher.adapter = adapter
    mine = type(mine)(mine.student, mine.student_optimizer, mine.teacher, optimizer(adapter))
    body = {name: tensor.clone() for name, tensor in mine.teacher.state_dict().items() if "adapter" not in name}
    wish = {"temperature": 2.0, "distillation_share": 0.7}
    learned = learn_pesf_kd(mine, rows, method("pesf_kd", **wish), TRAINING)
    plain = learn_from_fixed(theirs, rows, method("kd", **wish), TRAINING)
    assert learned.loss == pytest.approx(plain.loss, rel=1e-6)
    for one, other in zip(mine.student.parameters(), theirs.student.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert all(torch.equal(tensor, mine.teacher.state_dict()[name]) for name, tensor in body.items())
    # The adapter's first gradient is that of 0.7 * 4 KL(T, S) + 0.3 CE(y, T) in its output; AdamW steps against its sign.
    said = theirs.teacher.eval()(**rows.teacher).logits.detach().requires_grad_()
    student = pair(dtype=torch.float32).student(**rows.student).logits.detach()
    p, log_q = (said / 2).softmax(dim=1), (student / 2).log_softmax(dim=1)
    loss = 0.7 * 4 * (p * ((said / 2).log_softmax(dim=1) - log_q)).sum(dim=1).mean()
    (slope,) = torch.autograd.grad(loss + 0.3 * functional.cross_entropy(said, rows.labels), said)
    assert torch.equal(adapter.layers[-1].bias.sign(), -slope.sum(dim=0).sign())


def test_the_meta_gradient_is_that_through_the_pilot_step() -> None:
    of, rows, back = pair(), batch(), feedback()
    wish = method("meta_distill", pilot_learning_rate=0.05, distillation_share=0.6, temperature=2.0)
    loss, told = meta_loss(of, rows, back, wish, TRAINING)
    mine = torch.autograd.grad(loss, list(of.teacher.parameters()))

    def plain_kl(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        p = (target / 2).softmax(dim=1)
        return 4 * (p * ((target / 2).log_softmax(dim=1) - (logits / 2).log_softmax(dim=1))).sum(dim=1).mean()

    for each in (of.student, of.teacher):
        each.eval()
        each.set_attn_implementation("eager")  # type: ignore[operator]
    said, logits = of.teacher(**rows.teacher).logits, of.student(**rows.student).logits
    whole = 0.6 * plain_kl(said, logits) + 0.4 * functional.cross_entropy(logits, rows.labels)
    names = [name for name, _ in of.student.named_parameters()]
    slopes = torch.autograd.grad(whole, list(of.student.parameters()), create_graph=True)
    pilot = {
        name: value - 0.05 * slope for (name, value), slope in zip(of.student.named_parameters(), slopes, strict=True)
    }
    assert list(pilot) == names
    through = functional.cross_entropy(functional_call(of.student, pilot, (), back[0]).logits, back[1])
    expected = torch.autograd.grad(through, list(of.teacher.parameters()))
    assert told == pytest.approx(through.item(), rel=1e-9)
    mine_all, expected_all = (torch.cat([slope.flatten() for slope in slopes]) for slopes in (mine, expected))
    assert torch.linalg.norm(0.05 * mine_all - expected_all) < 1e-9 * torch.linalg.norm(expected_all)


def test_a_step_of_meta_distillation_by_hand() -> None:
    """The feedback row is of class 1, where the student's weight should fall, so the teacher learns to say class 1."""
    of = by_hand(student=0.5, teacher=-0.3)
    back = {"x": torch.tensor([2.0]).double()}, torch.tensor([1])
    wish = method("meta_distill", distillation_share=1.0)
    learned = learn_meta_distill(of, ONE_ROW, back, wish, FREE)
    p_s, p_t = sigmoid(0.5), sigmoid(-0.3)
    pilot = 0.5 - 0.1 * (p_s - p_t)
    v = 2 * sigmoid(2 * pilot)
    assert learned.figures["feedback_loss"] == pytest.approx(-math.log(1 - sigmoid(2 * pilot)), rel=1e-6)
    assert learned.figures["teacher_loss"] == pytest.approx(-(p_s - p_t) * v, rel=1e-6)
    assert of.teacher.weight.item() == pytest.approx(-0.3 - 0.2, abs=1e-6)
    assert learned.loss == pytest.approx(divergence(sigmoid(-0.5), p_s), rel=1e-5)
    assert of.student.weight.item() == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize("kind", ["kd", "skd", "dist", "pkd", "takd", "rco", "pesf_kd", "meta_distill"])
def test_every_one_of_them_is_a_job(kind: str, database: Engine) -> None:
    wish = {"kind": kind, "teacher": TEACHER, "teacher_epochs": 1}
    job = run(
        submit(
            tiny_spec(
                add_dataset(sentences(40, 1)), validation_dataset_id=add_dataset(sentences(12, 2)),
                test_dataset_id=add_dataset(sentences(12, 3)), method=wish, student={**TEACHER, "num_layers": 1},
                training={"epochs": 1, "batch_size": 8, "learning_rate": 5e-3},
            )
        )
    )  # fmt: skip
    assert (job.status, job.error) == ("succeeded", None)
    found = series(job.id)
    parts = ["teacher", "assistant"] if kind == "takd" else ["teacher"]
    steps = 5 if kind != "meta_distill" else 4 + (len(found["fine_tuning_loss/teacher"]) > 4)
    for part in parts:
        assert len(found[f"fine_tuning_loss/{part}"]) == steps
        assert len(found[f"fine_tuning_macro_f1/{part}"]) == 1
    assert ("encoder_teacher_macro_f1" in found) == (kind == "meta_distill")
    phase = next(phase for phase in job.phases if phase.name == "training")
    assert phase.done == phase.total


def test_layers_of_different_widths_are_refused(database: Engine) -> None:
    wide = {"kind": "pkd", "teacher": {**TEACHER, "hidden_size": 64}}
    student = {**TEACHER, "num_layers": 1}
    job = run(submit(tiny_spec(add_dataset(sentences(40, 1)), method=wide, student=student)))
    assert (job.status, job.error and job.error["code"]) == ("failed", "widths_differ")


@pytest.mark.parametrize(
    ("assistant", "student"), [({"assistant_layers": 3}, {"num_layers": 1}), ({}, {"num_layers": None}), ({}, {"num_layers": 3})]
)  # fmt: skip
def test_an_assistant_deeper_than_its_teacher_is_refused_at_the_door(
    assistant: dict[str, Any], student: dict[str, Any], database: Engine
) -> None:
    method = {"kind": "takd", "teacher": {**TEACHER, "num_layers": 2}, **assistant}
    with pytest.raises(InvalidSpec) as refused:
        submit(tiny_spec(add_dataset(sentences(40, 1)), method=method, student={**TEACHER, **student}))
    faults = [(fault["pointer"], fault["code"]) for fault in refused.value.errors]
    assert faults == [("/method/assistant_layers", "assistant_too_deep")]

"""The training loop by itself: its schedule, what it counts, and which weights it leaves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from app import options, pretrained
from app.lifecycle import WorkFailed
from tests.support import TOPICS, sentences
from workers.reporter import MemoryReporter
from workers.training import lgtm, step
from workers.training.data import Tokens, tokenise
from workers.training.distill import distill
from workers.training.encoders import build_student
from workers.training.evaluation import predict_probabilities
from workers.training.run import HeldOut, Pool, Run, begin
from workers.training.schedule import learning_rate

ROWS = 30
WISH = options.Student(model="scratch", num_layers=1, hidden_size=32, vocab_size=300, max_length=24)


def method(**values: Any) -> options.Method:
    return TypeAdapter(options.Method).validate_python(values)


def prepared(
    chosen: options.Method, training: options.Training, barred: list[int] | None = None
) -> tuple[Run, Pool, HeldOut]:
    rows, held_out = sentences(ROWS, 1), sentences(15, 2)
    texts = [row["text"] for row in rows]
    source = pretrained.resolve("scratch", purpose="student", roots=[], allow_hub=False)
    student = build_student(WISH, TOPICS, texts, None, source, seed=0)
    teacher = torch.full((ROWS, 3), 0.1)
    for number, row in enumerate(rows):
        teacher[number, TOPICS.index(row["label"])] = 0.8
    is_barred = np.zeros(ROWS, bool)
    is_barred[barred or []] = True
    pool = Pool(tokenise(student.tokenizer, texts), teacher, np.arange(ROWS), is_barred)
    tokens = tokenise(student.tokenizer, [row["text"] for row in held_out])
    gold = np.array([TOPICS.index(row["label"]) for row in held_out])
    validation = HeldOut(tokens, np.arange(15), gold)
    if not isinstance(chosen, options.TaughtByEncoder):
        return begin(student, pool, chosen, training, 3), pool, validation
    encoder_teacher = build_student(WISH, TOPICS, texts, None, source, seed=1)
    pool = replace(pool, feedback=HeldOut(tokens, np.arange(10), gold[:10]))
    return begin(student, pool, chosen, training, 3, encoder_teacher), pool, validation


def trained(
    chosen: options.Method, training: options.Training, barred: list[int] | None = None
) -> tuple[Run, MemoryReporter]:
    run, pool, held_out = prepared(chosen, training, barred)
    report = MemoryReporter()
    return distill(run, pool, held_out, TOPICS, chosen, training, report), report


def values(report: MemoryReporter, name: str) -> list[float | None]:
    return [value for found, _, _, value in report.points if found == name]


def test_the_learning_rate_rises_and_falls_along_straight_lines() -> None:
    training = options.Training(learning_rate=1.0, warmup_ratio=0.2)
    rates = [learning_rate(step, 10, training) for step in range(11)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 8 / 8, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    flat = options.Training(learning_rate=1.0, warmup_ratio=0.0)
    assert [learning_rate(step, 4, flat) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_loop_is_plain_training_when_every_row_is_selected() -> None:
    """No selection against a loop written out in ten lines: the same weights, bit for bit."""
    training = options.Training(epochs=2, batch_size=8, learning_rate=5e-3, warmup_ratio=0.1)
    run, report = trained(method(kind="no_selection"), training)
    slow, pool, held_out = prepared(method(kind="no_selection"), training)
    model, labels, step = slow.student.model, pool.teacher.argmax(dim=1), 0
    best, best_weights = -1.0, model.state_dict()
    for epoch in range(2):
        model.train()
        order = np.random.Generator(np.random.PCG64([0, epoch])).permutation(ROWS)
        for start in range(0, ROWS, 8):
            rows = order[start : start + 8]
            slow.optimizer.param_groups[0]["lr"] = slow.optimizer.param_groups[1]["lr"] = learning_rate(
                step, 8, training
            )
            loss = torch.nn.functional.cross_entropy(model(**pool.tokens.batch(rows)).logits, labels[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            slow.optimizer.step()
            slow.optimizer.zero_grad()
            step += 1
        predicted = predict_probabilities(model, held_out.tokens).argmax(dim=1).numpy()
        score = values(report, "validation_macro_f1")[epoch] or 0.0
        assert values(report, "validation_accuracy")[epoch] == (predicted == held_out.gold).mean()
        if score > best:
            best, best_weights = score, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in run.student.model.state_dict().items():
        assert torch.allclose(tensor, best_weights[name], atol=1e-6), name


def test_the_weights_that_are_left_are_those_of_the_best_epoch() -> None:
    training = options.Training(epochs=4, batch_size=8, learning_rate=3e-2)
    run, pool, held_out = prepared(method(kind="no_selection"), training)
    report, kept = MemoryReporter(), []

    def keep(run: Run) -> None:
        kept.append({name: tensor.clone() for name, tensor in run.student.model.state_dict().items()})

    distill(run, pool, held_out, TOPICS, method(kind="no_selection"), training, report, on_epoch=keep)
    scores = [
        (macro_f1 or 0.0) + 1e-6 * (accuracy or 0.0)
        for macro_f1, accuracy in zip(
            values(report, "validation_macro_f1"), values(report, "validation_accuracy"), strict=True
        )
    ]
    best = int(np.argmax(scores))
    assert run.progress.best_epoch == best + 1
    assert run.progress.best_step == 4 * (best + 1)
    for name, tensor in run.student.model.state_dict().items():
        assert torch.equal(tensor, kept[best][name])
    assert not run.student.model.training


def test_what_is_counted_by_step_adds_up_to_what_is_counted_by_row() -> None:
    training = options.Training(epochs=3, batch_size=7, learning_rate=5e-3)
    run, report = trained(method(kind="random", ratio=0.4), training, barred=[0, 1, 2])
    selection = run.progress.selection()
    assert selection["seen"] == 3 * ROWS == run.ledger.offered.sum()
    assert selection["selected"] == run.ledger.selected.sum() == values(report, "selected")[-1]
    assert run.ledger.selected[:3].tolist() == [0, 0, 0]
    assert values(report, "seen") == sorted(values(report, "seen"))
    steps = sorted({step for name, step, _, _ in report.points if name == "seen"})
    assert steps == list(range(1, 3 * math.ceil(ROWS / 7) + 1))
    assert all(0 <= (ratio or 0) <= 1 for ratio in values(report, "ratio"))


@pytest.mark.parametrize("kind", sorted(options.Method.__args__[0].__args__, key=lambda entry: entry.__name__))  # type: ignore[attr-defined]
def test_batches_that_hold_barred_rows_only_spoil_no_rule(kind: type[options.Options]) -> None:
    chosen = method(kind=kind.model_fields["kind"].annotation.__args__[0])  # type: ignore[union-attr]
    training = options.Training(epochs=1, batch_size=1, learning_rate=1e-3)
    run, _ = trained(chosen, training, barred=list(range(0, ROWS, 2)))
    for name, tensor in run.rule_state.items():
        assert torch.isfinite(tensor.double()).all(), name
    assert all(torch.isfinite(tensor).all() for tensor in run.student.model.state_dict().values())
    assert run.ledger.selected[::2].sum() == 0


def test_the_ratio_of_a_class_is_of_all_its_rows_that_are_seen_barred_ones_too() -> None:
    training = options.Training(epochs=1, batch_size=ROWS, learning_rate=5e-3)
    run, report = trained(method(kind="random", ratio=0.5), training, barred=[0, 1, 3])
    ratios = [values(report, f"class_ratio/{topic}")[0] or 0.0 for topic in TOPICS]
    chosen = [run.ledger.selected[number::3].sum() for number in range(3)]  # the topics take turns
    assert ratios == pytest.approx([count / 10 for count in chosen])
    assert sum(chosen) == run.progress.selection()["selected"] > 0


def test_an_epoch_in_which_nothing_is_selected_leaves_student_and_optimizer_alone_and_is_told() -> None:
    chosen = method(kind="llkd", momentum=0.9999, floor=0.0)
    training = options.Training(epochs=1, batch_size=8, learning_rate=5e-3)
    run, pool, held_out = prepared(chosen, training)
    before = {name: tensor.clone() for name, tensor in run.student.model.state_dict().items()}
    run.rule_state |= {
        "teacher_level": torch.tensor(9.0).double(), "teacher_class": torch.ones(3).double(), "teacher_seen": torch.ones(3).bool(),
    }  # fmt: skip
    report = MemoryReporter()
    distill(run, pool, held_out, TOPICS, chosen, training, report)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.student.model.state_dict().items())
    assert not run.optimizer.state
    assert run.progress.selection()["selected"] == 0
    assert set(values(report, "train_loss")) == {None}
    assert [type for type, _, _ in report.events] == ["training.epoch", "training.starved"]


@pytest.mark.parametrize("kind", ["no_selection", "kd", "lgtm"])
def test_a_training_that_no_longer_computes_numbers_fails_and_says_so(kind: str) -> None:
    chosen, training = method(kind=kind), options.Training(epochs=1, batch_size=8, learning_rate=5e-3)
    run, pool, held_out = prepared(chosen, training)
    with torch.no_grad():
        run.student.model.classifier.dense.bias[3] = math.nan
    with pytest.raises(WorkFailed, match=r"lower training\.learning_rate") as failed:
        distill(run, pool, held_out, TOPICS, chosen, training, MemoryReporter())
    assert failed.value.code == "training_diverged"
    assert torch.isfinite(run.student.model.classifier.out_proj.weight).all()


def test_of_equally_good_epochs_the_first_is_kept() -> None:
    training = options.Training(epochs=3, batch_size=8, learning_rate=1e-12)
    run, report = trained(method(kind="no_selection"), training)
    assert len(set(values(report, "validation_macro_f1"))) == 1
    assert run.progress.best_epoch == 1


@pytest.mark.parametrize("kind", ["prokt", "meta_distill"])
def test_teacher_and_student_learn_with_dropout(kind: str) -> None:
    chosen, training = method(kind=kind), options.Training(epochs=1, batch_size=8, learning_rate=1e-3)
    run, pool, held_out = prepared(chosen, training)
    models = run.student.model, run.companions["teacher"].encoder.model
    assert [model.training for model in models] == [False, False], "as they are built"
    modes = []
    distill(
        run, pool, held_out, TOPICS, chosen, training, MemoryReporter(),
        on_epoch=lambda run: modes.extend(model.training for model in models),
    )  # fmt: skip
    assert modes == [True, True]


def test_biases_and_norms_are_not_decayed_and_each_model_has_its_own_rate() -> None:
    training = options.Training(epochs=1, batch_size=8, learning_rate=4e-3, weight_decay=0.3)
    run, _ = trained(method(kind="prokt", teacher={"learning_rate": 1e-3}), training)
    optimizers = run.optimizer, run.companions["teacher"].optimizer
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert {(parameter.ndim > 1) * 0.3 for parameter in group["params"]} == {group["weight_decay"]}
    own, theirs = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
    assert theirs == pytest.approx(own / 4)


@pytest.mark.parametrize("zero_heads", [True, False])
@pytest.mark.parametrize("kind", ["online", "dml", "prokt", "lgtm", "llkd_lgtm"])
def test_heads_begin_at_zero_where_the_method_says_so(kind: str, zero_heads: bool) -> None:
    chosen = method(kind=kind, zero_heads=zero_heads)
    run, _, _ = prepared(chosen, options.Training(learning_rate=1e-3))
    for encoder in (run.student, run.companions["teacher"].encoder):
        said = {bool(parameter.any()) for parameter in encoder.model.classifier.out_proj.parameters()}
        assert (said == {False}) == zero_heads
    assert method(kind=kind).zero_heads == (kind in ("online", "prokt"))  # type: ignore[union-attr]


def feedback_of(size: int, number: int, seed: int = 0) -> list[int]:
    """The rows of a batch of feedback; there are the rows 3 to 8, of one token each."""
    tokens = Tokens(np.arange(10, dtype=np.int32), np.arange(11), None, pad_token_id=99)
    feedback = HeldOut(tokens, np.arange(3, 9), np.arange(3, 9) % 3)
    arguments, labels = step.feedback_batch(feedback, size, number, seed, torch.device("cpu"))
    rows: list[int] = arguments["input_ids"][:, 0].tolist()
    assert labels.tolist() == [row % 3 for row in rows], "each row keeps its label"
    return rows


def test_feedback_rows_take_turns_and_are_shuffled_anew_in_every_round() -> None:
    rounds = [[row for part in range(3) for row in feedback_of(2, 3 * turn + part)] for turn in range(3)]
    assert [sorted(turn) for turn in rounds] == [list(range(3, 9))] * 3
    assert rounds[0] != rounds[1] != rounds[2]
    across = [row for number in range(3) for row in feedback_of(4, number)]
    assert across == rounds[0] + rounds[1], "a batch may end one round and begin the next"
    assert sorted(feedback_of(50, 0)) == list(range(3, 9)), "fewer rows than a batch wants are all of them"
    assert feedback_of(6, 0, seed=1) != feedback_of(6, 0)


def test_lgtm_asks_for_the_feedback_rows_in_turn_also_where_it_does_so_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def watched(feedback: HeldOut, size: int, number: int, *rest: Any) -> Any:
        asked.append((size, number))
        return step.feedback_batch(feedback, size, number, *rest)

    monkeypatch.setattr(lgtm, "feedback_batch", watched)
    training = options.Training(epochs=2, batch_size=8, learning_rate=5e-3)
    trained(method(kind="lgtm", influence_every=3, feedback_batch_size=5), training)
    trained(method(kind="lgtm", influence_every=4), training)
    assert asked == [(5, 0), (5, 1), (5, 2), (8, 0), (8, 1)], "of eight steps"


def test_llkd_lgtm_is_lgtm_on_the_rows_that_llkd_selects() -> None:
    training = options.Training(epochs=2, batch_size=8, learning_rate=5e-3)
    every_row = {"use_teacher_confidence": False, "use_student_uncertainty": False}
    mine, report = trained(method(kind="llkd_lgtm", selection=every_row), training)
    theirs, other = trained(method(kind="lgtm"), training)
    for one, another in (
        (mine.student, theirs.student),
        (mine.companions["teacher"].encoder, theirs.companions["teacher"].encoder),
    ):
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, another.model.state_dict()[name]), name
    assert mine.ledger.influence.tobytes() == theirs.ledger.influence.tobytes()
    assert values(report, "train_loss") == values(other, "train_loss")
    some, _ = trained(method(kind="llkd_lgtm", selection={"warm_up": "none"}), training)
    measured = ~np.isnan(some.ledger.influence)
    assert measured.sum() == some.progress.selection()["selected"] < 2 * ROWS
    assert measured.sum(axis=1).tolist() == some.ledger.selected.tolist()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> list[bytes]:
        training = options.Training(epochs=1, batch_size=8, learning_rate=5e-3, seed=seed)
        run, _ = trained(method(kind="random"), training)
        return [tensor.numpy().tobytes() for tensor in run.student.model.state_dict().values()]

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


def test_rows_read_by_length_give_the_logits_of_the_whole_batch_in_its_order(monkeypatch: pytest.MonkeyPatch):
    training = options.Training()
    run, *_ = prepared(method(kind="no_selection"), training)
    model = run.student.model.eval()
    tokens = tokenise(run.student.tokenizer, ["a" * length for length in (3, 15, 1, 9, 20, 2, 12)])
    rows = np.array([4, 2, 6, 0, 5, 3])
    monkeypatch.setitem(step.TRAIN_TOKENS_PER_BATCH, "cpu", 30)
    with torch.no_grad():
        together = step.logits_of(model, step.inputs(tokens, rows, model.device), training)
        by_length = step.logits_by_length(model, tokens, rows, training)
    assert len(set(tokens.lengths[rows].tolist())) > 2
    torch.testing.assert_close(by_length, together, rtol=1e-5, atol=1e-6)


def test_gradients_that_add_up_over_parts_are_those_of_the_whole_for_less_memory() -> None:
    run, pool = prepared(method(kind="no_selection"), options.Training())[:2]
    model, rows = run.student.model.eval(), pool.rows[:32]
    found: dict[int, tuple[list[torch.Tensor], int]] = {}
    for parts in (1, 4):
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        training = options.Training(gradient_accumulation=parts)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = step.logits_of(model, step.inputs(pool.tokens, rows, model.device), training)
            loss = torch.nn.functional.cross_entropy(logits, pool.teacher[rows].argmax(dim=1))
        found[parts] = list(torch.autograd.grad(loss, list(model.parameters()))), kept
    for whole, added in zip(found[1][0], found[4][0], strict=True):
        torch.testing.assert_close(added, whole, rtol=1e-3, atol=1e-6)
    assert found[4][1] < found[1][1] / 4

"""Predictions in row order whatever the batches, and scores that scikit-learn would give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from app import options
from app.pretrained import resolve
from workers.training.data import Tokens, tokenise
from workers.training.encoders import Student, build_student
from workers.training.evaluation import PredictionStopped, evaluate, predict_probabilities, warnings_of

LABELS = ["a", "b", "c"]
TEXTS = ["word " * (number * 7 % 23) + str(number) for number in range(40)]


@pytest.fixture(scope="module")
def student() -> Student:
    wish = options.Student(model="scratch", vocab_size=300, hidden_size=32, num_layers=2, max_length=64, dropout=0.5)
    source = resolve("scratch", purpose="student", roots=[], allow_hub=False)
    return build_student(wish, LABELS, TEXTS, None, source, 0)


@pytest.fixture(scope="module")
def tokens(student: Student) -> Tokens:
    return tokenise(student.tokenizer, TEXTS)


def one_by_one(student: Student, tokens: Tokens) -> torch.Tensor:
    with torch.no_grad():
        rows = [student.model.eval()(**tokens.batch(np.array([row]))).logits.softmax(1) for row in range(len(tokens))]
    return torch.cat(rows)


@pytest.mark.parametrize("budget", [1, 50, 100_000, None])
def test_predictions_equal_those_of_each_row_alone(student: Student, tokens: Tokens, budget: int | None) -> None:
    probabilities = predict_probabilities(student.model, tokens, tokens_per_batch=budget)
    assert probabilities.dtype == torch.float32
    assert torch.allclose(probabilities, one_by_one(student, tokens), atol=1e-6)


def test_predictions_come_in_the_order_of_the_rows_asked_for(student: Student, tokens: Tokens) -> None:
    rows = torch.tensor([7, 3, 39, 3])
    some = predict_probabilities(student.model, tokens, rows, tokens_per_batch=60)
    assert torch.allclose(some, one_by_one(student, tokens)[rows], atol=1e-6)
    assert predict_probabilities(student.model, tokens, rows[:0]).shape == (0, 3)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_has_no_dropout_and_leaves_the_mode_as_it_was(
    student: Student, tokens: Tokens, training: bool
) -> None:
    student.model.train(training)
    before = torch.get_rng_state()
    first = predict_probabilities(student.model, tokens)
    assert student.model.training == student.model.classifier.training == training
    assert torch.get_rng_state().equal(before)
    assert first.equal(predict_probabilities(student.model, tokens))


def test_a_stopped_prediction_leaves_the_mode_as_it_was(student: Student, tokens: Tokens) -> None:
    student.model.train()
    answers = iter([False, False, True])
    with pytest.raises(PredictionStopped):
        predict_probabilities(student.model, tokens, tokens_per_batch=50, should_stop=lambda: next(answers))
    assert student.model.training


def test_running_out_of_memory_halves_the_batches_and_goes_on(student: Student, tokens: Tokens) -> None:
    sizes: list[int] = []

    def small_device(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 100:
            raise torch.OutOfMemoryError

    hook = student.model.register_forward_pre_hook(small_device, with_kwargs=True)
    try:
        probabilities = predict_probabilities(student.model, tokens, tokens_per_batch=800)
    finally:
        hook.remove()
    assert torch.allclose(probabilities, one_by_one(student, tokens), atol=1e-6)
    assert [size > 100 for size in sizes] == [True, True, True] + [False] * (len(sizes) - 3)


def test_a_row_that_does_not_fit_alone_is_an_error(student: Student, tokens: Tokens) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    hook = student.model.register_forward_pre_hook(no_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            predict_probabilities(student.model, tokens)
    finally:
        hook.remove()


def test_scores_by_hand() -> None:
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.4, 0.0], [0.2, 0.7, 0.1], [0.9, 0.1, 0.0]])
    scores = evaluate(probabilities, ["a", "b", "b", None], LABELS, seed=0)
    assert scores["rows"] == 3
    assert scores["accuracy"] == pytest.approx(2 / 3)
    # a: precision 1/2, recall 1; b: precision 1, recall 1/2; c occurs nowhere.
    assert scores["macro_f1"] == pytest.approx(2 / 3)
    assert scores["per_class"] == {
        "a": {"f1": pytest.approx(2 / 3), "support": 1, "predicted": 2},
        "b": {"f1": pytest.approx(2 / 3), "support": 2, "predicted": 1},
        "c": {"f1": 0, "support": 0, "predicted": 0},
    }
    # Each row has a bin of its own: |1 - 0.8|, |0 - 0.6|, |1 - 0.7|, over 3 rows.
    assert scores["expected_calibration_error"] == pytest.approx((0.2 + 0.6 + 0.3) / 3, abs=1e-6)


def evaluation(gold: str, predicted: str) -> dict[str, Any]:
    """Of rows whose class is a letter from a to d each, and the letter that was predicted."""
    labels = list("abcd")
    probabilities = torch.eye(4)[[labels.index(name) for name in predicted]]
    return {"validation": None, "test": {"student": evaluate(probabilities, list(gold), labels, seed=0)}}


def test_a_student_that_has_only_one_answer_is_told_of() -> None:
    [warning] = warnings_of(evaluation("a" * 5 + "b" * 5, "a" * 10))
    assert warning["code"] == "classes_missed"
    assert warning["split"] == "test"
    assert "answers 'a' for every one of 10 rows" in warning["message"]


def test_labels_that_a_student_never_answers_are_named_the_most_frequent_first() -> None:
    [warning] = warnings_of(evaluation("a" * 50 + "b" * 6 + "c" * 7 + "d" * 9, "a" * 70 + "dd"))
    assert "never answers 'c' (7 rows), 'b' (6 rows). Give" in warning["message"]


def test_a_class_of_few_rows_or_none_may_be_missed() -> None:
    assert warnings_of(evaluation("a" * 50 + "b" * 4, "a" * 54)) == []
    assert warnings_of(evaluation("a" * 995 + "b" * 9, "a" * 1003 + "c")) == []
    assert warnings_of(evaluation("a" * 60 + "b" * 40, "a" * 60 + "b" * 40)) == []


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learns_on_names_with_classes_the_labels_lack(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(60, 3, generator=generator).softmax(1)
    names = [*LABELS, "unknown", "other"]
    gold = [names[index] for index in torch.randint(5, (60,), generator=generator).tolist()]
    predicted = [LABELS[index] for index in probabilities.argmax(1).tolist()]
    scores = evaluate(probabilities, gold, LABELS, seed=0)
    assert scores["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    assert scores["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    each = f1_score(gold, predicted, average=None, labels=LABELS, zero_division=0)
    assert [scores["per_class"][name]["f1"] for name in LABELS] == pytest.approx(list(each))
    low, high = scores["accuracy_interval"]
    assert 0 <= low < scores["accuracy"] < high <= 1
    assert evaluate(probabilities, gold, LABELS, seed=0) == scores


def test_rows_without_any_true_label_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="no row has a true label"):
        evaluate(torch.ones(2, 3) / 3, [None, None], LABELS, seed=0)

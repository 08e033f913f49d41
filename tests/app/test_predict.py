"""Predictions in the server: what torch would say, to 1e-4, for every kind of student; calibrated, bounded, and private."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app import options, predict
from app.api import checkpoints
from app.client import unpack
from app.config import settings
from app.db import session_scope
from app.errors import TooLarge, Unprocessable
from app.models import Checkpoint
from app.pretrained import resolve
from app.storage import storage
from tests.support import add_dataset, run, sentences, submit, tiny_spec, wait_until
from workers.training.encoders import Student, build_student, save_student

LABELS = ["negative", "neutral", "positive"]
TEXTS = [
    "short", "é 漢字 🙂 and more", "a much longer text " * 40, "special <pad> <s> </s> [PAD] tokens", "  spaces\t\nand lines  ",
    *(row["text"] for row in sentences(20, 1)),
]  # fmt: skip
PAIRS = [f"second {number} {'long ' * (number % 7)}" for number in range(len(TEXTS))]


def student(model: str, seed: int = 0, **wishes: Any) -> Student:
    wish = options.Student(model=model, **wishes)
    source = resolve(model, purpose="student", roots=[], allow_hub=False)
    return build_student(wish, LABELS, TEXTS, PAIRS, source, seed)


def shaken(made: Student) -> Student:
    """The same with new weights far from their initialisation, so that nothing is equal by being near 0."""
    luck = torch.Generator().manual_seed(3)
    new = made.model if made.source.kind == "scratch" else made.model.classifier
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=luck) * 0.4)
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def torch_logits(folder: Path, texts: list[str], pairs: list[str] | None) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, pairs, truncation="longest_first", padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize(
    ("model", "wishes", "activation"),
    [
        ("scratch", {"vocab_size": 400, "hidden_size": 64, "num_layers": 2, "max_length": 40}, "gelu"),
        ("scratch", {"vocab_size": 400, "hidden_size": 128, "num_layers": 1, "max_length": 64}, "gelu_new"),
        ("scratch", {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "max_length": 8}, "relu"),
        ("all-MiniLM-L6-v2", {"num_layers": 2, "max_length": 64}, "gelu"),
    ],
)
def test_numpy_says_what_torch_says(
    tmp_path: Path, model: str, wishes: dict[str, Any], activation: str, with_pairs: bool
) -> None:
    made = student(model, **wishes)
    if activation != "gelu":
        made.model.config.hidden_act = activation
    save_student(shaken(made), tmp_path)
    pairs = PAIRS if with_pairs else None
    expected = torch_logits(tmp_path, TEXTS, pairs)
    found = predict.Student(files_of(tmp_path)).logits(TEXTS, pairs)
    assert np.abs(found - expected).max() <= 1e-4
    assert np.ptp(expected, axis=0).min() > 0.01, "the texts must not all get the same scores"


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_act", "silu"), ("architectures", ["BertForSequenceClassification"])]
)
def test_a_student_that_numpy_does_not_compute_is_refused_and_not_computed_wrongly(
    tmp_path: Path, name: str, value: Any
) -> None:
    save_student(student("scratch", vocab_size=300, hidden_size=16, num_layers=1), tmp_path)
    files = files_of(tmp_path)
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), name: value}).encode()
    with pytest.raises(Unprocessable, match="download"):
        predict.Student(files)


@pytest.mark.parametrize(("threshold", "abstains"), [(0.0, [False, False]), (None, [True, True]), (0.6, [True, False])])
def test_below_the_threshold_the_student_abstains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float | None, abstains: list[bool]
) -> None:
    save_student(student("scratch", vocab_size=300, hidden_size=16, num_layers=1), tmp_path)
    (tmp_path / "calibration.json").write_text(json.dumps({"temperature": 2.0, "threshold": threshold}))
    loaded = predict.Student(files_of(tmp_path))
    monkeypatch.setattr(loaded, "logits", lambda *_: np.array([[0, 1, 0], [0, 0, 6]], np.float32))
    unsure, sure = loaded.predict(["a", "b"])
    assert (unsure.label, sure.label) == ("neutral", "positive")
    assert unsure.confidence == pytest.approx(np.exp(0.5) / (np.exp(0.5) + 2))
    assert sure.probabilities["positive"] == pytest.approx(np.exp(3) / (np.exp(3) + 2))
    assert sum(sure.probabilities.values()) == pytest.approx(1)
    assert [unsure.abstain, sure.abstain] == abstains


def trained(client: TestClient, **changes: Any) -> dict[str, Any]:
    spec = tiny_spec(
        add_dataset(sentences(60, 1)), validation_dataset_id=add_dataset(sentences(30, 2)),
        test_dataset_id=add_dataset(sentences(30, 3)), training={"epochs": 6, "batch_size": 8, "learning_rate": 5e-3},
    )  # fmt: skip
    job = run(submit(spec | changes))
    assert job.status == "succeeded", job.error
    return dict(client.get(f"/jobs/{job.id}").json())


def ask(client: TestClient, job: dict[str, Any], **body: Any) -> Any:
    return client.post(f"/checkpoints/{job['best_checkpoint_id']}/predict", json=body)


def test_a_checkpoint_answers_for_texts_as_it_would_after_its_download(client: TestClient, tmp_path: Path) -> None:
    job = trained(client, target_accuracy=0.75)
    texts = [row["text"] for row in sentences(30, 3)]
    answer = ask(client, job, texts=texts)
    assert answer.status_code == 200, answer.text
    body, calibration = answer.json(), job["evaluation"]["calibration"]
    tar = client.get(f"/jobs/{job['id']}/checkpoint").content
    unpack(io.BytesIO(tar), tmp_path)
    scores = torch.from_numpy(torch_logits(tmp_path, texts, None)).double() / calibration["temperature"]
    expected = scores.softmax(dim=1).numpy()
    found = np.array([list(entry["probabilities"].values()) for entry in body["data"]])
    assert np.abs(found - expected).max() <= 1e-4
    assert [entry["confidence"] for entry in body["data"]] == pytest.approx(expected.max(axis=1), abs=1e-4)
    assert (body["temperature"], body["threshold"]) == (calibration["temperature"], calibration["threshold"])
    file = json.loads((tmp_path / "calibration.json").read_text())
    assert file == {name: calibration[name] for name in file}
    assert (calibration["target_accuracy"], calibration["target_source"], calibration["source"]) == (
        0.75,
        "spec",
        "dataset",
    )

    kept = [entry for entry in body["data"] if not entry["abstain"]]
    assert len(kept) / len(texts) == calibration["test"]["coverage"]
    gold = {row["text"]: row["label"] for row in sentences(30, 3)}
    right = [
        entry["label"] == gold[text] for text, entry in zip(texts, body["data"], strict=True) if not entry["abstain"]
    ]
    assert sum(right) / len(right) == pytest.approx(calibration["test"]["accuracy"])
    last = calibration["curve"]["points"][-1]
    assert calibration["curve"]["split"] == "test"
    assert last["coverage"] == 1
    assert last["accuracy"] == pytest.approx(job["evaluation"]["test"]["student"]["accuracy"])
    card = (tmp_path / "README.md").read_text()
    assert "## When to abstain" in card
    assert f"| 100% | {last['threshold']:.4f} | {last['accuracy']:.4f} |" in card


def test_without_a_target_the_student_answers_what_it_is_as_good_at_as_its_teacher(client: TestClient) -> None:
    labels = {"labels": ["cooking", "sports", "weather"], "teacher": {"kind": "embedding"}}
    calibration = trained(client, **labels)["evaluation"]["calibration"]
    assert calibration["target_source"] == "teacher"
    assert 0 < calibration["target_accuracy"] <= 1
    with_teacher = [point["with_teacher"] for point in calibration["curve"]["points"]]
    assert None not in with_teacher


def test_without_a_validation_set_the_rows_held_back_calibrate(client: TestClient) -> None:
    calibration = trained(client, validation_dataset_id=None, test_dataset_id=None)["evaluation"]["calibration"]
    assert (calibration["source"], calibration["rows"]) == ("held_back_pseudo_labels", 6)
    assert (calibration["target_source"], calibration["target_accuracy"], calibration["test"]) == ("default", 0.9, None)
    assert calibration["curve"]["split"] == "validation"


def test_rows_that_also_stand_in_the_test_set_do_not_calibrate(client: TestClient) -> None:
    shared = sentences(10, 3)
    calibration = trained(client, validation_dataset_id=add_dataset(sentences(20, 2) + shared))["evaluation"][
        "calibration"
    ]
    assert calibration["rows"] == 20


def test_what_cannot_be_predicted_is_refused_in_words(
    client: TestClient, other_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trained(client, training={"epochs": 1, "batch_size": 8})
    for body, status, code in (
        ({}, 422, "validation_error"),
        ({"texts": []}, 422, "validation_error"),
        ({"texts": ["x"] * 65}, 422, "validation_error"),
        ({"texts": ["x" * 20_001]}, 422, "validation_error"),
        ({"texts": [""]}, 422, "validation_error"),
        ({"texts": ["a", "b"], "text_pairs": ["a", "b"]}, 422, "unprocessable"),
    ):
        answer = ask(client, job, **body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert ask(other_client, job, texts=["x"]).status_code == 404
    monkeypatch.setattr(settings(), "predict_bytes", 1000)
    assert ask(client, job, texts=["x"]).json()["code"] == "too_large"
    monkeypatch.undo()
    assert ask(client, job, texts=["x"]).status_code == 200
    assert client.delete(f"/checkpoints/{job['best_checkpoint_id']}").status_code == 204
    assert ask(client, job, texts=["x"]).status_code == 404


def test_a_student_of_pairs_asks_for_pairs(client: TestClient) -> None:
    def pairs(count: int, seed: int) -> list[dict[str, Any]]:
        return [{"text": "which?", "text_pair": row["text"], "label": row["label"]} for row in sentences(count, seed)]

    job = trained(
        client, dataset_id=add_dataset(pairs(30, 1)), validation_dataset_id=add_dataset(pairs(12, 2)),
        test_dataset_id=None, training={"epochs": 1, "batch_size": 8},
    )  # fmt: skip
    assert "text_pairs" in ask(client, job, texts=["which?"]).json()["detail"]
    assert ask(client, job, texts=["which?"], text_pairs=["a", "b"]).status_code == 422
    answer = ask(client, job, texts=["which?"], text_pairs=["goal of the striker"])
    assert (answer.status_code, len(answer.json()["data"])) == (200, 1)


def test_no_more_predictions_wait_than_can_be_served_soon_and_polling_goes_on(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trained(client, training={"epochs": 1, "batch_size": 8})
    assert ask(client, job, texts=["x"]).status_code == 200
    gate = threading.Event()
    slow = predict.Student.logits

    def wait(self: predict.Student, *arguments: Any) -> Any:
        gate.wait(30)
        return slow(self, *arguments)

    monkeypatch.setattr(predict.Student, "logits", wait)
    monkeypatch.setattr(checkpoints, "WAITING", threading.BoundedSemaphore(3))
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(client, job, texts=["x"]).status_code)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: checkpoints.WAITING._value == 0, what="three predictions wait")
    refused = ask(client, job, texts=["x"])
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert client.get(f"/jobs/{job['id']}").status_code == 200
    gate.set()
    for thread in threads:
        thread.join(30)
    assert answers == [200] * 3


def test_the_shelf_holds_the_students_used_last_and_no_more_than_fit(client: TestClient) -> None:
    jobs = [trained(client, training={"epochs": 1, "batch_size": 8}, target_accuracy=0.5 + n / 10) for n in range(3)]
    with session_scope() as session:
        rows = [session.get_one(Checkpoint, job["best_checkpoint_id"]) for job in jobs]
    size = max(file["bytes"] for row in rows for file in row.files if file["name"] == "model.safetensors")
    shelf = predict.Shelf(2 * size)
    first, second = shelf.take(rows[0], storage()), shelf.take(rows[1], storage())
    assert shelf.take(rows[0], storage()) is first
    shelf.take(rows[2], storage())
    assert shelf.take(rows[0], storage()) is first, "used later than the second"
    assert shelf.take(rows[1], storage()) is not second
    with pytest.raises(TooLarge, match="download"):
        predict.Shelf(size // 2).take(rows[0], storage())

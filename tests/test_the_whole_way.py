"""A job from POST to the downloaded classifier, in one process, for every method; and that all its numbers agree."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
import torch
from fastapi.testclient import TestClient
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from app import ledger, options
from app.client import unpack
from app.storage import storage
from tests.support import TOPICS, add_dataset, run, sentences, tiny_spec

KINDS = [entry.model_fields["kind"].annotation.__args__[0] for entry in get_args(get_args(options.Method)[0])]
METHODS = [kind for kind in KINDS if kind != "teacher_alone"]  # which trains no student: tests/app/test_comparisons.py
TRAIN_ROWS, EPOCHS = 60, 2


def distilled(client: TestClient, spec: dict[str, Any]) -> dict[str, Any]:
    """The job, once it has ended."""
    accepted = client.post("/jobs", json=spec)
    assert accepted.status_code == 202, accepted.text
    run(accepted.json()["id"])
    job = client.get(accepted.headers["Location"]).json()
    assert job["status"] == "succeeded", job["error"]
    return job


def unsure(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a confidence each, so that a rule has something to choose by."""
    return [row | {"confidence": 0.4 + 0.55 * ((7 * number) % 11) / 10} for number, row in enumerate(rows)]


def series(client: TestClient, job: dict[str, Any]) -> dict[str, list[tuple[int, float | None]]]:
    found = client.get(f"/jobs/{job['id']}/metrics").json()["data"]
    return {entry["name"]: [(point["step"], point["value"]) for point in entry["points"]] for entry in found}


def ledger_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(storage().read(ledger.key(job["id"])))).to_pylist()


def events(client: TestClient, job: dict[str, Any], type: str) -> list[dict[str, Any]]:
    return [event for event in client.get(f"/jobs/{job['id']}/events").json()["data"] if event["type"] == type]


def unpacked(client: TestClient, job: dict[str, Any], folder: Path) -> Path:
    tar = client.get(f"/jobs/{job['id']}/checkpoint")
    assert tar.status_code == 200
    unpack(io.BytesIO(tar.content), folder)
    return folder


def predicted(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """What the classifier of a downloaded checkpoint says, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = []
    for row in rows:
        inputs = tokenizer(row["text"], row.get("text_pair"), truncation=True, return_tensors="pt")
        with torch.inference_mode():
            names.append(model.config.id2label[int(model(**inputs).logits.argmax())])
    return names


def assert_the_numbers_agree(client: TestClient, job: dict[str, Any], rows: int) -> None:
    """Job, metric series and ledger tell the same story, to the last row."""
    selection, points, entries = job["selection"], series(client, job), ledger_of(job)
    waves = job["labeling"]["waves"]
    epochs = waves["history"][-1]["epochs"] if waves else job["spec"]["training"]["epochs"]
    assert selection["seen"] == rows * epochs == sum(entry["offered"] for entry in entries)
    assert selection["selected"] == sum(entry["selected"] for entry in entries)
    assert selection["ratio"] == selection["selected"] / selection["seen"]
    assert (points["seen"][-1][1], points["selected"][-1][1]) == (selection["seen"], selection["selected"])
    assert [epoch["epoch"] for epoch in selection["epochs"]] == list(range(1, epochs + 1))
    assert sum(epoch["selected"] for epoch in selection["epochs"]) == selection["selected"]
    assert all(epoch["seen"] == rows for epoch in selection["epochs"])
    assert [value for _, value in points["epoch_ratio"]] == [epoch["ratio"] for epoch in selection["epochs"]]
    ends = {step: number for number, (step, _) in enumerate(points["epoch_ratio"])}
    for step, value in points["selected"]:
        if step in ends:
            assert value == sum(epoch["selected"] for epoch in selection["epochs"][: ends[step] + 1])
    for entry in entries:
        assert entry["decision"] == ("selected" if entry["selected"] else "rejected")
        assert entry["selected"] <= entry["offered"]
        assert (entry["reason"] == "selected") == (entry["selected"] == entry["offered"] > 0), entry
    told = {decision: count_samples(client, job, decision) for decision in ("selected", "rejected")}
    assert told["selected"] == sum(entry["selected"] > 0 for entry in entries)
    assert sum(told.values()) == len(entries)


def count_samples(client: TestClient, job: dict[str, Any], decision: str) -> int:
    count, after = 0, "0"
    while after is not None:
        page = client.get(
            f"/jobs/{job['id']}/samples", params={"decision": decision, "limit": 100, "after": after}
        ).json()
        count, after = count + len(page["data"]), page["next"]
    return count


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_goes_the_whole_way_and_its_numbers_agree(client: TestClient, tmp_path: Path, kind: str) -> None:
    test_rows = sentences(18, 3)
    spec = tiny_spec(
        add_dataset(unsure(sentences(TRAIN_ROWS, 1))), validation_dataset_id=add_dataset(sentences(12, 2)),
        test_dataset_id=add_dataset(test_rows), method={"kind": kind},
        training={"epochs": EPOCHS, "batch_size": 8, "learning_rate": 5e-3},
    )  # fmt: skip
    if kind == "pkd":  # compares hidden states, so the student is as wide as its teacher
        spec["student"] = {"model": "all-MiniLM-L6-v2", "num_layers": 2, "max_length": 24}
    job = distilled(client, spec)

    feedback = [entry for entry in ledger_of(job) if entry["reason"] == "feedback"]
    assert_the_numbers_agree(client, job, TRAIN_ROWS - len(feedback))
    gold, names = [row["label"] for row in test_rows], predicted(unpacked(client, job, tmp_path), test_rows)
    scores = job["evaluation"]["test"]["student"]
    assert scores["accuracy"] == pytest.approx(accuracy_score(gold, names), abs=1e-12)
    assert scores["macro_f1"] == pytest.approx(f1_score(gold, names, average="macro", zero_division=0), abs=1e-12)
    assert scores["rows"] == len(test_rows)
    assert job["metrics"]["test_accuracy"] == scores["accuracy"]
    assert job["progress"] == 1
    assert [phase["name"] for phase in job["phases"]] == ["labeling", "training", "evaluating", "packaging"]
    assert all(phase["finished_at"] and phase["done"] == phase["total"] for phase in job["phases"])


def test_the_embedding_teacher_teaches_the_bundled_student(client: TestClient, tmp_path: Path) -> None:
    test_rows = sentences(18, 3)
    spec = tiny_spec(
        add_dataset(sentences(48, 1, labeled=False)), validation_dataset_id=add_dataset(sentences(18, 2)),
        test_dataset_id=add_dataset(test_rows),
        labels=[
            {"name": "cooking", "description": "recipes and kitchen"},
            {"name": "sports", "description": "football and athletics"},
            {"name": "weather", "description": "weather forecast"},
        ],
        teacher={"kind": "embedding", "examples": [{"text": row["text"], "label": row["label"]} for row in sentences(9, 4)]},
        student={"num_layers": 1, "max_length": 32}, method={"kind": "llkd", "weighted": True},
        training={"epochs": 4, "batch_size": 8, "learning_rate": 1e-3},
    )  # fmt: skip
    job = distilled(client, spec)
    assert_the_numbers_agree(client, job, 48)
    assert job["labeling"]["labels"] == TOPICS
    assert job["labeling"]["confidence_method"] == "linear_head_calibrated"
    assert job["labeling"]["tokens"] > 0
    folder = unpacked(client, job, tmp_path)
    names = predicted(folder, test_rows)
    gold = [row["label"] for row in test_rows]
    assert job["evaluation"]["test"]["student"]["accuracy"] == pytest.approx(accuracy_score(gold, names), abs=1e-12)
    assert job["evaluation"]["test"]["student"]["accuracy"] > 0.6
    assert job["evaluation"]["test"]["teacher"]["rows"] == 18, "the teacher's own accuracy stands beside the student's"
    assert {entry["source"] for entry in ledger_of(job)} == {"teacher"}
    passed_on = "".join((folder / name).read_text() for name in ("README.md", "metrics.json"))
    assert not [row["text"] for row in sentences(9, 4) if row["text"] in passed_on], "examples may be private"


def test_text_pairs_go_all_the_way_through(client: TestClient, tmp_path: Path) -> None:
    def pairs(count: int, seed: int) -> list[dict[str, Any]]:
        return [
            {"text": f"question {number} {seed}", "text_pair": row["text"], "label": row["label"]}
            for number, row in enumerate(sentences(count, seed))
        ]

    test_rows = pairs(18, 3)
    spec = tiny_spec(
        add_dataset(pairs(48, 1)), validation_dataset_id=add_dataset(pairs(12, 2)), test_dataset_id=add_dataset(test_rows),
        student={"model": "scratch", "num_layers": 1, "hidden_size": 32, "vocab_size": 400, "max_length": 64},
        training={"epochs": 12, "batch_size": 8, "learning_rate": 5e-3},
    )  # fmt: skip
    job = distilled(client, spec)
    names = predicted(unpacked(client, job, tmp_path), test_rows)
    gold = [row["label"] for row in test_rows]
    accuracy = job["evaluation"]["test"]["student"]["accuracy"]
    assert accuracy == pytest.approx(accuracy_score(gold, names), abs=1e-12)
    assert accuracy > 0.6, "only the second text tells the label"
    sample = client.get(f"/jobs/{job['id']}/samples").json()["data"][0]
    assert (sample["text"], sample["text_pair"]) == (pairs(1, 1)[0]["text"], pairs(1, 1)[0]["text_pair"])


def test_without_a_validation_set_rows_are_held_back_and_the_job_says_so(client: TestClient) -> None:
    rows = sentences(50, 1)
    job = distilled(
        client, tiny_spec(add_dataset(rows), training={"epochs": 2, "batch_size": 8, "validation_share": 0.2})
    )
    assert_the_numbers_agree(client, job, 40)
    entries = ledger_of(job)
    held_back = [entry for entry in entries if entry["reason"] == "held_back"]
    assert len(held_back) == 10
    assert all(entry["offered"] == 0 and entry["label"] is not None for entry in held_back)
    assert [event["data"]["rows"] for event in events(client, job, "training.held_back")] == [10]
    assert job["evaluation"]["validation"]["source"] == "held_back_pseudo_labels"
    assert job["evaluation"]["validation"]["student"]["rows"] == 10
    assert job["evaluation"]["test"] is None


def test_a_student_that_learns_nothing_but_the_frequent_label_comes_with_a_warning(
    client: TestClient, tmp_path: Path
) -> None:
    made = sentences(120, 1)
    rows = [row for row in made if row["label"] == "cooking"] + [row for row in made if row["label"] != "cooking"][:4]
    spec = tiny_spec(
        add_dataset(rows), validation_dataset_id=add_dataset(sentences(12, 2)), test_dataset_id=add_dataset(sentences(18, 3)),
        training={"epochs": 1, "batch_size": 8, "learning_rate": 5e-3},
    )  # fmt: skip
    job = distilled(client, spec)
    [warning] = [warning for warning in job["warnings"] if warning["code"] == "classes_missed"]
    assert warning["split"] == "test"
    assert "answers 'cooking' for every one of 18 rows" in warning["message"]
    assert [event["data"]["code"] for event in events(client, job, "job.warning")][-1] == "classes_missed"
    assert (
        "**Beware**: on the test set the student answers 'cooking'"
        in (unpacked(client, job, tmp_path) / "README.md").read_text()
    )


def test_what_is_held_back_stands_neither_in_the_test_set_nor_among_the_rows_trained_on(client: TestClient) -> None:
    rows = sentences(20, 1)
    job = distilled(
        client,
        tiny_spec(
            add_dataset([*rows, *rows]), test_dataset_id=add_dataset(rows[:6] + sentences(6, 2)),
            training={"epochs": 1, "batch_size": 8, "validation_share": 0.3},
        ),
    )  # fmt: skip
    entries = ledger_of(job)
    held_back = {entry["text"] for entry in entries if entry["reason"] == "held_back"}
    trained_on = {entry["text"] for entry in entries if entry["selected"]}
    assert held_back
    assert trained_on
    assert not held_back & trained_on
    assert not held_back & {row["text"] for row in rows[:6]}


@pytest.mark.parametrize("kind", ["llkd", "softmatch", "freematch", "entropy_score"])
def test_train_rows_that_stand_in_the_test_or_validation_set_are_never_trained_on(
    client: TestClient, kind: str
) -> None:
    rows = sentences(24, 1)
    job = distilled(
        client,
        tiny_spec(
            add_dataset(rows), test_dataset_id=add_dataset(rows[:9] + sentences(3, 2)),
            validation_dataset_id=add_dataset(rows[9:12] + sentences(9, 3)), method={"kind": kind},
            # Some batches hold barred rows only, which must not spoil a rule's averages.
            training={"epochs": 2, "batch_size": 2, "learning_rate": 5e-3},
        ),
    )  # fmt: skip
    assert_the_numbers_agree(client, job, 24)
    entries = ledger_of(job)
    assert [entry["reason"] for entry in entries[:12]] == ["in_held_out_set"] * 12
    assert [entry["selected"] for entry in entries[:12]] == [0] * 12
    assert sum(entry["selected"] for entry in entries[12:]) > 0
    assert "in_held_out_set" not in {entry["reason"] for entry in entries[12:]}
    assert [event["data"]["rows"] for event in events(client, job, "training.barred")] == [12]
    assert job["evaluation"]["barred_rows"] == 12


def test_rows_that_no_one_labeled_stand_in_the_ledger_with_their_reason(client: TestClient) -> None:
    rows = sentences(40, 1)
    rows[3] = {"text": "nobody knows"}
    rows[4] |= {"confidence": 0.2}
    spec = tiny_spec(
        add_dataset(rows), validation_dataset_id=add_dataset(sentences(12, 2)), budget={"max_labeled_rows": 30}
    )
    job = distilled(client, spec)
    assert_the_numbers_agree(client, job, 28)
    entries = ledger_of(job)
    unlabeled = [3, 4, *range(30, 40)]
    assert [entry["row"] for entry in entries if entry["reason"] == "not_labeled"] == unlabeled
    assert [entries[row]["label"] for row in unlabeled] == [None] * 12
    assert entries[3]["error"] == "row has no label"
    assert "confidence 0.2 is not above" in entries[4]["error"]
    assert {entry["error"] for entry in entries[30:]} == {"beyond the labeling budget"}
    assert job["labeling"]["rows_failed"] == 2
    sample = client.get(f"/jobs/{job['id']}/samples", params={"decision": "rejected", "limit": 1}).json()["data"][0]
    assert (sample["row"], sample["distribution"], sample["confidence"]) == (3, None, None)


def test_a_teacher_that_says_the_same_of_every_row_fails_the_job_with_the_reason(client: TestClient) -> None:
    rows = [row | {"label": "sports"} for row in sentences(12, 1)] + [{"text": "the last", "label": "weather"}]
    accepted = client.post("/jobs", json=tiny_spec(add_dataset(rows), budget={"max_labeled_rows": 12}))
    job = run(accepted.json()["id"])
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "teacher_constant"
    assert "'sports'" in job.error["message"]


def test_a_job_whose_rows_are_all_in_the_test_set_fails_with_the_reason(client: TestClient) -> None:
    rows = sentences(9, 1)
    spec = tiny_spec(
        add_dataset(rows), test_dataset_id=add_dataset(rows + sentences(1, 5)), validation_dataset_id=add_dataset(sentences(6, 2))
    )  # fmt: skip
    job = run(client.post("/jobs", json=spec).json()["id"])
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "nothing_to_train_on"


def test_the_checkpoint_holds_what_its_manifest_says_and_a_pipeline_loads_it(
    client: TestClient, tmp_path: Path
) -> None:
    job = distilled(client, tiny_spec(add_dataset(sentences(30, 1)), name="My <b>first</b> student"))
    folder = unpacked(client, job, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert {entry["name"] for entry in manifest} == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for entry in manifest:
        content = (folder / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.json"} <= {
        entry["name"] for entry in manifest
    }
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "cooking", "1": "sports", "2": "weather"}
    assert config["label2id"] == {"cooking": 0, "sports": 1, "weather": 2}
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["spec"]["method"] == {"kind": "no_selection"}
    assert facts["selection"]["selected"] == job["selection"]["selected"]
    classify = pipeline("text-classification", model=str(folder))
    assert classify("goal for the striker")[0]["label"] in TOPICS
    listed = client.get(f"/jobs/{job['id']}/checkpoints").json()["data"]
    assert [entry["id"] for entry in listed] == [job["best_checkpoint_id"]]
    assert listed[0]["is_best"]
    assert {entry["name"] for entry in listed[0]["files"]} == {path.name for path in folder.iterdir()}


def test_the_best_epoch_by_validation_becomes_the_checkpoint(client: TestClient) -> None:
    spec = tiny_spec(
        add_dataset(sentences(48, 1)), validation_dataset_id=add_dataset(sentences(18, 2)),
        training={"epochs": 4, "batch_size": 8, "learning_rate": 2e-2},
    )  # fmt: skip
    job = distilled(client, spec)
    points = series(client, job)
    by_step = dict(points["validation_macro_f1"])
    assert len(by_step) == 4, "one point for each epoch, and none is overwritten"
    checkpoint = client.get(f"/checkpoints/{job['best_checkpoint_id']}").json()
    best = max(by_step.values())
    assert by_step[checkpoint["step"]] == best
    assert checkpoint["metrics"]["validation_macro_f1"] == pytest.approx(best, abs=1e-9)
    assert job["metrics"]["validation_macro_f1"] == pytest.approx(best, abs=1e-9)

"""What POST /jobs refuses, with the pointer to the field and a sentence that says how to mend it; and what it only warns of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from app.config import settings
from app.db import session_scope
from app.models import Job, LabelSet
from app.options import Method, needs_confidence
from tests.llms import tiny_llama
from tests.support import add_dataset, sentences, stored, tiny_spec

LABELS = ["cooking", "sports", "weather"]
EMBEDDING = {"kind": "embedding"}


@pytest.fixture
def ids(client: TestClient) -> dict[str, str]:
    """Datasets of every kind that can be right or wrong."""
    rows = sentences(12, 1)
    return {
        "train": add_dataset(rows),
        "unlabeled": add_dataset(sentences(12, 2, labeled=False)),
        "held_out": add_dataset(sentences(6, 3)),
        "one_row": add_dataset(rows[:1]),
        "one_class": add_dataset([row | {"label": "sports"} for row in rows]),
        "pairs": add_dataset([row | {"text_pair": "and another"} for row in rows]),
        "foreign_labels": add_dataset([row | {"label": f"x{row['label']}"} for row in rows]),
        "distributions": add_dataset([{"text": row["text"], "distribution": {row["label"]: 1.0, "other": 0.0}} for row in rows]),
        "bobs": add_dataset(rows, "bob"),
        "absent": "ds_0123456789abcdef0123",
    }  # fmt: skip


def post(client: TestClient, ids: dict[str, str], change: dict[str, Any]) -> Any:
    """POST a job that would do but for the change; names of datasets in it become their ids."""
    spec = tiny_spec(ids["train"]) | change
    for field in ("dataset_id", "validation_dataset_id", "test_dataset_id"):
        if field in spec:
            spec[field] = ids.get(spec[field], spec[field])
    return client.post("/jobs", json={name: value for name, value in spec.items() if value is not ...})


def label_set_of(job_id: str) -> LabelSet:
    with session_scope() as session:
        return session.get_one(LabelSet, session.get_one(Job, job_id).label_set_id)


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "unknown field": ({"labelz": []}, "/labelz", "extra_forbidden", "remove it or correct its spelling"),
    "unknown field of a method": ({"method": {"kind": "random", "momentum": 0.9}}, "/method/momentum", "extra_forbidden", "unknown field"),
    "unknown field of a teacher": ({"teacher": {"kind": "dataset", "url": "x"}}, "/teacher/url", "extra_forbidden", "unknown field"),
    "unknown field of the training": ({"training": {"epoch": 1}}, "/training/epoch", "extra_forbidden", "unknown field"),
    "wrong type": ({"training": {"epochs": "many"}}, "/training/epochs", "int_parsing", "valid integer"),
    "wrong type deep in a method": ({"method": {"kind": "llkd", "weighted": "perhaps"}}, "/method/weighted", "bool_parsing", "valid boolean"),
    "out of range": ({"training": {"batch_size": 0}}, "/training/batch_size", "greater_than_equal", "greater than or equal to 1"),
    "not a number": ({"training": {"learning_rate": "NaN"}}, "/training/learning_rate", "finite_number", "finite"),
    "unknown method": ({"method": {"kind": "magic"}}, "/method", "union_tag_invalid", "'llkd'"),
    "method without kind": ({"method": {}}, "/method", "union_tag_not_found", "kind"),
    "method missing": ({"method": ...}, "/method", "missing", "required"),
    "teacher missing": ({"teacher": ...}, "/teacher", "missing", "required"),
    "malformed dataset id": ({"dataset_id": "../../etc/passwd"}, "/dataset_id", "string_pattern_mismatch", "pattern"),
    "NUL in a label": ({"labels": ["a\x00", "b"]}, "/labels/0/name", "value_error", "remove it"),
    "metadata with too many pairs": ({"metadata": {str(n): "" for n in range(17)}}, "/metadata", "value_error", "at most 16"),
    "labels that differ by case": ({"teacher": EMBEDDING, "labels": ["Sports", "sports "]}, "/labels", "value_error", "keep one of them"),
    "one label": ({"teacher": EMBEDDING, "labels": ["sports"]}, "/labels", "value_error", "at least two"),
    "labels missing": ({"teacher": EMBEDDING}, "/labels", "labels_missing", "name the classes"),
    "example with an unknown label": (
        {"teacher": {"kind": "embedding", "examples": [{"text": "a", "label": "sports"}, {"text": "b", "label": "sport"}]}, "labels": LABELS},
        "/teacher/examples/1/label", "unknown_label", "correct it, or add it to `labels`",
    ),
    "template without label": ({"teacher": {"kind": "embedding", "template": "about"}, "labels": LABELS}, "/teacher/template", "value_error", "{label}"),
    "dataset that does not exist": ({"dataset_id": "absent"}, "/dataset_id", "dataset_not_found", "POST /datasets"),
    "dataset of another tenant": ({"dataset_id": "bobs"}, "/dataset_id", "dataset_not_found", "POST /datasets"),
    "validation set of another tenant": ({"validation_dataset_id": "bobs"}, "/validation_dataset_id", "dataset_not_found", "POST /datasets"),
    "one row only": ({"dataset_id": "one_row", "teacher": EMBEDDING, "labels": LABELS}, "/dataset_id", "too_few_rows", "at least 2"),
    "train set as validation set": ({"validation_dataset_id": "train"}, "/validation_dataset_id", "same_dataset_twice", "must be different"),
    "train set as test set": ({"test_dataset_id": "train"}, "/test_dataset_id", "same_dataset_twice", "must be different"),
    "validation set as test set": (
        {"validation_dataset_id": "held_out", "test_dataset_id": "held_out"}, "/validation_dataset_id", "same_dataset_twice", "must be different",
    ),
    "dataset teacher without labels": ({"dataset_id": "unlabeled"}, "/dataset_id", "dataset_has_no_labels", "label_column"),
    "dataset teacher with one class": ({"dataset_id": "one_class"}, "/dataset_id", "one_class_only", "at least two"),
    "labels that the dataset lacks": ({"labels": ["a", "b"]}, "/labels", "labels_unused", "'cooking', 'sports', 'weather'"),
    "labels of which the dataset has one": ({"labels": ["sports", "b"]}, "/labels", "one_class_only", "at least two"),
    "validation set without labels": ({"validation_dataset_id": "unlabeled"}, "/validation_dataset_id", "validation_without_labels", "label column"),
    "test set without labels": ({"test_dataset_id": "unlabeled"}, "/test_dataset_id", "test_without_labels", "label column"),
    "validation set with distributions only": (
        {"validation_dataset_id": "distributions"}, "/validation_dataset_id", "validation_without_labels", "label column",
    ),
    "test set with other labels": ({"test_dataset_id": "foreign_labels"}, "/test_dataset_id", "labels_differ", "'xcooking'"),
    "pairs in one set only": ({"test_dataset_id": "pairs"}, "/dataset_id", "text_pair_mismatch", "all datasets of a job must, or none"),
    "student that does not resolve": ({"student": {"model": "no-such-model"}}, "/student/model", "model_unresolvable", "Available: all-MiniLM-L6-v2, scratch"),
    "student outside the roots": ({"student": {"model": "../../etc"}}, "/student/model", "model_unresolvable", "There is no model"),
    "more layers than the student has": ({"student": {"num_layers": 7}}, "/student/num_layers", "too_many_layers", "has 6 layers"),
    "teacher that does not resolve": (
        {"teacher": {"kind": "embedding", "model": "no-such-model"}, "labels": LABELS}, "/teacher/model", "model_unresolvable", "Available",
    ),
    "scratch as teacher": ({"teacher": {"kind": "embedding", "model": "scratch"}, "labels": LABELS}, "/teacher/model", "model_unresolvable", "untrained"),
}  # fmt: skip


@pytest.mark.parametrize("dry_run", [False, True], ids=["posted", "dry run"])
def test_what_cannot_succeed_is_refused_with_a_pointer_and_nothing_is_stored(
    client: TestClient, ids: dict[str, str], dry_run: bool
) -> None:
    before = stored()
    for case, (change, pointer, code, sentence) in REFUSED.items():
        client.params = {"dry_run": "true"} if dry_run else {}
        answer = post(client, ids, change)
        assert answer.status_code == 422, (case, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert (problem["status"], problem["title"]) == (422, "Unprocessable Content")
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert [(fault["pointer"], fault["code"]) for fault in problem["errors"]] == [(pointer, code)], case
        assert sentence in problem["errors"][0]["message"], case
        assert sentence in problem["detail"] or problem["detail"].endswith(problem["errors"][0]["message"]), case
    assert stored() == before


def test_every_problem_is_told_at_once(client: TestClient, ids: dict[str, str]) -> None:
    answer = post(
        client, ids,
        {
            "dataset_id": "bobs", "validation_dataset_id": "unlabeled", "teacher": EMBEDDING,
            "student": {"model": "no-such-model"},
        },
    )  # fmt: skip
    assert {fault["pointer"] for fault in answer.json()["errors"]} == {
        "/dataset_id", "/validation_dataset_id", "/labels", "/student/model",
    }  # fmt: skip
    assert answer.json()["total_errors"] == 4


def test_a_body_that_is_no_json_is_a_bad_request(client: TestClient) -> None:
    answer = client.post("/jobs", content=b"{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")
    assert client.post("/jobs", json=[]).status_code == 422
    assert client.post("/jobs", content=b"").status_code == 422


def test_labels_that_some_held_out_rows_lack_are_warned_of_and_the_job_is_accepted(
    client: TestClient, ids: dict[str, str]
) -> None:
    test = add_dataset([*sentences(6, 4), {"text": "what else", "label": "cinema"}])
    answer = post(client, ids, {"test_dataset_id": test})
    assert answer.status_code == 202
    warnings = answer.json()["warnings"]
    assert [(warning["code"], warning["split"]) for warning in warnings] == [("label_unknown_to_job", "test")]
    assert "1 test rows carry labels the job lacks ('cinema')" in warnings[0]["message"]


def test_the_warnings_of_the_datasets_are_repeated_with_the_job(client: TestClient, ids: dict[str, str]) -> None:
    rows = sentences(6, 5)
    answer = post(client, ids, {"dataset_id": add_dataset([*rows, *rows, {"text": "one", "label": "Sports"}])})
    assert answer.status_code == 202
    job = answer.json()
    assert len(job["warnings"]) >= 2
    events = client.get(f"/jobs/{job['id']}/events").json()["data"]
    told = [event["message"] for event in events if event["type"] == "job.warning"]
    assert told == [warning["message"] for warning in job["warnings"]]


def test_the_dataset_teacher_takes_the_labels_of_the_dataset_in_order(client: TestClient, ids: dict[str, str]) -> None:
    assert post(client, ids, {}).json()["labeling"]["labels"] == LABELS
    reversed_ = post(client, ids, {"labels": LABELS[::-1]}).json()
    assert reversed_["labeling"]["labels"] == LABELS[::-1]


def test_a_local_directory_is_a_model_when_it_lies_under_a_root(
    client: TestClient, ids: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "mine"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "roberta", "num_hidden_layers": 3}))
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert post(client, ids, {"student": {"model": "mine"}}).status_code == 422
    monkeypatch.setattr(settings(), "model_roots", [tmp_path])
    assert post(client, ids, {"student": {"model": "mine", "num_layers": 3}}).status_code == 202
    assert post(client, ids, {"student": {"model": "mine", "num_layers": 4}}).status_code == 422
    (model / "config.json").write_text(json.dumps({"model_type": "roberta", "auto_map": {"AutoModel": "evil.py"}}))
    assert "never run" in post(client, ids, {"student": {"model": "mine"}}).json()["detail"]
    (model / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "only safetensors are read" in post(client, ids, {"student": {"model": "mine"}}).json()["detail"]


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ({"kind": "llkd"}, True),
        ({"kind": "no_selection"}, False),
        ({"kind": "prokt"}, False),
        ({"kind": "lgtm"}, False),
        ({"kind": "llkd_lgtm"}, True),
        ({"kind": "llkd_lgtm", "selection": {"use_teacher_confidence": False}}, False),
    ],
)
def test_a_method_that_only_learns_the_labels_needs_no_confidence(method: dict[str, Any], needs: bool) -> None:
    assert needs_confidence(TypeAdapter(Method).validate_python(method)) == needs


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A teacher that would do."""
    tiny_llama(tmp_path / "llama")
    monkeypatch.setattr(settings(), "model_roots", [tmp_path])
    return {"kind": "causal_lm", "model": "llama"}


def test_candidates_for_examples_come_from_a_dataset_and_stand_in_the_job(
    client: TestClient, ids: dict[str, str], llama: dict[str, Any]
) -> None:
    llama["few_shot"] = {"dataset_id": ids["held_out"], "how": "similar"}
    change = {"teacher": llama, "labels": LABELS}
    job = post(client, ids, change).json()
    examples = job["spec"]["teacher"]["examples"]
    assert sorted(example["text"] for example in examples) == sorted(row["text"] for row in sentences(6, 3))
    assert client.delete(f"/datasets/{ids['held_out']}").status_code == 204
    again = client.post(
        "/jobs", json=job["spec"] | {"teacher": llama | {"few_shot": {"how": "similar"}, "examples": examples}}
    )
    assert again.status_code == 202
    prints = [label_set_of(answer["id"]).fingerprint for answer in (job, again.json())]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("dataset", "code"),
    [
        ("bobs", "dataset_not_found"), ("absent", "dataset_not_found"), ("foreign_labels", "labels_differ"),
        ("unlabeled", "labels_differ"), ("pairs", "text_pair_mismatch"), ("held_out", "same_dataset_twice"),
    ],
)  # fmt: skip
def test_candidates_that_would_not_do_are_refused(
    client: TestClient, ids: dict[str, str], llama: dict[str, Any], dataset: str, code: str
) -> None:
    llama["few_shot"] = {"dataset_id": ids[dataset]}
    answer = post(client, ids, {"teacher": llama, "labels": LABELS, "test_dataset_id": "held_out"})
    assert answer.status_code == 422
    assert [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]] == [
        ("/teacher/few_shot/dataset_id", code)
    ]


def test_candidates_that_stand_in_a_held_out_set_are_left_out_and_told(
    client: TestClient, ids: dict[str, str], llama: dict[str, Any]
) -> None:
    rows = sentences(9, 7)
    ids["few"], ids["test"] = add_dataset(rows[:6]), add_dataset(rows[3:])
    llama["few_shot"] = {"dataset_id": ids["few"]}
    change = {"teacher": llama, "labels": LABELS, "test_dataset_id": "test"}
    job = post(client, ids, change).json()
    assert {example["text"] for example in job["spec"]["teacher"]["examples"]} == {row["text"] for row in rows[:3]}
    warning = next(entry for entry in job["warnings"] if entry["code"] == "example_in_held_out_set")
    assert (warning["split"], warning["message"][:7]) == ("test", "3 texts")
    ids["test"] = add_dataset(rows)
    answer = post(client, ids, change)
    assert [fault["code"] for fault in answer.json()["errors"]] == ["examples_held_out"]


def test_examples_that_tell_the_teacher_the_answers_of_a_held_out_set_are_warned_of(
    client: TestClient, ids: dict[str, str]
) -> None:
    teacher = {"kind": "embedding", "examples": [sentences(6, 3)[2], sentences(12, 1)[0]]}
    change = {"teacher": teacher, "labels": LABELS, "validation_dataset_id": "held_out"}
    warnings = post(client, ids, change).json()["warnings"]
    assert [(warning["code"], warning["split"]) for warning in warnings] == [("example_in_held_out_set", "validation")]
    assert warnings[0]["message"].startswith("1 of the teacher's examples")


def test_an_encoder_is_no_causal_language_model(client: TestClient, ids: dict[str, str]) -> None:
    answer = post(client, ids, {"teacher": {"kind": "causal_lm", "model": "all-MiniLM-L6-v2"}, "labels": LABELS})
    assert answer.status_code == 422
    assert "name a causal language model" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("verbalised", "pointer", "code"),
    [
        ({"cinema": "film"}, "/teacher/verbalised", "unknown_label"),
        ({"cooking": "sports"}, "/labels/1", "labels_written_alike"),
    ],
)
def test_labels_must_be_written_apart(
    client: TestClient, ids: dict[str, str], llama: dict[str, Any], verbalised: dict[str, str], pointer: str, code: str
) -> None:
    answer = post(client, ids, {"teacher": llama | {"verbalised": verbalised}, "labels": LABELS})
    assert [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]] == [(pointer, code)]

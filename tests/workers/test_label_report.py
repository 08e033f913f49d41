"""The label report finds what was planted, bounds its work, and comes with every job, whatever the labels are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from app import labels, retention
from app.options import JobSpec
from app.storage import Storage
from tests.support import TOPICS, add_dataset, job_of, run, sentences, submit, tiny_spec
from workers import label_report, pipeline
from workers.label_report import Rows

NAMES = ["cooking", "sports", "weather"]


def rows_of(probabilities: Any, texts: list[str] | None = None, gold: list[str | None] | None = None) -> Rows:
    dense = np.array(probabilities, np.float32)
    count = len(dense)
    texts = texts or [f"row {number} {number * 7}" for number in range(count)]
    return Rows(texts, list(range(1, count + 1)), dense, gold or [None] * count)


def one_hot(classes: NDArray[np.int64], confidence: float = 0.9, count: int = 3) -> NDArray[np.float32]:
    dense = np.full((len(classes), count), (1 - confidence) / (count - 1), np.float32)
    dense[np.arange(len(classes)), classes] = confidence
    return dense


def no_student(rows: NDArray[np.int64]) -> NDArray[np.float32]:
    raise AssertionError("the student was asked, and there is nothing to ask it")


def test_rows_that_an_encoder_teacher_learned_from_are_not_called_unseen() -> None:
    texts = ["one", "two", "three", "four", "two"]
    table = pa.table({"text": texts, "text_pair": pa.nulls(5, pa.string())})
    spec = JobSpec.model_validate(tiny_spec("ds_" + "0" * 32))
    material = pipeline.Material(spec, NAMES, {}, {"train": table}, {}, {}, [])
    selected, nobody = np.array([1, 0, 0, 0, 0], np.int32), np.zeros(0, np.int64)
    assert pipeline._never_trained(material, selected, nobody).tolist() == [False, True, True, True, True]
    # The fifth row has the text of the second.
    assert pipeline._never_trained(material, selected, np.array([1, 3])).tolist() == [False, False, True, False, False]


def test_counts_histogram_agreement_and_calibration_are_those_of_a_calculation_by_hand() -> None:
    said = [[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.2, 0.6, 0.2], [1.0, 0.0, 0.0], [np.nan] * 3]
    train = rows_of(said, gold=["cooking", "sports", "sports", None, "sports"])
    full = label_report.report(train, {}, NAMES, "cosine_softmax", np.zeros(5, bool), no_student)
    assert (full["rows"], full["rows_labeled"]) == (5, 4)
    assert full["class_counts"] == {"cooking": 3, "sports": 1, "weather": 0}
    histogram = {entry["to"]: entry["rows"] for entry in full["confidence"]["histogram"] if entry["rows"]}
    assert histogram == {0.6: 1, 0.9: 2, 1.0: 1}
    assert full["confidence"]["mean"] == pytest.approx((0.9 + 0.9 + 0.6 + 1.0) / 4, abs=1e-4)
    gold = full["gold"]["train"]
    assert (gold["rows"], gold["agreement"]) == (3, round(2 / 3, 4))
    assert gold["confusions"] == [{"teacher": "cooking", "gold": "sports", "rows": 1}]
    # Two rows at 0.9, one of them right, and one at 0.6 that is right.
    assert gold["expected_calibration_error"] == pytest.approx((2 * 0.4 + 1 * 0.4) / 3, abs=1e-3)
    assert [entry["rows"] for entry in gold["reliability"]] == [1, 2]


def test_labels_that_were_planted_wrong_are_found_and_only_among_rows_never_trained_on() -> None:
    truth = np.arange(300) % 3
    given = truth.copy()
    planted = [30, 61, 92, 123, 154]
    given[planted] = (given[planted] + 1) % 3
    trained_on = 200
    given[trained_on] = (given[trained_on] + 1) % 3
    never = np.ones(300, bool)
    never[trained_on] = False
    train = rows_of(one_hot(given), gold=[NAMES[index] for index in given])

    found = label_report.likely_wrong(train, NAMES, never, lambda rows: one_hot(truth[rows], 0.95))

    assert found["rows_scored"] == 299
    assert sorted(entry["row"] for entry in found["rows"]) == planted
    worst = found["rows"][0]
    assert worst["label"] == NAMES[given[worst["row"]]]
    assert worst["suggested"] == NAMES[truth[worst["row"]]]
    assert worst["student_probability"] == pytest.approx(0.95, abs=1e-4)


def test_a_student_that_was_trained_on_every_row_tells_nothing_and_the_report_says_why() -> None:
    train = rows_of(one_hot(np.arange(60) % 3))
    found = label_report.likely_wrong(train, NAMES, np.zeros(60, bool), no_student)
    assert (found["rows_scored"], found["found"], found["rows"]) == (0, 0, [])
    assert "was never trained on 0" in found["reason"]


def test_near_duplicates_with_different_labels_are_found_as_by_comparing_every_pair() -> None:
    luck = random.Random(0)
    words = [f"word{number}" for number in range(400)]
    texts: list[str] = []
    for _ in range(40):
        text = luck.sample(words, 20)
        changed = [*text[:-1], luck.choice(words)]
        texts += [" ".join(text), " ".join(changed).upper() + "!"]
    classes = np.array([luck.randrange(3) for _ in texts])

    found = label_report.near_duplicates(rows_of(one_hot(classes), texts), NAMES)

    grams = [label_report.shingles(text) for text in texts]
    slow = {
        (one, other)
        for other in range(len(texts))
        for one in range(other)
        if classes[one] != classes[other]
        and len(grams[one] & grams[other]) / len(grams[one] | grams[other]) >= label_report.SIMILARITY
    }
    assert len(slow) > 10
    assert {tuple(row["row"] for row in pair["rows"]) for pair in found["pairs"]} == slow
    assert found["found"] == len(slow)


def test_a_thousand_labels_and_more_rows_than_are_looked_at_ask_the_student_about_a_bounded_part() -> None:
    count, names = 25_000, [f"label {number}" for number in range(1000)]
    classes = np.arange(count) * 7 % 1000
    said = np.zeros((count, 1000), np.float16)
    said[np.arange(count), classes] = 1
    train = Rows(["the same template for all"] * count, [None] * count, said, [names[index] for index in classes])
    asked: list[int] = []

    def predict(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        asked.append(len(rows))
        return one_hot(classes[rows], 0.9, 1000)

    full = label_report.report(train, {}, names, "label_likelihood", np.ones(count, bool), predict)

    assert asked == [label_report.MOST_SCORED]
    assert full["gold"]["train"]["agreement"] == 1
    assert full["near_duplicates"]["rows_compared"] == label_report.MOST_COMPARED
    assert len(full["near_duplicates"]["pairs"]) == label_report.MOST_ROWS
    assert len(json.dumps(full)) < 500_000


@pytest.mark.parametrize("classes", [[], [0], [1, 1, 1]], ids=["nothing labeled", "one row", "one class"])
def test_few_rows_and_one_class_make_a_report_too(classes: list[int]) -> None:
    said = one_hot(np.array(classes, np.int64)) if classes else np.full((2, 3), np.nan)
    train = rows_of(said, gold=[None] * len(said))
    full = label_report.report(train, {}, NAMES, "none", np.ones(len(said), bool), no_student)
    assert full["rows_labeled"] == len(classes)
    assert (full["confidence"], full["gold"]["train"]) == (None, None)
    assert label_report.summary(full)["mean_confidence"] is None


# --- through a job --------------------------------------------------------------------------------------------------

EMBEDDING = {"teacher": {"kind": "embedding"}, "labels": list(TOPICS)}


def test_a_job_leaves_its_label_report_and_a_card_without_texts(
    client: TestClient, other_client: TestClient, storage: Storage, tmp_path: Path
) -> None:
    rows = sentences(60, 1)
    rows.append(rows[0] | {"text": f"{rows[0]['text']}!"})
    spec = tiny_spec(
        add_dataset(rows), validation_dataset_id=add_dataset(sentences(12, 2)),
        method={"kind": "random", "ratio": 0.3}, **EMBEDDING,
    )  # fmt: skip
    job_id = submit(spec)
    early = client.get(f"/jobs/{job_id}/labels/report")
    assert (early.status_code, early.json()["code"]) == (409, "not_ready")
    job = run(job_id)
    assert job.status == "succeeded", job.error

    answer = client.get(f"/jobs/{job_id}/labels/report")
    assert answer.status_code == 200, answer.text
    full = answer.json()
    assert other_client.get(f"/jobs/{job_id}/labels/report").status_code == 404
    assert full["rows_labeled"] == 61
    assert sum(full["class_counts"].values()) == 61
    assert job.evaluation is not None
    assert full["gold"]["train"]["agreement"] == round(job.evaluation["pseudo_labels"]["accuracy"], 4)
    assert full["gold"]["validation"]["rows"] == 12
    scored = full["likely_wrong"]["rows_scored"]
    ledger = client.get(f"/jobs/{job_id}/samples?decision=rejected&limit=100").json()["data"]
    assert 20 <= scored <= len(ledger)
    trained_on = {
        row["row"] for row in client.get(f"/jobs/{job_id}/samples?decision=selected&limit=100").json()["data"]
    }
    assert not trained_on & {row["row"] for row in full["likely_wrong"]["rows"]}

    with storage.open(f"checkpoints/{job.best_checkpoint_id}.tar") as stream:
        packed = stream.read().decode("utf-8", "replace")
    assert "## The labels" in packed
    assert f"of {scored} rows that were never trained on look wrongly labeled" in packed
    assert not [row["text"] for row in rows if row["text"] in packed]

    assert retention.sweep_files(storage, dry_run=True) == []
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert not storage.exists(labels.report_key(job_id))


def test_own_labels_of_the_dataset_are_no_witness_of_themselves(client: TestClient) -> None:
    job = run(submit(tiny_spec(add_dataset(sentences(30, 1)))))
    full = client.get(f"/jobs/{job.id}/labels/report").json()
    assert full["gold"] == {"train": None}
    assert full["likely_wrong"]["rows_scored"] == 0


def test_a_report_that_cannot_be_made_is_told_and_the_job_goes_on(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> dict[str, Any]:
        raise ValueError("no report today")

    monkeypatch.setattr(pipeline.label_report, "report", broken)
    job_id = submit(tiny_spec(add_dataset(sentences(30, 1))))
    run(job_id)
    assert job_of(job_id).status == "succeeded"
    events = client.get(f"/jobs/{job_id}/events").json()["data"]
    assert [event["level"] for event in events if event["type"] == "labels.report_failed"] == ["warning"]
    assert client.get(f"/jobs/{job_id}/labels/report").status_code == 409

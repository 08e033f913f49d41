"""Comparisons: checked whole, labeled once, robust against what happens to one arm, and a table that says what is so."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sklearn.metrics import accuracy_score, f1_score
from sqlalchemy import Engine, event, select

from app import db, labels, lifecycle, predictions, shards, statistics, tables
from app.config import Endpoint, settings
from app.db import session_scope
from app.models import Job, LabelCache, LabelShard
from app.storage import Storage
from tests.support import add_dataset, expire_leases, job_of, label, sentences, shards_of, stored, tiny_spec
from workers import tasks

LABELS = ["cooking", "sports", "weather"]
FIGURES = {"rows_from_cache": 0, "rows_failed": 0, "tokens": 0, "tokens_saved": 0, "seconds": 0.0}
ARMS = [
    {"name": "LLKD", "method": {"kind": "llkd"}},
    {"name": "No_DS", "method": {"kind": "no_selection"}},
]


def wish(**changes: Any) -> dict[str, Any]:
    """A comparison of two arms and two seeds, of a second or two a run."""
    spec = tiny_spec(add_dataset(sentences(30, 1)), test_dataset_id=add_dataset(sentences(15, 3)))
    del spec["method"]
    return spec | {"arms": ARMS, "seeds": [0, 1]} | changes


def started(client: TestClient, **changes: Any) -> dict[str, Any]:
    answer = client.post("/comparisons", json=wish(**changes))
    assert answer.status_code == 202, answer.json()
    return dict(answer.json())


def look(client: TestClient, comparison: dict[str, Any]) -> dict[str, Any]:
    answer = client.get(f"/comparisons/{comparison['id']}")
    assert answer.status_code == 200
    return dict(answer.json())


def jobs_of(comparison: dict[str, Any]) -> list[str]:
    return [run["job_id"] for arm in comparison["arms"] for run in arm["runs"]]


def run_all(comparison: dict[str, Any]) -> None:
    """Label and train everything in this thread."""
    for job_id in jobs_of(comparison):
        label(job_id)
    for job_id in jobs_of(comparison):
        tasks.train(job_id)


def claim_shard(job_id: str) -> LabelShard | None:
    with session_scope() as session:
        return shards.claim(session, job_id, "labeler")


def finish_shard(shard: LabelShard) -> None:
    with session_scope() as session:
        shards.finish(session, shard, FIGURES)


# --- asking for one -------------------------------------------------------------------------------------------------


def test_a_comparison_is_accepted_as_one_job_for_each_arm_and_seed_with_one_label_set(client: TestClient) -> None:
    answer = client.post("/comparisons", json=wish(name="two rules", metadata={"team": "lab"}))
    assert answer.status_code == 202
    made = answer.json()
    assert answer.headers["location"] == f"/comparisons/{made['id']}"
    assert int(answer.headers["retry-after"]) > 0
    assert (made["status"], made["is_terminal"], made["progress"], made["eta_seconds"]) == ("queued", False, 0.0, None)
    assert [(arm["name"], arm["method"], arm["status"]) for arm in made["arms"]] == [
        ("LLKD", "llkd", "queued"), ("No_DS", "no_selection", "queued")
    ]  # fmt: skip
    assert [[run["seed"] for run in arm["runs"]] for arm in made["arms"]] == [[0, 1], [0, 1]]
    jobs = [job_of(job_id) for job_id in jobs_of(made)]
    assert len({job.label_set_id for job in jobs}) == 1
    assert {job.spec["training"]["split_seed"] for job in jobs} == {0}
    assert {(job.comparison_id, job.metadata_["team"]) for job in jobs} == {(made["id"], "lab")}
    told = client.get(f"/jobs/{jobs[0].id}").json()
    assert (told["comparison_id"], told["arm"], told["name"]) == (made["id"], "LLKD", "two rules: LLKD, seed 0")
    assert look(client, made) == made


def test_every_arm_is_checked_and_every_fault_points_to_where_it_stands(client: TestClient) -> None:
    arms = [
        {"name": "a", "method": {"kind": "llkd"}, "student": {"model": "../secret"}},
        {
            "name": "b",
            "method": {"kind": "random"},
            "training": {"epochs": 0, "seed": 3, "validation_share": 0.2, "near_duplicates": "auto"},
        },
        {"name": "c", "method": {"kind": "random"}, "student": {"depth": 3}},
        {"name": "d", "method": {"kind": "random"}, "dataset_id": "ds_0123456789abcdef"},
    ]
    before = stored()
    first = client.post("/comparisons", json=wish(arms=arms))
    assert (first.status_code, first.json()["code"]) == (422, "invalid_spec")
    pointers = {fault["pointer"]: fault["code"] for fault in first.json()["errors"]}
    assert pointers == {
        "/arms/1/training/seed": "shared_by_all_arms",
        "/arms/1/training/validation_share": "shared_by_all_arms",
        "/arms/1/training/near_duplicates": "shared_by_all_arms",
        "/arms/1/training/epochs": "greater_than_equal",
        "/arms/2/student/depth": "extra_forbidden",
    }
    arms[1]["training"], arms[2]["student"] = {}, {}
    second = client.post("/comparisons", json=wish(arms=arms, labels=["a", "b"]))
    assert second.status_code == 422
    pointers = {fault["pointer"]: fault["code"] for fault in second.json()["errors"]}
    assert pointers == {
        "/arms/0/student/model": "model_unresolvable",
        "/arms/3/dataset_id": "dataset_not_found",
        "/labels": "labels_unused",
        "/test_dataset_id": "labels_differ",
    }
    after = stored()
    assert (after["comparisons"], after["jobs"]) == (before["comparisons"], before["jobs"]) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"arms": ARMS[:1]}, "/arms"),
        ({"arms": [ARMS[0], ARMS[0]]}, "/arms"),
        ({"arms": [ARMS[0], {"name": "x", "method": {"kind": "llkd", "momentum": 2}}]}, "/arms/1/method/momentum"),
        ({"seeds": [1, 1]}, "/seeds"),
        ({"seeds": []}, "/seeds"),
        ({"training": {"seed": 5}}, "/training/seed"),
        ({"test_dataset_id": None}, "/test_dataset_id"),
        ({"method": {"kind": "llkd"}}, "/method"),
        ({"arms": [{**ARMS[0], "name": f"arm {number}"} for number in range(64)], "seeds": [0, 1, 2, 3, 4]}, "/arms"),
    ],
)  # fmt: skip
def test_what_makes_no_comparison_is_refused(client: TestClient, changes: dict[str, Any], pointer: str) -> None:
    answer = client.post("/comparisons", json=wish(**changes))
    assert answer.status_code == 422
    assert pointer in {fault["pointer"] for fault in answer.json()["errors"]}
    assert stored()["comparisons"] == 0


def test_the_same_key_gives_the_same_comparison_and_another_body_is_refused(client: TestClient) -> None:
    body, headers = wish(), {"Idempotency-Key": "once"}
    first, again = (client.post("/comparisons", json=body, headers=headers) for _ in range(2))
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert stored()["comparisons"] == 1
    other = client.post("/comparisons", json=body | {"seeds": [5]}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_a_dry_run_counts_shared_labels_once_and_stores_nothing(client: TestClient) -> None:
    body = wish(teacher={"kind": "embedding"}, labels=LABELS)
    alone = {name: value for name, value in body.items() if name not in ("arms", "seeds")} | {
        "method": {"kind": "llkd"}
    }
    before = stored()
    job = client.post("/jobs?dry_run=true", json=alone).json()
    told = client.post("/comparisons?dry_run=true", json=body)
    assert told.status_code == 200
    assert stored() == before
    assert (told.json()["rows_to_label"], told.json()["teacher_tokens"]) == (45, job["teacher_tokens"])
    assert told.json()["estimated_seconds"] > job["estimated_seconds"]
    own = [ARMS[0], {**ARMS[1], "teacher": {"kind": "embedding", "template": "This is about {label}."}}]
    told = client.post("/comparisons?dry_run=true", json=body | {"arms": own})
    assert told.json()["rows_to_label"] == 90


def test_a_dry_run_adds_up_what_several_endpoints_cost(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    prices = {"dear": 6.0, "cheap": 2.0, "own": None}
    endpoints = {
        name: Endpoint(base_url="http://127.0.0.1:9/v1", model=name, price_per_million_input_tokens=price)
        for name, price in prices.items()
    }
    monkeypatch.setattr(settings(), "endpoints", endpoints)
    teachers = {name: {"kind": "endpoint", "endpoint": name} for name in prices}

    def cost(first: str, other: str) -> float | None:
        arms = [ARMS[0], {**ARMS[1], "teacher": teachers[other]}]
        body = wish(teacher=teachers[first], labels=LABELS, arms=arms)
        told: dict[str, float | None] = client.post("/comparisons?dry_run=true", json=body).json()
        return told["cost"]

    of_dear = cost("dear", "own")
    assert of_dear is not None
    assert cost("own", "own") is None
    assert cost("own", "dear") == of_dear
    assert cost("cheap", "dear") == pytest.approx(of_dear * 4 / 3)


def test_comparisons_are_listed_newest_first_and_belong_to_their_tenant(
    client: TestClient, other_client: TestClient
) -> None:
    ids = [started(client)["id"] for _ in range(3)]
    page = client.get("/comparisons?limit=2").json()
    rest = client.get(f"/comparisons?after={page['next']}").json()
    assert [entry["id"] for entry in page["data"] + rest["data"]] == ids[::-1]
    assert "arms" not in page["data"][0]
    assert other_client.get("/comparisons").json()["data"] == []
    for path in (f"/comparisons/{ids[0]}", f"/comparisons/{ids[0]}/table"):
        assert other_client.get(path).status_code == 404
    assert other_client.post(f"/comparisons/{ids[0]}/cancel").status_code == 404


def test_a_list_takes_the_same_few_statements_however_many_comparisons_it_holds(client: TestClient) -> None:
    asked: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if "api_keys" not in statement:  # a key is looked up anew now and then
            asked.append(statement)

    def statements() -> int:
        asked.clear()
        client.get("/comparisons")
        return len(asked)

    event.listen(db.engine(), "before_cursor_execute", note)
    try:
        started(client)
        of_one = statements()
        started(client)
        assert statements() == of_one
    finally:
        event.remove(db.engine(), "before_cursor_execute", note)


def test_held_out_sets_are_read_once_for_all_arms(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    texts_of = labels.texts_of
    monkeypatch.setattr(labels, "texts_of", lambda storage, key: read.append(key) or texts_of(storage, key))
    examples = [{"text": f"an example {number}", "label": LABELS[number % 2]} for number in range(4)]
    started(client, teacher={"kind": "embedding", "examples": examples}, labels=LABELS)
    assert len(read) == 1, "of the test set, which is the only one"


# --- labeled once ---------------------------------------------------------------------------------------------------


def test_any_arm_s_call_labels_for_all_and_all_go_on_to_training_together(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 10)
    made = started(client, teacher={"kind": "embedding"}, labels=LABELS)
    first, second, *_ = jobs = jobs_of(made)
    shards = [claim_shard(job_id) for job_id in (first, second, first, second, first)]
    assert all(shard is not None for shard in shards)
    assert len({shard.index for shard in shards if shard}) == 5, "two arms never hold the same shard"
    assert claim_shard(second) is None
    for shard in shards[:-1]:
        assert shard is not None
        finish_shard(shard)
    assert {job_of(job_id).phase for job_id in jobs} <= {"labeling", None}
    assert {phase["done"] for job_id in jobs for phase in client.get(f"/jobs/{job_id}").json()["phases"]} == {40}
    assert shards[-1] is not None
    finish_shard(shards[-1])
    assert {job_of(job_id).phase for job_id in jobs} == {"training"}


def test_no_row_is_labeled_twice_for_a_comparison(client: TestClient, database: Engine) -> None:
    made = started(client, teacher={"kind": "embedding"}, labels=LABELS)
    for job_id in jobs_of(made):
        label(job_id)
    shards = shards_of(jobs_of(made)[0])
    assert [shard.attempt for shard in shards] == [1] * len(shards)
    assert sum(shard.rows_from_cache for shard in shards) == 0
    with session_scope() as session:
        assert len(session.scalars(select(LabelCache.text_hash)).all()) == 45
        assert len(session.scalars(select(LabelShard.label_set_id).distinct()).all()) == 1
    assert look(client, made)["labeling"]["tokens"] == sum(shard.tokens for shard in shards) > 0


def test_a_run_that_finds_its_labels_made_tells_no_pace_of_labeling(client: TestClient) -> None:
    first, *others = jobs_of(started(client))
    label(first)
    paces = [client.get(f"/jobs/{job_id}").json()["labeling"]["rows_per_second"] for job_id in (first, *others)]
    assert paces[0] > 0
    assert paces[1:] == [None] * 3


@pytest.mark.parametrize("verb", ["cancel", "pause"])
def test_an_arm_that_is_stopped_while_labeling_takes_no_labels_from_the_others(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 10)
    made = started(client)
    first, *others = jobs_of(made)
    shard = claim_shard(first)
    assert shard is not None
    assert client.post(f"/jobs/{first}/{verb}").status_code == 202
    with session_scope() as session:
        shards.renew(session, shard)
    finish_shard(shard)
    assert claim_shard(first) is None
    for job_id in others:
        label(job_id)
    assert {job_of(job_id).phase for job_id in others} == {"training"}
    assert {shard.attempt for shard in shards_of(first)} == {1}
    assert job_of(first).status == {"cancel": "cancelled", "pause": "paused"}[verb]
    client.post(f"/jobs/{first}/{ {'cancel': 'retry', 'pause': 'resume'}[verb] }")
    label(first)
    assert (job_of(first).phase, job_of(first).status) == ("training", "running")


def test_labels_that_cannot_be_had_fail_every_arm_with_the_reason(client: TestClient) -> None:
    made = started(client)
    shard = claim_shard(jobs_of(made)[1])
    assert shard is not None
    with session_scope() as session:
        shards.fail(session, shard, "labeling_failed", "the model is gone")
    told = look(client, made)
    assert (told["status"], told["is_terminal"]) == ("failed", True)
    assert {run["error"]["message"] for arm in told["arms"] for run in arm["runs"]} == {"the model is gone"}


def test_a_retried_arm_does_not_take_a_shard_from_the_worker_of_another(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 10)
    first, second, *_ = jobs_of(started(client))
    client.post(f"/jobs/{first}/cancel")
    shard = claim_shard(second)
    assert shard is not None
    client.post(f"/jobs/{first}/retry")
    finish_shard(shard)
    assert shards_of(first)[shard.index].status == "done"


def test_a_worker_lost_in_one_arm_s_name_is_followed_by_one_in_another_s(client: TestClient) -> None:
    first, second, *_ = jobs_of(started(client))
    lost = claim_shard(first)
    assert lost is not None
    expire_leases()
    client.post(f"/jobs/{first}/cancel")
    heir = claim_shard(second)
    assert heir is not None
    assert (heir.index, heir.attempt) == (lost.index, 2)
    with pytest.raises(lifecycle.LeaseLost):
        finish_shard(lost)
    finish_shard(heir)
    assert job_of(second).phase == "training"


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(client: TestClient) -> dict[str, Any]:
    """A comparison whose runs have all succeeded, without a validation set and with a teacher that is scored."""
    examples = [{"text": row["text"], "label": row["label"]} for row in sentences(9, 8)]
    made = started(
        client, teacher={"kind": "embedding", "examples": examples}, labels=LABELS,
        training={"epochs": 3, "batch_size": 8, "learning_rate": 5e-3},
    )  # fmt: skip
    run_all(made)
    return look(client, made)


def test_the_table_agrees_with_the_jobs_with_their_answers_and_with_the_formats(
    client: TestClient, finished: dict[str, Any], storage: Storage
) -> None:
    assert (finished["status"], finished["is_terminal"], finished["progress"]) == ("succeeded", True, 1.0)
    assert finished["started_at"] < finished["finished_at"]
    answers: dict[str, list[np.ndarray]] = {}
    held_back = set()
    for arm in finished["arms"]:
        for run in arm["runs"]:
            job = client.get(f"/jobs/{run['job_id']}").json()
            assert (run["accuracy"], run["macro_f1"]) == (
                job["metrics"]["test_accuracy"],
                job["metrics"]["test_macro_f1"],
            )
            assert (run["seen"], run["selected"], run["share"]) == tuple(job["selection"][name] for name in ("seen", "selected", "ratio"))  # fmt: skip
            assert run["seconds"] == job["metrics"]["training_seconds"] > 0
            with storage.open(predictions.key(run["job_id"])) as stream:
                told = predictions.read(stream)
            gold, student = told.column("gold").to_pylist(), told.column("student").to_pylist()
            assert accuracy_score(gold, student) == pytest.approx(run["accuracy"])
            assert f1_score(gold, student, average="macro", zero_division=0) == pytest.approx(run["macro_f1"])
            assert accuracy_score(gold, told.column("teacher").to_pylist()) == pytest.approx(finished["teacher"]["accuracy"])  # fmt: skip
            answers.setdefault(arm["name"], []).append(np.array([LABELS.index(name) for name in student]))
            rows = client.get(f"/jobs/{run['job_id']}/samples?limit=100").json()["data"]
            held_back.add(tuple(row["row"] for row in rows if row["reason"] == "held_back"))
        scores = [run["macro_f1"] for run in arm["runs"]]
        assert (arm["macro_f1"]["mean"], arm["macro_f1"]["sd"]) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))  # fmt: skip
        assert arm["macro_f1"]["runs"] == 2
    assert len(held_back) == 1, "every run of every arm holds back the same rows"
    first, second = finished["arms"]
    assert first["difference"] is None
    truth = np.array([LABELS.index(name) for name in gold])
    expected = statistics.paired_bootstrap(truth, answers["LLKD"], answers["No_DS"])
    for name, (mean, low, high) in expected.items():
        assert second["difference"][name] == pytest.approx({"mean": mean, "low": low, "high": high})
        assert second["difference"][name]["mean"] == pytest.approx(second[name]["mean"] - first[name]["mean"])
    assert first["rank"] + second["rank"] == 3
    assert finished["labeling"]["labels"] == LABELS

    path = f"/comparisons/{finished['id']}/table"
    lines = client.get(path).text.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[:5]] == ["arm", "---", "Teacher", "LLKD", "No_DS"]
    assert f"| {100 * second['macro_f1']['mean']:.1f} ± {100 * second['macro_f1']['sd']:.1f} |" in lines[4]
    sheet = client.get(path, params={"format": "csv"})
    assert sheet.headers["content-type"].startswith("text/csv")
    values = {row["arm"]: row for row in csv.DictReader(io.StringIO(sheet.text))}
    assert float(values["No_DS"]["macro_f1_difference_low"]) == second["difference"]["macro_f1"]["low"]
    assert float(values["LLKD"]["share"]) == first["share"]
    assert values["LLKD"]["gpu_memory_bytes"] == ""
    assert r"No\_DS & " in client.get(path, params={"format": "latex"}).text
    assert client.get(path, params={"format": "html"}).status_code == 422


def test_a_method_that_takes_feedback_shares_its_splits_with_those_that_take_none(client: TestClient) -> None:
    """Also the near-duplicates, which methods without feedback rows leave where they are when by themselves."""
    train, test = sentences(30, 1), sentences(15, 3)
    train += [row | {"text": f"{row['text']}!"} for row in [*train[:10], *test[:3]]]
    lgtm = {"kind": "lgtm", "teacher": tiny_spec("")["student"]}
    data = {"dataset_id": add_dataset(train), "test_dataset_id": add_dataset(test)}
    made = started(client, **data, arms=[ARMS[0], ARMS[1], {"name": "LGTM", "method": lgtm}], seeds=[0])
    run_all(made)
    told = look(client, made)
    assert told["status"] == "succeeded", told["arms"]
    reasons = []
    for job_id in jobs_of(told):
        rows = client.get(f"/jobs/{job_id}/samples?limit=100").json()["data"]
        reasons.append([row["reason"] for row in rows])
    kept = [
        {what: {row for row, reason in enumerate(each) if reason == what} for what in ("held_back", "in_held_out_set")}
        for each in reasons
    ]
    assert kept[0] == kept[1] == kept[2]
    assert kept[0]["in_held_out_set"] == {40, 41, 42}
    assert all((row in kept[0]["held_back"]) == (row + 30 in kept[0]["held_back"]) for row in range(10))
    assert "feedback" in reasons[2]

    without = started(client, **data, seeds=[0])
    assert {job_of(job_id).spec["training"]["near_duplicates"] for job_id in jobs_of(without)} == {"auto"}


def test_an_arm_that_fails_is_told_with_its_reason_and_spoils_no_other(client: TestClient) -> None:
    gold = [row | {"label": "sports"} for row in sentences(6, 7)] + [{"text": "the last one", "label": "weather"}]
    own = {
        "name": "few | gold",
        "method": {"kind": "no_selection"},
        "teacher": {"kind": "dataset"},
        "dataset_id": add_dataset(gold),
    }
    made = started(client, arms=[*ARMS, own], seeds=[0], budget={"max_labeled_rows": 6})
    run_all(made)
    told = look(client, made)
    assert (told["status"], told["progress"]) == ("succeeded", 1.0)
    assert [arm["status"] for arm in told["arms"]] == ["succeeded", "succeeded", "failed"]
    failed = told["arms"][2]
    assert failed["runs"][0]["error"]["code"] == "teacher_constant"
    assert (failed["macro_f1"], failed["difference"], failed["rank"]) == (
        {"mean": None, "sd": None, "runs": 0},
        None,
        None,
    )
    assert {arm["rank"] for arm in told["arms"][:2]} in ({1.0, 2.0}, {1.5})
    assert told["arms"][0]["macro_f1"]["sd"] is None
    table = client.get(f"/comparisons/{made['id']}/table").text
    assert r"| few \| gold (failed) | – |" in table
    assert "1 of 3 runs failed" in table


def test_a_comparison_that_is_cancelled_keeps_what_has_ended(client: TestClient) -> None:
    made = started(client)
    first = jobs_of(made)[0]
    label(first)
    tasks.train(first)
    answer = client.post(f"/comparisons/{made['id']}/cancel")
    assert answer.status_code == 202
    told = answer.json()
    assert (told["status"], told["is_terminal"]) == ("succeeded", True)
    assert [[run["status"] for run in arm["runs"]] for arm in told["arms"]] == [
        ["succeeded", "cancelled"],
        ["cancelled"] * 2,
    ]
    assert client.post(f"/comparisons/{made['id']}/cancel").status_code == 202, "to cancel twice is no mistake"


def test_a_comparison_that_has_ended_cannot_be_cancelled(client: TestClient) -> None:
    made = started(client)
    with session_scope() as session:
        for job in session.scalars(select(Job)):
            job.status = "succeeded"
    answer = client.post(f"/comparisons/{made['id']}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "illegal_move")


def test_a_name_cannot_break_a_table() -> None:
    mean = {"mean": 0.5, "sd": None, "runs": 1}
    arm = {
        "name": "a|b & 50% \\_{x}", "method": "random", "status": "succeeded", "accuracy": mean, "macro_f1": mean, "rank": 1.0,
        "difference": None, "teacher": None, "seen": 10.0, "selected": 5.0, "share": 0.5, "seconds": 1.0, "gpu_memory_bytes": 2**30, "runs": [],
    }  # fmt: skip
    told = {"id": "cmp_1", "teacher": None, "arms": [arm], "spec": {"seeds": [0]}}
    assert tables.markdown(told).splitlines()[2] == (
        r"| a\|b & 50% \\_{x} | 50.0 | 50.0 | – | 1.0 | 10 | 5 | 50.0 % | 1.0 | 1.0 |"
    )
    assert r"\label{tab:cmp_1}" in tables.latex(told)
    assert r"a|b \& 50\% \textbackslash{}\_\{x\} & 50.0" in tables.latex(told)
    arm["name"] = '[=*<img src="//evil.test">\n\n| `x` ![y](//evil.test)'
    readable = tables.markdown(told)
    assert len(readable.splitlines()) == 5, "three lines of a table, and below it what it holds"
    for line in readable.splitlines()[2::2]:
        assert r'\[=\*\<img src="//evil.test"> \| \`x\` !\[y](//evil.test)' in line
    assert "\n{}[=*<img" in tables.latex(told), "else LaTeX takes it for an option of the line above"
    for name in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "plain"):
        arm["name"] = name
        [line] = csv.DictReader(io.StringIO(tables.comma_separated(told)))
        assert line["arm"] == (name if name == "plain" else f"'{name}")


def test_a_zero_shot_teacher_and_a_student_of_few_gold_labels_stand_in_the_same_table(client: TestClient) -> None:
    # Labeled wrongly on purpose, so that this teacher's scores are not those of the zero-shot one.
    examples = [{"text": row["text"], "label": LABELS[(LABELS.index(row["label"]) + 1) % 3]} for row in sentences(9, 8)]
    few = [{"text": row["text"], "label": row["label"]} for row in sentences(12, 9)]
    arms = [
        ARMS[1],
        {"name": "zero-shot", "method": {"kind": "no_selection"}, "teacher": {"kind": "embedding"}},
        {"name": "gold", "method": {"kind": "no_selection"}, "teacher": {"kind": "dataset"}, "dataset_id": add_dataset(few)},
        {"name": "Teacher-ZS", "method": {"kind": "teacher_alone"}, "teacher": {"kind": "embedding"}},
        {"name": "Lbl2TransformerVec", "method": {"kind": "teacher_alone"}, "teacher": {"kind": "lbl2vec", "documents": 12}},
    ]  # fmt: skip
    made = started(client, teacher={"kind": "embedding", "examples": examples}, labels=LABELS, arms=arms, seeds=[0])
    assert len({job_of(job_id).label_set_id for job_id in jobs_of(made)}) == 5
    run_all(made)
    told = look(client, made)
    assert [arm["status"] for arm in told["arms"]] == ["succeeded"] * 5, told["arms"]
    own = [job_of(job_id).evaluation["test"]["teacher"] for job_id in jobs_of(made)]  # type: ignore[index]
    assert told["teacher"]["macro_f1"] == own[0]["macro_f1"]
    assert told["arms"][1]["teacher"]["macro_f1"] == own[1]["macro_f1"] != own[0]["macro_f1"]
    assert (told["arms"][0]["teacher"], told["arms"][2]["teacher"], own[2]) == (None, None, None)
    assert told["arms"][2]["seen"] == 11, "a tenth of the twelve rows is held back"
    lines = client.get(f"/comparisons/{made['id']}/table").text.splitlines()
    assert lines[2].startswith(f"| Teacher | {100 * own[0]['accuracy']:.1f} |")
    assert lines[3].startswith(f"| Teacher of zero-shot | {100 * own[1]['accuracy']:.1f} |")
    alone, found = told["arms"][3:]
    assert (alone["macro_f1"]["mean"], alone["accuracy"]["mean"]) == (own[1]["macro_f1"], own[1]["accuracy"])
    assert (alone["teacher"], alone["share"], alone["seconds"]) == (None, None, None)
    assert alone["difference"]["macro_f1"]["mean"] == pytest.approx(
        own[1]["macro_f1"] - told["arms"][0]["macro_f1"]["mean"]
    )
    assert all(arm["rank"] is not None for arm in told["arms"])
    assert f"| Teacher-ZS | {100 * own[1]['accuracy']:.1f} |" in lines[7]
    job = client.get(f"/jobs/{found['runs'][0]['job_id']}").json()
    assert (job["best_checkpoint_id"], job["selection"], job["progress"]) == (None, None, 1.0)
    assert sum(job["labeling"]["teacher"]["documents_of_each_label"]) >= 3
    assert {shard.split for shard in shards_of(job["id"])} == {"test"}, "train rows are looked through, not labeled"


def test_a_teacher_alone_has_no_deviation_over_seeds_that_change_nothing(client: TestClient) -> None:
    arms = [ARMS[0], {"name": "Teacher-ZS", "method": {"kind": "teacher_alone"}}]
    made = started(client, teacher={"kind": "embedding"}, labels=LABELS, arms=arms)
    scores = {"accuracy": 0.5, "accuracy_interval": [0, 1], "macro_f1": 0.5, "macro_f1_interval": [0, 1]}
    with session_scope() as session:
        for job in session.scalars(select(Job)):
            job.status, job.evaluation = "succeeded", {"test": {"student": scores, "teacher": scores}}
    student, teacher = look(client, made)["arms"]
    assert student["macro_f1"] == {"mean": 0.5, "sd": 0.0, "runs": 2}
    assert teacher["macro_f1"] == {"mean": 0.5, "sd": None, "runs": 2}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"teacher": {"kind": "dataset"}, "labels": []}, ("/method/kind", "nothing_to_score")),
        ({"test_dataset_id": None}, ("/method/kind", "nothing_to_score")),
        ({"labeling": {"waves": {"rows": 16}}}, ("/labeling/waves", "no_student_to_ask_for")),
    ],
)
def test_a_teacher_that_cannot_be_scored_alone_is_refused(
    client: TestClient, changes: dict[str, Any], fault: tuple[str, str]
) -> None:
    spec = {name: value for name, value in wish().items() if name not in ("arms", "seeds")}
    spec |= {"teacher": {"kind": "embedding"}, "labels": LABELS, "method": {"kind": "teacher_alone"}} | changes
    answer = client.post("/jobs", json=spec)
    assert answer.status_code == 422
    assert [(found["pointer"], found["code"]) for found in answer.json()["errors"]] == [fault]

"""Hostile bodies and names over HTTP: a clear refusal, never a 500. Hostile files: test_records.py, test_records_fuzz.py;
models with code: test_pretrained.py; tars: test_client.py; the page: tests/web.
"""

from __future__ import annotations

import json
import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.client import unpack
from app.main import MAX_BODY_BYTES, create_app
from app.models import Checkpoint
from app.storage import storage
from tests.support import add_dataset, job_of, new_key, run, sentences, tiny_spec

JSON = {"Content-Type": "application/json"}
BODIES = {
    "deeply nested": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a huge number": b'{"a": ' + b"9" * 100_000 + b"}",
    "infinity": b'{"seconds": 1e999, "grace_hours": 1e999, "bytes": 1e999, "days": 1e999}',
    "not a number": b'{"grace_hours": NaN, "bytes": NaN, "days": NaN}',
    "bad UTF-8": b'{"name": "\xff\xfe"}',
    "a lone surrogate": rb'{"name": "\ud800", "dataset_id": "\ud800"}',
    "NUL": rb'{"name": "\u0000", "dataset_id": "ds_\u0000"}',
    "a list": b"[1, 2]",
    "nothing": b"",
    "many keys": json.dumps({f"k{number}": number for number in range(20_000)}).encode(),
    "too many bytes": b'"' + b"a" * MAX_BODY_BYTES + b'"',
}


@pytest.fixture
def admin(database: Engine) -> TestClient:
    return TestClient(create_app(), headers={"Authorization": f"Bearer {new_key('alice', scope='admin')}"})


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_hostile_body_is_refused_by_every_route_that_takes_json(admin: TestClient, body: bytes) -> None:
    document = admin.get("/openapi.json").json()
    routes = [
        (method, path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ]
    assert len(routes) >= 5
    for method, path in routes:
        answer = admin.request(method, re.sub(r"\{\w+\}", "some_id", path), content=body, headers=JSON)
        assert 400 <= answer.status_code < 500, (path, answer.text[:200])
        assert answer.headers["content-type"] == "application/problem+json"
        assert len(answer.content) < 50_000, "what was sent is not sent back"


TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("/name", {"name": "{}"}),
    ("/labels/0/name", {"labels": ["{}", "b"], "teacher": {"kind": "embedding"}}),
    ("/labels/0/description", {"labels": [{"name": "a", "description": "{}"}, "b"], "teacher": {"kind": "embedding"}}),
    ("/student/model", {"student": {"model": "{}"}}),
    ("/metadata", {"metadata": {"team": "{}"}}),
    ("/webhook/url", {"webhook": {"url": "https://example.com/{}"}}),
]


@pytest.mark.parametrize(("pointer", "change"), TEXTS, ids=[pointer for pointer, _ in TEXTS])
@pytest.mark.parametrize("sign", [r"\u0000", r"\ud800"], ids=["NUL", "surrogate"])
def test_text_that_the_database_cannot_hold_is_refused_by_field(
    admin: TestClient, pointer: str, change: dict[str, Any], sign: str
) -> None:
    spec = json.dumps(tiny_spec("ds_0123456789abcdef0123", **change)).replace("{}", sign)
    answer = admin.post("/jobs", content=spec.encode(), headers=JSON)
    assert answer.status_code == 422, answer.text
    pointers = [fault["pointer"] for fault in answer.json()["errors"]]
    assert any(found.startswith(pointer) for found in pointers), pointers


@pytest.mark.parametrize("query", ["name=%00", "name=%ED%A0%80", "text_column=%00", "label_column=" + "x" * 5000])
def test_a_hostile_name_of_an_upload_is_refused_or_cleaned(admin: TestClient, query: str) -> None:
    rows = b'{"text": "a"}\n{"text": "b"}\n'
    answer = admin.post(f"/datasets?{query}", content=rows, headers={"Content-Type": "application/x-ndjson"})
    assert answer.status_code in (201, 422), answer.text
    if answer.status_code == 201:
        assert "\x00" not in answer.json()["name"]


HOSTILE_LABELS = [
    "<script>alert(1)</script>",
    "```\n# heading\n![x](http://evil.example/x.png)",
    "---\nlicense: evil\n---",
    "a|b|c",
    "{{7*7}}${7*7}",
]


def test_hostile_label_names_do_nothing_in_the_model_card_nor_in_the_files(admin: TestClient, tmp_path: Path) -> None:
    """The card is read as Markdown on model hubs, with a YAML header."""
    rows = [{"text": f"{row['text']}", "label": HOSTILE_LABELS[n % 5]} for n, row in enumerate(sentences(60, 1))]
    job = run_named(rows, name="<img src=x onerror=alert(1)> `code` [link](javascript:alert(1))\n---")
    tar = BytesIO(storage().read(job))
    with tarfile.open(fileobj=tar) as archive:
        names = archive.getnames()
    tar.seek(0)
    unpack(tar, tmp_path)
    assert all(re.fullmatch(r"[\w.\-/]+", name) and not name.startswith("/") and ".." not in name for name in names)
    card = (tmp_path / "README.md").read_text()
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "license" not in yaml.safe_load(header)
    prose = re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    assert not re.search(r"<\w|!\[|\]\(|^# heading", prose, re.MULTILINE), prose
    assert body.count("```") % 2 == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["id2label"].values()) == set(HOSTILE_LABELS), "data stay what they are"


def run_named(rows: list[dict[str, Any]], name: str) -> str:
    """A finished job of these rows; the storage key of its checkpoint."""
    from tests.support import submit

    job = run(submit(tiny_spec(add_dataset(rows), name=name.replace("\n", " "))))
    assert job.status == "succeeded", job.error
    assert job_of(job.id).best_checkpoint_id is not None
    return Checkpoint(id=job.best_checkpoint_id).key

"""What every route promises about malformed requests, methods and its own description: found by probing it from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from app.config import settings
from app.main import MAX_BODY_BYTES, create_app
from tests.support import add_dataset, new_key, sentences, stored, tiny_spec

JSON = {"Content-Type": "application/json"}


def assert_problem(answer: Response, status: int, code: str) -> dict[str, Any]:
    """The answer is that problem, and whole."""
    body = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == body["request_id"]
    assert {"type", "title", "detail", "errors", "total_errors"} <= body.keys()
    return dict(body)


# --- bodies ---------------------------------------------------------------------------------------------------------


def chunks(total: int) -> Iterator[bytes]:
    """JSON without a Content-Length: a string that does not end before `total` bytes."""
    yield b'{"name": "'
    for _ in range(total // 65536):
        yield b"x" * 65536
    yield b'"}'


def test_a_body_over_the_limit_is_refused_whether_or_not_it_tells_its_length(client: TestClient) -> None:
    told = client.post("/jobs", content=b"".join(chunks(MAX_BODY_BYTES)), headers=JSON)
    assert_problem(told, 413, "too_large")
    assert_problem(client.post("/jobs", content=chunks(MAX_BODY_BYTES), headers=JSON), 413, "too_large")
    within = client.post("/jobs", content=b'{"name":"' + b"x" * (MAX_BODY_BYTES - 11) + b'"}', headers=JSON)
    assert_problem(within, 422, "validation_error")


def test_an_upload_may_be_larger_than_a_json_body(client: TestClient) -> None:
    line = b'{"text": "' + b"x" * 100_000 + b'"}\n'
    rows = line * (MAX_BODY_BYTES // len(line) + 1)
    assert len(rows) > MAX_BODY_BYTES
    answer = client.post("/datasets", content=rows, headers={"Content-Type": "application/x-ndjson"})
    assert answer.status_code == 201


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_a_job_that_is_not_sent_as_json_is_told_the_content_type_to_send(
    client: TestClient, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    problem = assert_problem(client.post("/jobs", content=b"{}", headers=headers), 415, "unsupported_media_type")
    assert "application/json" in problem["detail"]


def test_broken_json_is_refused_with_its_place_and_no_made_up_pointer(client: TestClient) -> None:
    problem = assert_problem(client.post("/jobs", content=b'{"a" 1}', headers=JSON), 400, "invalid_json")
    assert problem["errors"] == [
        {"line": None, "pointer": "", "code": "json_invalid", "message": "Expecting ':' delimiter at character 5"}
    ]


@pytest.mark.parametrize("body", [b'{"a": ' + b"[" * 100_000, b'{"a": "\xff"}', b'{"a": ' + b"9" * 5000 + b"}"])
def test_json_that_cannot_be_held_is_the_client_s_fault(client: TestClient, body: bytes) -> None:
    assert_problem(client.post("/jobs", content=body, headers=JSON), 400, "bad_request")


@pytest.mark.parametrize(
    ("change", "pointer", "message"),
    [
        ({"method": "llkd"}, "/method", "must be a JSON object with a `kind`"),
        ({"method": {}}, "/method", "has no `kind`, which says what the other fields mean"),
        ({"method": {"kind": "lkld"}}, "/method", "there is no kind 'lkld'; there are 'llkd', 'no_selection', "),
        ({"student": "scratch"}, "/student", "must be a JSON object"),
    ],
)
def test_a_part_of_another_shape_is_refused_in_words_of_ours(
    client: TestClient, change: dict[str, Any], pointer: str, message: str
) -> None:
    answer = client.post("/jobs", json=tiny_spec("ds_0123456789abcdef", **change))
    [fault] = assert_problem(answer, 422, "validation_error")["errors"]
    assert (fault["pointer"], fault["message"][: len(message)]) == (pointer, message)


def test_what_the_client_sent_is_not_echoed_at_length(client: TestClient) -> None:
    for change in ({"method": {"kind": "k" * 100_000}}, {"k" * 100_000: 1}):
        answer = client.post("/jobs", json=tiny_spec("ds_0123456789abcdef", **change))
        assert_problem(answer, 422, "validation_error")
        assert len(answer.content) < 4000


def test_a_text_that_is_too_long_or_short_is_counted_in_characters(client: TestClient) -> None:
    spec = tiny_spec("ds_0123456789abcdef", name="x" * 201, labels=["", "b"])
    problem = assert_problem(client.post("/jobs", json=spec), 422, "validation_error")
    assert {fault["pointer"]: fault["message"] for fault in problem["errors"]} == {
        "/name": "Value should have at most 200 characters, not 201",
        "/labels/0/name": "Value should have at least 1 character, not 0",
    }


@pytest.mark.parametrize("budget", [{"max_teacher_tokens": 10**30}, {"max_seconds": 1e308}])
def test_a_budget_too_large_to_be_written_down_is_refused(client: TestClient, budget: dict[str, float]) -> None:
    answer = client.post("/jobs", json=tiny_spec(add_dataset(sentences(9, 0)), budget=budget))
    problem = assert_problem(answer, 422, "validation_error")
    assert [fault["pointer"] for fault in problem["errors"]] == [f"/budget/{next(iter(budget))}"]
    assert stored()["jobs"] == 0


@pytest.mark.parametrize(("field", "most"), [("max_teacher_tokens", 10**15), ("max_seconds", 10**9)])
def test_the_largest_budget_is_accepted_and_read_back(client: TestClient, field: str, most: int) -> None:
    answer = client.post("/jobs", json=tiny_spec(add_dataset(sentences(9, 0)), budget={field: most}))
    assert answer.status_code == 202
    assert client.get(answer.headers["location"]).json()["spec"]["budget"][field] == most


# --- queries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["garbage", "", "%00", "٣", "job_xyz", "7"])
def test_a_cursor_that_no_page_gave_is_refused_and_does_not_answer_with_some_page(
    client: TestClient, after: str
) -> None:
    for path in ("/jobs", "/datasets"):
        assert_problem(client.get(f"{path}?after={after}"), 422, "validation_error")


@pytest.mark.parametrize("name", ["metadata", "metadata[]", "metadata[team", "metadata[a b]", "metadata[a%00]"])
def test_a_malformed_metadata_filter_is_refused_and_does_not_answer_with_every_job(
    client: TestClient, name: str
) -> None:
    assert_problem(client.get(f"/jobs?{name}=x"), 422, "unprocessable")


@pytest.mark.parametrize(
    ("query", "meant"),
    [
        ("limt=5", " Did you mean limit?"),
        ("Limit=5", " Did you mean limit?"),
        ("team=support", ""),
    ],
)
def test_a_parameter_that_a_route_does_not_know_is_refused_with_those_it_knows(
    client: TestClient, query: str, meant: str
) -> None:
    told = f"unknown parameter; this route takes status, method, limit, after, metadata[key].{meant}"
    problem = assert_problem(client.get(f"/jobs?{query}&limit=1"), 422, "validation_error")
    name = query.partition("=")[0]
    assert problem["detail"] == f"query/{name}: {told}"
    assert problem["errors"] == [
        {"line": None, "pointer": f"/query/{name}", "code": "unknown_parameter", "message": told}
    ]


def test_every_route_refuses_parameters_that_it_does_not_know(client: TestClient) -> None:
    key = {"Authorization": f"Bearer {new_key('alice', scope='admin')}"}
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for method in operations:
            answer = client.request(method, path, params={"verbos": "1"}, headers=key)
            problem = assert_problem(answer, 422, "validation_error")
            assert [fault["pointer"] for fault in problem["errors"]] == ["/query/verbos"], f"{method} {path}"
    assert client.head("/jobs/x/checkpoint?verbos=1").status_code == 422
    assert_problem(TestClient(client.app).get("/jobs?verbos=1"), 401, "unauthorized")


def test_thousands_of_unknown_parameters_are_counted_and_answered_in_short(client: TestClient) -> None:
    problem = assert_problem(client.get("/jobs?" + "&".join(f"limit{n}" for n in range(3000))), 422, "validation_error")
    assert (len(problem["errors"]), problem["total_errors"]) == (100, 3000)


@pytest.mark.parametrize("page", ["/", "/docs", "/openapi.json", "/web/app.js"])
def test_pages_are_shown_whatever_stands_behind_their_address(client: TestClient, page: str) -> None:
    assert client.get(f"{page}?from=mail").status_code == 200


# --- methods and paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "methods"), [("/jobs", "GET, POST"), ("/datasets/x", "DELETE, GET"), ("/", "GET")])
def test_405_names_every_method_of_the_path(client: TestClient, path: str, methods: str) -> None:
    answer = client.put(path)
    assert assert_problem(answer, 405, "method_not_allowed")["detail"] == f"This path takes {methods}."
    assert answer.headers["allow"] == methods


def test_a_trailing_slash_is_another_path_and_no_redirect(client: TestClient) -> None:
    for answer in (client.get("/jobs/", follow_redirects=False), client.post("/datasets/", follow_redirects=False)):
        assert_problem(answer, 404, "not_found")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_probe_may_ask_with_head(client: TestClient, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_page_of_another_origin_may_read_the_headers(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cors_origins", ["https://lab.example"])
    answer = TestClient(create_app()).get("/healthz", headers={"Origin": "https://lab.example"})
    assert answer.headers["access-control-allow-origin"] == "https://lab.example"
    assert answer.headers["access-control-expose-headers"] == "*"


# --- the OpenAPI document -------------------------------------------------------------------------------------------


def test_the_documentation_says_where_to_read_without_the_internet(client: TestClient) -> None:
    page = client.get("/docs").text
    assert '<div id="swagger-ui"><p>' in page
    assert '<a href="/openapi.json">' in page


def test_the_document_describes_every_error_as_problem_json(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemRead"}}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if status >= "400" and path != "/readyz":
                    assert response["content"] == problem, f"{method} {path} {status}"

"""What a browser is told: load nothing from elsewhere, frame nothing, come back by https, keep no copy."""

from __future__ import annotations

import base64
import hashlib
import re

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select

from app.db import session_scope
from app.main import create_app
from app.models import AuditEntry
from tests.support import serving

EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


@pytest.mark.parametrize("path", ["/", "/docs", "/web/app.js", "/jobs", "/datasets/ds_none", "/nowhere", "/metrics"])
def test_every_answer_carries_the_headers_also_when_it_is_an_error(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert {name: answer.headers.get(name) for name in EVERYWHERE} == EVERYWHERE
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_what_a_key_opens_is_kept_by_no_cache(client: TestClient) -> None:
    for path in ("/jobs", "/webhooks/secret", "/jobs/job_none"):
        assert client.get(path).headers["cache-control"] == "no-store"
    assert client.get("/web/app.js").headers.get("cache-control") != "no-store"


def test_a_word_of_a_stranger_that_is_no_method_makes_no_figures_of_its_own(client: TestClient) -> None:
    for number in range(3):
        assert client.request(f"WORD{number}", "/nowhere").status_code == 404
    figures = client.get("/metrics").text
    assert "WORD" not in figures
    assert 'method="other",route="other",status="404"' in figures


def test_a_browser_that_came_by_https_is_told_to_stay_there_and_no_other(database: Engine) -> None:
    app = create_app()
    assert "max-age=" in TestClient(app, base_url="https://testserver").get("/").headers["strict-transport-security"]
    assert "strict-transport-security" not in TestClient(app).get("/").headers


def test_behind_a_proxy_with_tls_the_proxy_s_word_counts(database: Engine) -> None:
    from_outside = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9"}
    with serving() as url:
        answer = httpx.post(f"{url}/jobs", headers=from_outside, content=b"{}")
        assert "strict-transport-security" in answer.headers
        assert "strict-transport-security" not in httpx.get(f"{url}/healthz").headers
    with session_scope() as session:
        assert session.scalars(select(AuditEntry.address)).all() == ["203.0.113.9"]


def test_no_other_origin_is_let_in_by_default(client: TestClient) -> None:
    origin = {"Origin": "https://elsewhere.example"}
    assert "access-control-allow-origin" not in client.get("/jobs", headers=origin).headers
    asked = client.options("/jobs", headers={**origin, "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("path", ["/web", "/web/", "/web/%2e%2e/main.py", "/web/..%2fmain.py", "/web//etc/passwd"])
def test_no_directory_is_listed_and_no_file_outside_is_served(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=True).status_code == 404


def test_the_api_s_page_runs_the_script_it_holds_and_no_other(client: TestClient) -> None:
    page = client.get("/docs")
    policy = page.headers["content-security-policy"]
    scripts = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    allowed = re.search(r"script-src ([^;]+)", policy)
    assert allowed is not None
    assert f"'sha256-{digest}'" in allowed[1]
    assert "unsafe" not in allowed[1]
    for source in re.findall(r'<script src="(https://[^/]+)', page.text):
        assert source in allowed[1]
    assert client.get("/redoc").status_code == 404

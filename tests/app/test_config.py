"""Settings: how they may be written, and what is told where one cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.config import BadSettings, Settings, settings


@pytest.fixture
def fresh() -> Iterator[None]:
    """Settings that are read anew, here and by whoever comes next."""
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.parametrize("written", ["/models,/more", " /models , /more ", '["/models", "/more"]'])
def test_a_list_is_separated_by_commas_or_json(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.setenv("UNDERSTUDY_MODEL_ROOTS", written)
    assert Settings().model_roots == [Path("/models"), Path("/more")]


def test_one_directory_is_a_list_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_MODEL_ROOTS", "/models")
    monkeypatch.setenv("UNDERSTUDY_CORS_ORIGINS", "")
    assert (Settings().model_roots, Settings().cors_origins) == ([Path("/models")], [])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MAX_ROWS", "hidden", "UNDERSTUDY_MAX_ROWS: Input should be a valid integer"),
        ("MODEL_ROOTS", '["hidden"', "UNDERSTUDY_MODEL_ROOTS: is not JSON: Expecting ',' delimiter"),
        ("ENDPOINTS", '{"a": {"model": "m", "api_key": "hidden"}}', "UNDERSTUDY_ENDPOINTS/a/base_url: Field required"),
        ("DATABASE_URL", "mysql://u:hidden@host/x", "UNDERSTUDY_DATABASE_URL: must be like postgresql://"),
    ],
)
def test_a_bad_setting_is_named_and_its_value_is_not(
    fresh: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(f"UNDERSTUDY_{name}", value)
    with pytest.raises(BadSettings) as caught:
        settings()
    assert told in str(caught.value)
    assert "hidden" not in str(caught.value)

"""What several tests need beside the fixtures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app import keys
from app.db import session_scope

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def new_key(tenant: str) -> str:
    """An API key of a tenant, committed."""
    with session_scope() as session:
        return keys.create(session, tenant, "made by a test")[1]


def shared_data(name: str) -> Path:
    """A directory of the shared data; skips the test where there is none."""
    directory = SHARED_DATA / name
    if not directory.is_dir():
        pytest.skip(f"the shared data set {name} is not on this machine")
    return directory


def wait_until(claim: Callable[[], bool], seconds: float = 10.0, what: str = "") -> None:
    """Wait for something to become true; fail the test when it does not."""
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain{': ' + what if what else ''}")
        time.sleep(0.05)

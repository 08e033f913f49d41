"""Who may import whom, as pyproject.toml says; and that the server needs neither torch nor the workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_import_contracts_are_kept() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_server_starts_without_loading_torch_or_the_workers() -> None:
    code = """
import sys
import app.main, app.lifecycle, app.preflight
app.main.create_app()
heavy = {name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "sklearn", "scipy", "workers"}
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

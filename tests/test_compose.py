"""docker-compose.yml, Dockerfile and .env.example agree with each other and with the code; no Docker engine needed."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from app.cli import app
from app.config import Settings

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)
SETTINGS = {f"UNDERSTUDY_{name.upper()}" for name in Settings.model_fields}
ENV_EXAMPLE = (ROOT / ".env.example").read_text()
EXAMPLES = dict(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=(.*)$", ENV_EXAMPLE, re.MULTILINE))


def bin_directory() -> Path:
    """Where the tools of this environment lie."""
    return Path(sys.executable).parent


def test_the_compose_file_follows_the_compose_specification() -> None:
    command = [bin_directory() / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_dockerfile_passes_hadolint() -> None:
    checked = subprocess.run([bin_directory() / "hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", OURS)
def test_every_service_runs_a_command_that_exists(name: str) -> None:
    command = typer.main.get_command(app)
    words = list(SERVICES[name]["command"])
    context = command.make_context("understudy", list(words), resilient_parsing=True)
    part = command.get_command(context, words[0])  # type: ignore[attr-defined]
    assert part is not None, f"understudy has no command {words[0]!r}"
    part.make_context(words[0], words[1:], parent=context)  # raises for an option it does not know


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_runs_without_privileges_on_a_read_only_root(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "cap_add" not in service
    assert name in OURS or service["user"] not in ("root", "0")


def test_only_the_api_is_published_and_only_on_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(published) == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in published["api"])


def test_every_image_is_pinned_by_version() -> None:
    images = [service["image"] for service in SERVICES.values()]
    images += re.findall(r"^ARG PYTHON_IMAGE=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for image in images:
        assert re.fullmatch(r"[a-z\-]+:\d+\.\d+(\.\d+)?(-[a-z]+)*", image), image


def test_services_wait_for_services_that_can_meet_the_condition() -> None:
    for name, service in SERVICES.items():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "test" in SERVICES[other]["healthcheck"], f"{name} waits for {other}, which has no health check"
            else:
                assert SERVICES[other]["restart"] == "no", f"{name} waits for the end of {other}, which starts again"


def test_volumes_and_networks_that_are_used_are_declared_and_no_others() -> None:
    volumes = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    networks = {network for service in SERVICES.values() for network in service["networks"]}
    assert volumes == set(COMPOSE["volumes"])
    assert networks == set(COMPOSE["networks"])


@pytest.mark.parametrize("name", OURS)
def test_every_variable_of_our_services_is_a_setting(name: str) -> None:
    assert set(SERVICES[name]["environment"]) <= SETTINGS


def test_every_variable_that_compose_reads_stands_in_the_env_example() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", str(SERVICES)))
    assert {"POSTGRES_PASSWORD", "API_PORT"} <= used <= set(EXAMPLES)


def test_the_build_targets_are_stages_of_the_dockerfile() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    arguments = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for name in OURS:
        assert SERVICES[name]["build"]["target"] in stages
        assert set(SERVICES[name]["build"].get("args", {})) <= arguments


def test_everything_the_dockerfile_copies_exists_and_reaches_the_build() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in allowed), f"{source} is kept out by .dockerignore"


def test_the_env_example_names_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name in EXAMPLES if name.startswith("UNDERSTUDY_")} == SETTINGS
    for name in SETTINGS:
        monkeypatch.setenv(name, EXAMPLES[name])
    written = Settings(_env_file=None)
    for name, field in Settings.model_fields.items():
        if field.default is not None:  # there is no way to write null; the example says what leaving it out means
            assert getattr(written, name) == field.get_default(call_default_factory=True), name


def test_the_env_example_says_what_each_setting_is_for() -> None:
    lines = ENV_EXAMPLE.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("# UNDERSTUDY_"):
            assert re.match(r"# [A-Z].*\.$", lines[number - 1]), f"no sentence above {line}"

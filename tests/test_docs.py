"""The documents say what is so: their commands run, their answers have that shape, their tables name everything.

In docs/api.md and docs/quickstart.md every ```bash block is run, in order, in one shell, against a real server; ```sh
blocks are for reading only. A block's requests must succeed, or answer as its comment `# → 422` says. A ```json block
that follows shows the answer: each of its keys must be in the real one, `…` stands for anything.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter
from sqlalchemy import Engine, select

from app import main, options
from app.db import session_scope
from app.errors import TITLES, Problem
from app.models import PHASES, Job, JobMetric
from tests.support import label, new_key, serving
from workers import tasks
from workers.algorithms.selection import RULES
from workers.training.distill import STEPS
from workers.training.run import LEDGER_REASONS, make_rule

REPOSITORY = Path(__file__).resolve().parent.parent
API, QUICKSTART, METHODS = (REPOSITORY / "docs" / name for name in ("api.md", "quickstart.md", "methods.md"))
PAGES = sorted({*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("examples/**/*.md")})
SOURCES = [path for package in ("app", "workers") for path in (REPOSITORY / package).rglob("*.py")]
ROWS = {"unlabeled.jsonl": 36, "validation.jsonl": 12, "test.jsonl": 12}
"""How much of the examples the pages get here: enough to train on, little enough for a test."""

TEACHER_KINDS = {entry.model_fields["kind"].annotation.__args__[0]: entry for entry in get_args(get_args(options.Teacher)[0])}  # fmt: skip
METHOD_KINDS = {entry.model_fields["kind"].annotation.__args__[0]: entry for entry in get_args(get_args(options.Method)[0])}  # fmt: skip


# --- the calls run --------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A fenced block of a page, and the block that shows its answer."""

    page: str
    line: int
    language: str
    text: str
    answer: Block | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Outcome:
    """What a block printed, and the requests it made: method, status, path."""

    block: Block
    output: str
    requests: list[tuple[str, int, str]]


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks; an answer is the block that follows with nothing in between."""
    text = page.read_text()
    found: list[Block] = []
    end = -1
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        block = Block(page.name, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        if found and not text[end : match.start()].strip():
            found[-1].answer = block
        found.append(block)
        end = match.end()
    return found


@pytest.fixture
def reader(database: Engine, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Where a reader of the pages is: a directory like the repository with few rows, a server's URL, and its worker."""
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("the pages are run with bash and curl, and one of them is not on this machine")
    tickets = tmp_path / "examples" / "tickets"
    shutil.copytree(REPOSITORY / "examples" / "tickets", tickets)
    for name, rows in ROWS.items():
        (tickets / name).write_text("".join((tickets / name).read_text().splitlines(keepends=True)[:rows]))
    (tickets / "spec.json").write_text(shortened((tickets / "spec.json").read_text()))
    comparison = json.loads(shortened((tickets / "comparison.json").read_text()))
    few = {"arms": comparison["arms"][:2], "seeds": [0]}
    (tickets / "comparison.json").write_text(json.dumps(comparison | few))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "api-key").write_text(new_key("alice", scope="admin") + "\n")
    with serving() as url, working():
        yield tmp_path, url


def shortened(text: str) -> str:
    """The same job with one epoch of a one-layer student."""
    return re.sub(r'"(epochs|num_layers)": \d+', r'"\1": 1', text)


@contextmanager
def working() -> Iterator[None]:
    """A worker, in a thread: labels and trains what is waiting, until the block ends and nothing is in hand."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.1):
            with session_scope() as session:
                waiting = session.scalars(select(Job.id).where(Job.status.in_(("queued", "running")))).all()
            for job_id in waiting:
                label(job_id)
                tasks.train(job_id)

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(60)


def run_bash(page: Path, place: Path, url: str) -> list[Outcome]:
    """Run the page's bash blocks in one shell; what each did."""
    blocks = [block for block in blocks_of(page) if block.language == "bash"]
    report = r"'%{stderr}\n@request %{method} %{http_code} %{url_effective}\n'"
    script = ["set -eo pipefail", f'curl() {{ command curl --noproxy "*" --max-time 60 --write-out {report} "$@"; }}']
    for number, block in enumerate(blocks):
        text = shortened(block.text).replace("http://127.0.0.1:8000", url)
        script += [text, f"printf '\\n@end {number}\\n' | tee /dev/stderr"]
    environment = {
        **os.environ, "UNDERSTUDY_URL": url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=place, env=environment, capture_output=True, text=True, timeout=200
    )
    outputs, errors = (re.split(r"\n@end \d+\n", text) for text in (done.stdout, done.stderr))
    if done.returncode != 0:
        pytest.fail(f"{blocks[len(outputs) - 1].place} failed:\n{outputs[-1]}\n{errors[-1]}")
    return [
        Outcome(block, output, [
            (method, int(status), address.removeprefix(url).partition("?")[0])
            for method, status, address in re.findall(r"@request (\w+) (\d+) (\S+)", error)
        ])
        for block, output, error in zip(blocks, outputs, errors, strict=False)
    ]  # fmt: skip


def assert_statuses_are_as_told(outcome: Outcome) -> None:
    """The block's own comment, or else success."""
    told = re.search(r"# → (\d+)", outcome.block.text)
    for method, status, path in outcome.requests:
        if told:
            assert status == int(told[1]), f"{outcome.block.place}: {method} {path}: {outcome.output}"
        else:
            assert 200 <= status < 300, f"{outcome.block.place}: {method} {path} answered {status}: {outcome.output}"


def assert_answer_is_as_shown(outcome: Outcome) -> None:
    """Every key that the page shows is in the real answer, with a value of that type."""
    answer = outcome.block.answer
    if answer is not None and answer.language == "json":
        assert_like(json.loads(answer.text), json.loads(outcome.output), answer.place)


def assert_like(shown: Any, real: Any, where: str) -> None:
    if shown == "…" or shown is None or real is None:
        return
    if isinstance(shown, dict):
        assert isinstance(real, dict), f"{where}: shows an object, answers {real!r}"
        for name in shown.keys() - {"…"}:
            assert name in real, f"{where}: there is no {name!r} in {sorted(real)}"
            assert_like(shown[name], real[name], f"{where} {name}")
    elif isinstance(shown, list):
        assert isinstance(real, list), f"{where}: shows a list, answers {real!r}"
        entries = [entry for entry in shown if entry != "…"]
        assert len(entries) <= len(real) or not entries, f"{where}: shows {len(entries)} entries, answers {len(real)}"
        for number, (entry, other) in enumerate(zip(entries, real, strict=False)):
            assert_like(entry, other, f"{where} {number}")
    else:
        kinds = [float if isinstance(value, int | float) and not isinstance(value, bool) else type(value) for value in (shown, real)]  # fmt: skip
        assert kinds[0] is kinds[1], f"{where}: shows {shown!r}, answers {real!r}"


def documented_routes() -> dict[str, list[int]]:
    """`GET /jobs/{job_id}` -> the statuses its heading tells."""
    headings = re.findall(r"^### `([A-Z]+ /\S*)` → ([\d, ]+)$", API.read_text(), re.MULTILINE)
    return {route: [int(status) for status in statuses.split(",")] for route, statuses in headings}


def test_every_call_of_the_api_page_runs_and_answers_as_it_says(reader: tuple[Path, str]) -> None:
    outcomes = run_bash(API, *reader)
    for outcome in outcomes:
        assert_statuses_are_as_told(outcome)
        assert_answer_is_as_shown(outcome)
    made = [request for outcome in outcomes for request in outcome.requests]
    for route, told in documented_routes().items():
        method, _, template = route.partition(" ")
        pattern = re.compile(re.sub(r"\{\w+\}", "[^/]+", template))
        answered = {
            status for verb, status, path in made if verb.replace("HEAD", "GET") == method and pattern.fullmatch(path)
        }
        assert told[0] in answered, f"{route} → {told[0]} is told but not shown (shown: {answered})"
    with session_scope() as session:
        series = set(session.scalars(select(JobMetric.name).distinct()))
    assert_named({re.sub("/.*", "/<label>", name) for name in series}, API, "series")


def test_the_quickstart_ends_in_a_pipeline_all_three_ways(
    reader: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, url = reader
    for outcome in run_bash(QUICKSTART, place, url):
        assert_statuses_are_as_told(outcome)
    monkeypatch.chdir(place)
    capsys.readouterr()
    for block in blocks_of(QUICKSTART):
        if block.language == "python":
            exec(compile(block.text.replace("http://127.0.0.1:8000", url), block.place, "exec"), {})
    answer = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    names = {
        entry["name"] for entry in json.loads((place / "examples" / "tickets" / "spec.json").read_text())["labels"]
    }
    assert answer[0]["label"] in names
    for folder in ("student", "student-by-curl", "student-by-python"):
        assert (place / folder / "model.safetensors").is_file(), folder


# --- the tables name everything -------------------------------------------------------------------------------------


def assert_named(names: set[str], page: Path, what: str) -> None:
    """Each name stands in the page as code."""
    spans = set(
        re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    )
    missing = sorted(names - spans)
    assert not missing, f"{page.name} does not explain {what}: {', '.join(missing)}"


def section(page: Path, heading: str) -> str:
    """What stands under a heading, down to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#|\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {heading!r}"
    return found[1]


def test_every_route_has_its_section_and_no_section_is_of_another_route() -> None:
    document = main.create_app().openapi()
    routes = {
        f"{method.upper()} {path}": {int(status) for status in operation["responses"]}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method != "head"
    }
    told = documented_routes()
    assert sorted(told) == sorted(routes)
    for route, statuses in told.items():
        assert set(statuses) <= routes[route], route


OPTION_TABLES = {
    "The whole spec": options.JobSpec,
    "`labels[]`": options.Label,
    "`examples[]`": options.Example,
    "`student`": options.Student,
    "`training`": options.Training,
    "`budget`": options.Budget,
    "`labeling`": options.Labeling,
    "`labeling.waves`": options.Waves,
    "`webhook`": options.Webhook,
    "`few_shot`": options.FewShot,
    "The comparison spec": options.ComparisonSpec,
    "`arms[]`": options.Arm,
    **{f"`teacher`: `{kind}`": entry for kind, entry in TEACHER_KINDS.items()},
    **{f"`method`: `{kind}`": entry for kind, entry in METHOD_KINDS.items()},
    "`method.teacher`": options.EncoderTeacher,
    "`method.selection`": options.LLKDThresholds,
}


def asked_for() -> set[type]:
    """Every options class that can stand in a job's or comparison's spec."""
    whole = (options.JobSpec, options.ComparisonSpec)
    names = {name for entry in whole for name in TypeAdapter(entry).json_schema()["$defs"]}
    return {*whole, *(getattr(options, name) for name in names)}


def test_every_part_of_the_spec_has_its_table() -> None:
    assert set(OPTION_TABLES.values()) == asked_for()


@pytest.mark.parametrize("heading", OPTION_TABLES)
def test_a_table_of_the_spec_has_every_option_with_its_default_and_limits(heading: str) -> None:
    entry = OPTION_TABLES[heading]
    schema = entry.model_json_schema()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section(API, heading), re.MULTILINE))
    fields = {name: field for name, field in schema["properties"].items() if name != "kind"}
    assert sorted(rows) == sorted(fields)
    for name, field in fields.items():
        takes, default, _ = re.split(r" \| ", rows[name], maxsplit=2)
        if name in schema.get("required", []):
            assert default == "required", name
        elif not isinstance(field["default"], dict) or not field["default"]:
            assert default == f"`{json.dumps(field['default'])}`", name
        bounds = {**field, **field.get("anyOf", [{}])[0]}
        for bound in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "maxLength", "maxItems"):
            if bound in bounds:
                assert re.search(rf"\b{bounds[bound]:g}\b".replace("e+", r"e\+"), takes) or str(bounds[bound]) in takes, (name, bound)  # fmt: skip
        for value in bounds.get("enum", []):
            assert f"`{value}`" in takes, name


@pytest.mark.parametrize("kind", [*METHOD_KINDS, *TEACHER_KINDS])
def test_the_methods_page_explains_every_kind_and_each_of_its_options(kind: str) -> None:
    text = section(METHODS, f"`{kind}`")
    entry = (METHOD_KINDS | TEACHER_KINDS)[kind]
    missing = [name for name in entry.model_fields if name != "kind" and f"`{name}`" not in text]
    assert not missing, f"the section of {kind} does not explain {missing}"


def test_the_readme_lists_every_method() -> None:
    assert_named(set(METHOD_KINDS), REPOSITORY / "README.md", "methods")


def test_every_reason_of_the_ledger_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section(API, "`GET /jobs/{job_id}/samples` → 200"), re.MULTILINE)
    assert sorted(rows) == sorted(LEDGER_REASONS)


def test_every_series_that_a_rule_adds_is_explained() -> None:
    names: set[str] = set()
    trained = {kind: entry for kind, entry in METHOD_KINDS.items() if kind != "teacher_alone"}
    for kind, entry in trained.items():
        rule = make_rule(entry(kind=kind))
        state = rule.initial(3)
        names |= {f"threshold_{side}/<label>" for side in rule.thresholds(state)} | set(rule.summary(state))
    assert set(trained) == {*RULES, *STEPS}
    assert_named(names, API, "series")


def calls(*names: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call in the sources of a function or method of these names."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
                if name in names:
                    yield name, node


def literal(node: ast.AST, **fillings: list[str]) -> list[str]:
    """The strings an expression can be: a constant, or an f-string whose first part is one of the fillings."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.FormattedValue):
        variable, rest = ast.unparse(node.values[0].value), node.values[1]
        assert isinstance(rest, ast.Constant)
        return [filling + rest.value for filling in fillings[variable]]
    return []


def test_every_type_of_event_is_explained() -> None:
    position = {"emit": 2, "event": 0}
    types = {
        type
        for name, call in calls("emit", "event")
        if len(call.args) > position[name]
        for type in literal(call.args[position[name]], name=list(PHASES[1:]), what=["teacher", "storage"])
    }
    assert {"job.queued", "training.epoch", "training.started"} <= types
    assert_named(types, API, "events")


def test_every_error_code_is_explained() -> None:
    position = {"note": 1, "BadRow": 1, "WorkFailed": 0, "_warning": 0, "fail_locked": 2, "fail": 2}
    codes = {
        code
        for name, call in calls(*position)
        if len(call.args) > position[name]
        for code in literal(call.args[position[name]], split=["validation", "test"])
    }
    assert {"labels_missing", "empty_text", "teacher_constant", "similar_labels", "worker_lost", "test_without_labels"} <= codes  # fmt: skip
    codes |= {problem.code for problem in [Problem, *subclasses(Problem)]}
    codes |= {"invalid_json", "validation_error", "internal_error", TITLES[405].lower().replace(" ", "_")}
    assert_named(codes, API, "error codes")


def subclasses(kind: type[Problem]) -> Iterator[type[Problem]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


# --- the links lead somewhere ---------------------------------------------------------------------------------------


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_to_a_file_or_heading_resolves(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in slugs(target)):
            broken.append(link)
    assert not broken

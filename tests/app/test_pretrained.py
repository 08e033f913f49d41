"""Which models a client may name, and what it reads when it may not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app import pretrained
from app.pretrained import ModelUnresolvable, Source, resolve

ROBERTA = {"model_type": "roberta", "num_hidden_layers": 2, "architectures": ["RobertaModel"]}


def write_model(folder: Path, config: dict[str, Any] = ROBERTA, weights: bytes = b"\x01" * 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, len(weights)]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    return folder


def student(name: str, *roots: Path, **options: Any) -> Source:
    return resolve(name, purpose="student", roots=list(roots), **{"allow_hub": False, **options})


def test_a_directory_under_a_root_is_found_by_relative_and_by_absolute_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models" / "team" / "small")
    relative, absolute = student("team/small", tmp_path / "models"), student(str(folder), tmp_path / "models")
    assert (relative.kind, relative.path, relative.layers) == ("directory", folder, 2)
    assert (absolute.path, absolute.revision) == (folder, relative.revision)


def test_a_directory_comes_before_the_bundled_model(tmp_path: Path) -> None:
    write_model(tmp_path / pretrained.BUNDLED)
    assert student(pretrained.BUNDLED, tmp_path).kind == "directory"


@pytest.mark.parametrize("name", ["../secret", "models/../../secret", "{outside}", "link", "", ".", "/", "x" * 299])
def test_nothing_outside_the_roots_is_found(tmp_path: Path, name: str) -> None:
    outside = write_model(tmp_path / "secret")
    root = tmp_path / "models"
    root.mkdir()
    (root / "link").symlink_to(outside)
    with pytest.raises(ModelUnresolvable, match="There is no model"):
        student(name.format(outside=outside), root)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "old")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelUnresolvable, match=r"only pytorch_model\.bin; only safetensors are read"):
        student("old", tmp_path)


def test_a_pickled_module_of_a_sentence_transformers_model_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "st")
    modules = [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnresolvable, match="only safetensors are read"):
        student("st", tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", ROBERTA | {"auto_map": {"AutoModel": "code.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}),
        ("modules.json", [{"path": "", "type": "code.Transformer"}]),
    ],
)
def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path, file: str, content: Any) -> None:
    folder = write_model(tmp_path / "custom")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ModelUnresolvable, match="code of its own"):
        student("custom", tmp_path)


@pytest.mark.parametrize("config", ["{", "[]"])
def test_a_damaged_config_is_named(tmp_path: Path, config: str) -> None:
    (write_model(tmp_path / "broken") / "config.json").write_text(config)
    with pytest.raises(ModelUnresolvable, match=r"config\.json of 'broken' is damaged"):
        student("broken", tmp_path)


def test_a_model_is_refused_for_a_purpose_it_cannot_serve(tmp_path: Path) -> None:
    write_model(tmp_path / "llama", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    write_model(tmp_path / "encoder")
    write_model(
        tmp_path / "bart",
        {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True},
    )
    with pytest.raises(ModelUnresolvable, match="of type 'llama'"):
        student("llama", tmp_path)
    with pytest.raises(ModelUnresolvable, match="has no tokenizer"):
        resolve("llama", purpose="causal_lm", roots=[tmp_path], allow_hub=False)
    (tmp_path / "llama/tokenizer.json").write_text("{}")
    assert resolve("llama", purpose="causal_lm", roots=[tmp_path], allow_hub=False).kind == "directory"
    for name in ("encoder", "bart", pretrained.BUNDLED, "scratch"):
        with pytest.raises(ModelUnresolvable):
            resolve(name, purpose="causal_lm", roots=[tmp_path], allow_hub=False)
    with pytest.raises(ModelUnresolvable, match="must be pretrained"):
        resolve("scratch", purpose="encoder_teacher", roots=[], allow_hub=False)


def test_a_source_knows_its_layers_before_it_is_loaded(tmp_path: Path) -> None:
    write_model(tmp_path / "two")
    assert [student(name, tmp_path).layers for name in ("two", pretrained.BUNDLED, "scratch")] == [2, 6, None]


def test_the_revision_follows_weights_config_and_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    first = student("a", write_model(tmp_path / "one" / "a").parent).revision
    assert student("b", write_model(tmp_path / "two" / "b").parent).revision == first
    assert student("c", write_model(tmp_path / "c", weights=b"\x02" * 8).parent).revision != first
    assert student("d", write_model(tmp_path / "d", ROBERTA | {"x": 1}).parent).revision != first
    (write_model(tmp_path / "e") / "tokenizer.json").write_text("{}")
    assert student("e", tmp_path).revision != first


def test_the_refusal_lists_what_would_do(tmp_path: Path) -> None:
    write_model(tmp_path / "team" / "small")
    with pytest.raises(ModelUnresolvable) as refusal:
        student("roberta-base", tmp_path)
    assert "all-MiniLM-L6-v2, scratch, team/small" in refusal.value.detail
    assert (refusal.value.status, refusal.value.code) == (422, "model_unresolvable")


def test_the_bundled_model_is_accepted_where_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "BUNDLED_PACKAGE", "a_package_that_is_not_there")
    assert student("sentence-transformers/all-MiniLM-L6-v2").path is None


# --- the hub: a server of the test's own ------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def do_GET(self) -> None:
        name, _, file = self.path.lstrip("/").partition("/resolve/main/")
        content = self.files.get(f"{name}:{file}")
        self.send_response(401 if name == "org/gated" else 404 if content is None else 200)
        self.send_header("X-Repo-Commit", "c0ffee")
        self.end_headers()
        if content is not None and self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of a hub, by `name:file`."""
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_pinned_to_its_commit(hub: dict[str, bytes]) -> None:
    hub["org/small:config.json"] = json.dumps(ROBERTA).encode()
    hub["org/small:model.safetensors"] = b""
    assert student("org/small", allow_hub=True) == Source("hub", "org/small", None, "c0ffee", 2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/absent", "has no model 'org/absent'"),
        ("org/gated", "gated, private or absent"),
        ("org/pickled", "no safetensors on the hub"),
        ("org/a/b", "must look like org/name"),
        ("org/../small", "must look like org/name"),
        ("org/small?x=1", "must look like org/name"),
    ],
)
def test_a_hub_model_that_cannot_be_loaded_is_refused(hub: dict[str, bytes], name: str, reason: str) -> None:
    hub["org/pickled:config.json"] = json.dumps(ROBERTA).encode()
    with pytest.raises(ModelUnresolvable, match=reason):
        student(name, allow_hub=True)


def test_an_unreachable_hub_is_said_to_be_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelUnresolvable, match="hub is not reachable"):
        student("org/small", allow_hub=True)

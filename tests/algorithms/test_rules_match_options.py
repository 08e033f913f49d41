"""What a client may ask for and what the rules take are the same: kinds, fields and defaults, both ways."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from app.options import Method
from workers.algorithms.selection import RULES
from workers.training.distill import STEPS

OPTIONS = {get_args(cls.model_fields["kind"].annotation)[0]: cls for cls in get_args(get_args(Method)[0])}


def test_every_method_has_a_rule_or_a_step_and_the_other_way_round() -> None:
    assert set(RULES) | set(STEPS) == set(OPTIONS)
    assert not set(RULES) & set(STEPS)


@pytest.mark.parametrize("kind", sorted(set(OPTIONS) & set(RULES)))
def test_a_rule_takes_the_options_of_its_kind_with_the_same_defaults(kind: str) -> None:
    fields = {name: field.default for name, field in OPTIONS[kind].model_fields.items() if name != "kind"}
    assert {field.name: field.default for field in dataclasses.fields(RULES[kind])} == fields


@pytest.mark.parametrize("kind", sorted(set(OPTIONS) & set(RULES)))
def test_a_rule_is_built_from_the_parsed_options(kind: str) -> None:
    options = OPTIONS[kind](kind=kind).model_dump(exclude={"kind"})
    assert dataclasses.asdict(RULES[kind](**options)) == options

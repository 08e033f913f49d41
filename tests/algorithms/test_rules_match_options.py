"""What a client may ask for and what the rules take are the same: kinds, fields and defaults, both ways."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from app.options import Method, needs_confidence
from workers.algorithms.selection import RULES, Signals
from workers.training.distill import STEPS

OPTIONS = {get_args(cls.model_fields["kind"].annotation)[0]: cls for cls in get_args(get_args(Method)[0])}


def test_every_method_has_a_rule_or_a_step_and_the_other_way_round() -> None:
    assert set(RULES) | set(STEPS) == set(OPTIONS) - {"teacher_alone"}, "which trains nothing"
    assert not set(RULES) & set(STEPS)


@pytest.mark.parametrize("kind", sorted(set(OPTIONS) & set(RULES)))
def test_a_rule_takes_the_options_of_its_kind_with_the_same_defaults(kind: str) -> None:
    fields = {name: field.default for name, field in OPTIONS[kind].model_fields.items() if name != "kind"}
    assert {field.name: field.default for field in dataclasses.fields(RULES[kind])} == fields


@pytest.mark.parametrize("kind", sorted(set(OPTIONS) & set(RULES)))
def test_a_rule_is_built_from_the_parsed_options(kind: str) -> None:
    options = OPTIONS[kind](kind=kind).model_dump(exclude={"kind"})
    assert dataclasses.asdict(RULES[kind](**options)) == options


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_that_needs_no_confidence_decides_by_the_label_alone(kind: str) -> None:
    """And one that looks at a confidence says so: else it would be given a confidence of 1 that nobody has measured."""
    options = OPTIONS[kind](kind=kind)
    generator = torch.Generator().manual_seed(0)
    soft = torch.softmax(torch.randn(24, 3, generator=generator), dim=1)
    hard = torch.nn.functional.one_hot(soft.argmax(dim=1), 3).float()
    student = torch.softmax(torch.randn(24, 3, generator=generator), dim=1)
    logits = torch.randn(24, 3, generator=generator)

    def decided(teacher: torch.Tensor) -> tuple[list[bool], list[float], float]:
        rule = RULES[kind](**options.model_dump(exclude={"kind"}))
        subset = rule.prepare(teacher)
        offered, state = rule.offer(rule.initial(3), teacher, subset)
        signals = Signals(teacher, student, offered, subset, 3, torch.Generator().manual_seed(1))
        selection, _ = rule.select(state, signals)
        loss = rule.loss(logits[selection.mask], teacher[selection.mask], selection)
        return selection.mask.tolist(), selection.weights.tolist(), float(loss)

    assert (decided(soft) == decided(hard)) is not needs_confidence(options)

"""What a language model is asked: the wording is fixed by `template`, so its tests spell it out."""

from __future__ import annotations

import hashlib

import orjson
import pytest
from pydantic import ValidationError

from app import labels
from app.options import Example, Label, LLMTeacher
from workers.teachers.prompts import build_prompt
from workers.teachers.teacher import Row

LABELS = [Label(name="billing", description="invoices and payments"), Label(name="sports")]
EXAMPLES = [Example(text="Charged twice ", label="billing"), Example(text="A late goal", label="sports")]


def test_the_plain_prompt_by_hand() -> None:
    options = LLMTeacher(instruction="Choose.", verbalised={"sports": "games"})
    assert build_prompt(options, LABELS, EXAMPLES).text(Row(" We won\n")) == (
        "Choose.\n\nLabels:\n- billing: invoices and payments\n- games\n\n"
        "Text: Charged twice\nLabel: billing\n\nText: A late goal\nLabel: games\n\nText: We won\nLabel:"
    )


def test_the_chat_has_the_examples_as_turns_and_the_instruction_in_the_first() -> None:
    messages = build_prompt(LLMTeacher(instruction="Choose."), LABELS, EXAMPLES).messages(Row("We won"))
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"].startswith(
        "Choose.\n\nLabels:\n- billing: invoices and payments\n- sports\n\nText: Ch"
    )
    assert [message["content"] for message in messages[1:]] == [
        "billing", "Text: A late goal\nLabel:", "sports", "Text: We won\nLabel:",
    ]  # fmt: skip


def test_with_numbers_the_list_is_numbered_and_the_answer_is_the_number() -> None:
    options = LLMTeacher(answers="numbers", verbalised={"sports": "games"})
    prompt = build_prompt(options, LABELS, EXAMPLES)
    assert prompt.text(Row("We won")) == (
        "Decide which of the labels fits best. Answer with its number alone.\n\n"
        "Labels:\n1. billing: invoices and payments\n2. games\n\n"
        "Text: Charged twice\nLabel: 1\n\nText: A late goal\nLabel: 2\n\nText: We won\nLabel:"
    )
    assert prompt.answers == ("1", "2")


def test_an_option_that_came_later_does_not_lose_the_labels_that_were_paid_before_it() -> None:
    before = LLMTeacher().model_dump(mode="json", exclude={"answers", "score_held_out", "calibrate"})
    parts = [before, "revision", [label.model_dump(mode="json") for label in LABELS]]
    expected = hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()
    assert labels.fingerprint(LLMTeacher(), LABELS, "revision") == expected
    assert labels.fingerprint(LLMTeacher(answers="numbers"), LABELS, "revision") != expected


def test_a_pair_is_asked_about_as_a_pair() -> None:
    prompt = build_prompt(LLMTeacher(), LABELS, [Example(text="a", text_pair="b", label="sports")])
    assert prompt.text(Row("c", "")).endswith(
        "First text: a\nSecond text: b\nLabel: sports\n\nFirst text: c\nSecond text: \nLabel:"
    )


@pytest.mark.parametrize("row", [Row("We won"), Row("", ""), Row("several\n\nlines", "Label: sports")])
def test_what_stands_before_the_row_is_the_same_for_every_row(row: Row) -> None:
    prompt = build_prompt(LLMTeacher(), LABELS, EXAMPLES)
    assert prompt.text(row).startswith(prompt.prefix)
    assert prompt.messages(row)[:-1] == prompt.messages(Row("another"))[:-1]


def test_answers_stand_in_the_order_of_the_labels() -> None:
    options = LLMTeacher(verbalised={"billing": "money matters"})
    assert build_prompt(options, LABELS, []).answers == ("money matters", "sports")


@pytest.mark.parametrize("verbalised", [{"a": "same", "b": "same"}, {"a": " "}, {"a": "space "}])
def test_labels_that_cannot_be_told_apart_are_refused(verbalised: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="written as"):
        LLMTeacher(verbalised=verbalised)

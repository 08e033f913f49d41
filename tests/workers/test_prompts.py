"""What a language model is asked: the wording is fixed by `template`, so its tests spell it out."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

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

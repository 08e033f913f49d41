"""Which examples are shown, and that every worker would show the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from app.options import Example, FewShot, Label, LLMTeacher
from workers.teachers import few_shot
from workers.teachers.few_shot import Prompts

LABELS = [Label(name="food"), Label(name="money")]
CANDIDATES = [
    Example(text=text, label=label)
    for label, text in [
        ("food", "Stir the soup"), ("food", "Bake the bread"), ("food", "Salt the stew"),
        ("money", "The bank charged a fee"), ("money", "Interest rates rose"), ("money", "Shares fell"),
    ]
]  # fmt: skip


def prompts(how: str, **options: int) -> Prompts:
    return Prompts(LLMTeacher(examples=CANDIDATES, few_shot=FewShot(how=how, **options)), LABELS)


def shown(prompt: few_shot.Prompt) -> list[str]:
    """The labels of a prompt's examples."""
    return [answer for _, answer in prompt.examples]


def test_without_a_choice_all_examples_are_shown_in_order() -> None:
    (prompt,) = Prompts(LLMTeacher(examples=CANDIDATES), LABELS).prompts
    assert shown(prompt) == ["food"] * 3 + ["money"] * 3


def test_balanced_examples_take_turns() -> None:
    assert few_shot.balanced(CANDIDATES, 3) == [CANDIDATES[0], CANDIDATES[3], CANDIDATES[1]]
    assert len(few_shot.balanced(CANDIDATES, 100)) == 6


def test_diverse_examples_by_hand() -> None:
    angles = np.radians([0, 5, 10, 90, 45])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    # The mean points to about 29 degrees, so 45 is taken first, and then both ends, which are 45 degrees away.
    assert few_shot.diverse(vectors, 3)[0] == 4
    assert set(few_shot.diverse(vectors, 3)[1:]) == {0, 3}
    assert sorted(few_shot.diverse(vectors, 9)) == [0, 1, 2, 3, 4]


def test_equal_candidates_are_diverse_too() -> None:
    assert sorted(few_shot.diverse(np.ones((3, 1), np.float32), 3)) == [0, 1, 2]


def test_the_nearest_example_stands_last() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.8, 0.6]], np.float32)
    assert few_shot.nearest(vectors, np.array([1, 0], np.float32), 2) == [2, 0]


def test_similar_examples_are_about_what_the_row_is_about() -> None:
    chosen = prompts("similar", clusters=2, count=2)
    assert sorted(shown(prompt) for prompt in chosen.prompts) == [["food", "food"], ["money", "money"]]
    assert shown(chosen.of("Fry the onions in butter", None)) == ["food", "food"]
    assert shown(chosen.of("He took out a loan", "at the bank")) == ["money", "money"]


def test_a_rows_prompt_does_not_depend_on_its_neighbours() -> None:
    chosen = prompts("similar", clusters=3, count=2)
    texts = [("Fry the onions", None), ("He took out a loan", "at the bank"), ("", None), ("Shares", None)]
    assert chosen.assign(texts) == [chosen.assign([text])[0] for text in texts]


@pytest.mark.parametrize("how", ["balanced", "diverse", "similar"])
def test_two_workers_make_the_same_prompts(how: str) -> None:
    assert prompts(how, count=3).prompts == prompts(how, count=3).prompts


def test_a_choice_needs_candidates() -> None:
    with pytest.raises(ValidationError, match="needs candidates"):
        LLMTeacher(few_shot=FewShot())

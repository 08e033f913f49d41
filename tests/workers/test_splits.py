"""The sets of a job are disjoint, near-duplicates included, and the seed decides."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from tests.support import sentences
from workers.training.near_duplicates import GRAM, SIMILARITY, groups_of
from workers.training.splits import Splits, choose, exact_groups, near_groups


def grams(text: str) -> set[str]:
    return {text[start : start + GRAM] for start in range(max(1, len(text) - GRAM + 1))}


def alike(one: str, other: str) -> bool:
    """The slow way: every pair is compared."""
    return len(grams(one) & grams(other)) >= SIMILARITY * len(grams(one) | grams(other))


def test_texts_that_differ_by_case_and_punctuation_or_a_typo_are_one_group() -> None:
    long = "the referee gave the striker a second penalty before the match had ended"
    texts = [long, "Rain, later on.", long.replace("striker", "stroker"), "rain later on", "another matter", "!!", "??"]
    assert groups_of(texts).tolist() == [0, 1, 0, 1, 4, 5, 6]


def test_the_groups_are_those_of_comparing_every_pair() -> None:
    luck = random.Random(3)
    texts = [row["text"] for row in sentences(60, 4)]
    for text in list(texts):
        letters = list(text)
        for _ in range(luck.randrange(4)):
            letters[luck.randrange(len(letters))] = luck.choice("abcdefgh")
        texts.append("".join(letters))
    parent = list(range(len(texts)))
    for one, other in itertools.combinations(range(len(texts)), 2):
        if alike(texts[one], texts[other]):
            low, high = sorted((parent[one], parent[other]))
            parent = [low if group == high else group for group in parent]
    assert groups_of(texts).tolist() == parent
    assert len(set(parent)) < 100, "some texts are alike, or the test says nothing"


def split(feedback_from: str, validation: bool, seed: int = 0) -> tuple[Splits, dict[str, list[str]]]:
    """A train set in which every third row has a near-duplicate elsewhere."""
    train = [row["text"] for row in sentences(60, 1)]
    held = [row["text"] for row in sentences(30, 2)]
    train += [f"{text}." for text in train[:15]] + [text.upper() for text in held[:6]]
    texts = {"train": train} | ({"validation": [*held[:20], held[20] + "!"], "test": held[20:]} if validation else {})
    groups = near_groups(texts, lambda done: None)
    rows = np.arange(len(texts["validation"])) if validation else None
    chosen = choose(
        groups, np.arange(len(train)), rows, seed=seed, validation_share=0.2, feedback_share=0.25,
        feedback_from=feedback_from,
    )  # fmt: skip
    return chosen, texts


@pytest.mark.parametrize(("feedback_from", "validation"), [("train", True), ("validation", True), ("train", False)])
def test_no_text_is_in_two_sets_and_none_is_like_one_of_another(feedback_from: str, validation: bool) -> None:
    chosen, texts = split(feedback_from, validation)
    where = "validation" if validation else "train"
    sets = {
        "train": [texts["train"][row] for row in chosen.train if not chosen.barred[row]],
        "validation": [texts[where][row] for row in chosen.validation],
        "feedback": [texts[feedback_from][row] for row in chosen.feedback],
        "test": texts.get("test", []),
    }
    assert all(sets[name] for name in ("train", "validation", "feedback"))
    for one, other in itertools.combinations(sets.values(), 2):
        assert not [(a, b) for a in one for b in other if alike(a.casefold().strip("!."), b.casefold().strip("!."))]
    if validation:
        assert len(chosen.validation) + (len(chosen.feedback) if feedback_from == "validation" else 0) == 20
    counted = len(chosen.train) + (0 if validation else len(chosen.validation))
    assert counted + (len(chosen.feedback) if feedback_from == "train" else 0) == len(texts["train"])


def test_the_seed_decides_who_gives_feedback() -> None:
    assert split("train", True)[0].feedback.tolist() == split("train", True)[0].feedback.tolist()
    assert split("train", True)[0].feedback.tolist() != split("train", True, seed=1)[0].feedback.tolist()


def test_a_method_without_feedback_has_none() -> None:
    groups = exact_groups({"train": ["a", "b", "a", "c"], "test": ["c"]})
    chosen = choose(groups, np.arange(4), None, seed=0, validation_share=0.25)
    assert chosen.feedback.tolist() == []
    assert chosen.barred.tolist() == [False, False, False, True]
    assert sorted([*chosen.train, *chosen.validation]) == [0, 1, 2, 3]

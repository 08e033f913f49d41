"""Tokens: what is kept is what the tokenizer says, and batches give it back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from app.pretrained import resolve
from workers.training.data import Tokens, length_sorted_batches, tokenise

TEXTS = ["one two three", "", "a longer text of more words than the others have", "é 漢字 🙂 [PAD] end"]
PAIRS = ["four", "x y z", "and a second text that is longer than the limit allows", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    source = resolve("all-MiniLM-L6-v2", purpose="student", roots=[], allow_hub=False)
    tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    tokenizer.model_max_length = 12
    return tokenizer


def test_a_batch_by_hand() -> None:
    tokens = Tokens(np.array([5, 6, 7, 8], np.int32), np.array([0, 1, 4]), np.array([0, 0, 1, 1], np.int8), 9)
    batch = {name: tensor.tolist() for name, tensor in tokens.batch(np.array([1, 0])).items()}
    assert batch == {
        "input_ids": [[6, 7, 8], [5, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [0, 0, 0]],
    }


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_batches_equal_what_the_tokenizer_makes_of_the_texts(tokenizer: Any, pairs: list[str] | None) -> None:
    tokens = tokenise(tokenizer, TEXTS, pairs)
    rows = [2, 0, 3, 1, 0]
    second = None if pairs is None else [pairs[row] for row in rows]
    expected = tokenizer([TEXTS[row] for row in rows], second, truncation=True, padding=True, return_tensors="pt")
    batch = tokens.batch(np.array(rows))
    assert set(batch) == set(expected) - (set() if pairs else {"token_type_ids"})
    for name, tensor in batch.items():
        assert tensor.equal(expected[name]), name
    assert tokens.lengths.max() == 12


def test_chunks_leave_no_seam(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenise(tokenizer, TEXTS, PAIRS)
    monkeypatch.setattr("workers.training.data._TEXTS_PER_CALL", 3)
    done: list[int] = []
    chunked = tokenise(tokenizer, TEXTS, PAIRS, progress=done.append)
    assert done == [3, 4]
    for name in ("ids", "offsets", "segments"):
        assert np.array_equal(getattr(whole, name), getattr(chunked, name))


def test_no_rows_are_no_tokens(tokenizer: Any) -> None:
    tokens = tokenise(tokenizer, [], [])
    assert len(tokens) == 0
    assert tokens.batch(np.zeros(0)).keys() == {"input_ids", "attention_mask", "token_type_ids"}


def test_a_row_that_does_not_exist_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(IndexError):
        tokenise(tokenizer, TEXTS).batch(np.array([4]))


def test_batches_by_length_by_hand() -> None:
    lengths = np.array([2, 5, 3, 3, 9])
    batches = length_sorted_batches(lengths, np.array([0, 1, 2, 3, 4]), tokens_per_batch=8)
    assert [batch.tolist() for batch in batches] == [[4], [1], [2, 3], [0]]


def test_batches_by_length_hold_every_row_once_and_keep_to_the_budget() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, size=500)
    rows = generator.permutation(500)[:300]
    batches = length_sorted_batches(lengths, rows, tokens_per_batch=256)
    assert sorted(np.concatenate(batches)) == sorted(rows)
    assert all(len(batch) * lengths[batch].max() <= 256 for batch in batches)
    # Greedy: the next batch's longest row no longer fitted.
    assert all((len(batch) + 1) * lengths[batch].max() > 256 for batch in batches[:-1])

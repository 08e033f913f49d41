"""Texts that say almost the same, found in about linear time: they must never stand on both sides of a split."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

SIMILARITY = 0.8
"""Jaccard similarity of two texts' character 4-grams from which they count as one; a typo in 50 characters keeps 0.84."""
GRAM = 4
BANDS, ROWS = 16, 4
"""Texts that share a band are compared exactly: all but 0.02 % of the pairs at SIMILARITY, and some others in vain."""


def groups_of(texts: Sequence[str], *, progress: Callable[[int], None] = lambda done: None) -> NDArray[np.int64]:
    """(N,) the group of each text: the number of its first member. Alike texts, and what is alike to them, share one.

    Case, punctuation and white space make no difference. About 1 ms a distinct text; memory grows with the distinct
    texts. progress: called about every thousand texts; what it raises ends the work.
    """
    first: dict[str, int] = {}
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    parent = list(range(len(texts)))
    grams: dict[int, frozenset[str]] = {}

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for number, text in enumerate(texts):
        if number % 1000 == 0:
            progress(number)
        plain = " ".join(re.findall(r"\w+", text.casefold())) or text
        parent[number] = first.setdefault(plain, number)
        if parent[number] != number:
            continue
        grams[number] = frozenset(plain[start : start + GRAM] for start in range(max(1, len(plain) - GRAM + 1)))
        sketch = MinHash(num_perm=BANDS * ROWS, hashfunc=zlib.crc32)
        sketch.update_batch([gram.encode() for gram in sorted(grams[number])])
        for other in sorted(index.query(sketch)):
            mine, theirs = root(number), root(other)
            if mine != theirs and _alike(grams[number], grams[other]):
                parent[max(mine, theirs)] = min(mine, theirs)
        index.insert(number, sketch, check_duplication=False)
    return np.array([root(number) for number in range(len(texts))], np.int64)


def _alike(mine: frozenset[str], theirs: frozenset[str]) -> bool:
    common = len(mine & theirs)
    return common >= SIMILARITY * (len(mine) + len(theirs) - common)

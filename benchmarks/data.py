"""Where the benchmarks get their rows: the shared data sets, where they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

Rows = list[dict[str, str]]


def present(names: list[str]) -> list[str]:
    """Those of the data sets that are there; it is printed which are not."""
    for name in names:
        if not (SHARED / name).is_dir():
            print(f"skipped: the data set {name} is not at {SHARED}")
    return [name for name in names if (SHARED / name).is_dir()]


def read_split(name: str, split: str, limit: int | None = None) -> Rows:
    """The first rows of one split of a shared data set. Raises FileNotFoundError where it is not."""
    folder = SHARED / name
    plain, packed = folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"
    text = plain.read_text() if plain.exists() else gzip.decompress(packed.read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()[:limit]]


def few_shot(rows: Rows, per_class: int) -> tuple[Rows, Rows]:
    """The first `per_class` rows of each class as examples, and the other rows."""
    examples: Rows = []
    rest: Rows = []
    counts: dict[str, int] = {}
    for row in rows:
        if counts.get(row["label"], 0) < per_class:
            counts[row["label"]] = counts.get(row["label"], 0) + 1
            examples.append(row)
        else:
            rest.append(row)
    return examples, rest

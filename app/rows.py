"""What a row of a dataset is: which column plays which part, what each part may hold, and why a row is refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from app.errors import TooManyLabels, UnknownColumn, UnreadableFile

DEFAULT_COLUMNS = {
    "text": ("text", "sentence", "sentence1", "content"),
    "text_pair": ("text_pair", "sentence2"),
    "label": ("label",),
    "confidence": ("confidence",),
    "distribution": ("distribution",),
}
"""Where each part of a row is looked for, in this order, when the client names no column."""

SEPARATORS = {
    "\t": "tabs; send it as TSV (.tsv)",
    ";": "semicolons; separate them by commas",
    ",": "commas; send it as CSV (.csv)",
}
"""What a header holds that was not taken apart, and what to do about it."""

MAX_LABELS = 10_000
MAX_LABEL_CHARACTERS = 200
MAX_COLUMN_NAME_CHARACTERS = 200
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Limits:
    """How much a file may ask of the server."""

    max_decompressed_bytes: int = 20 * 1024**3
    max_line_bytes: int = 1024**2
    """Bytes of one line of JSONL, or of one record of CSV or TSV with all its lines."""
    max_rows: int = 20_000_000
    """Rows, blank lines among them."""
    max_columns: int = 1000
    max_text_characters: int = 200_000


@dataclass(frozen=True)
class Columns:
    """The columns a client names. None: look for the default names; "": the part is left out."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    confidence: str | None = None
    distribution: str | None = None


class Row(NamedTuple):
    """One row that passed every check."""

    text: str
    text_pair: str | None
    label: str | None
    confidence: float | None
    distribution: dict[str, float] | None


class BadRow(Exception):
    """One row cannot be used: the column at fault (None: the whole row), a code, and a sentence."""

    def __init__(self, column: str | None, code: str, message: str) -> None:
        super().__init__(message)
        self.column, self.code, self.message = column, code, message


class Roles:
    """Which column of the file plays which part; known at once from a header, or row by row in JSONL."""

    def __init__(self, columns: Columns) -> None:
        self.named: dict[str, str] = {role: name for role, name in vars(columns).items() if name}
        self.open = {role for role in DEFAULT_COLUMNS if getattr(columns, role) is None}
        self.seen: dict[str, None] = {}
        self.names: list[str | None] = [self.named.get(role) for role in DEFAULT_COLUMNS]
        twice = [name for name, times in Counter(self.named.values()).items() if times > 1]
        if twice:
            raise UnknownColumn(f"The column {quoted(twice[0])} is named for two parts of the row.")

    def see(self, columns: Iterable[str], limits: Limits) -> None:
        """Take note of columns of the file. Raises UnreadableFile when they are too many or not usable as names."""
        for column in columns:
            if len(column) > MAX_COLUMN_NAME_CHARACTERS:
                raise UnreadableFile(
                    f"A column name has {len(column):,} characters, more than {MAX_COLUMN_NAME_CHARACTERS}: "
                    f"{quoted(column)}."
                )
            if flaw := _flaw(column):
                raise UnreadableFile(f"The column name {quoted(column)} {flaw[1]}.")
            self.seen[column] = None
            if len(self.seen) > limits.max_columns:
                raise UnreadableFile(f"The file has more than {limits.max_columns:,} columns.")
        for position, role in enumerate(DEFAULT_COLUMNS):
            if role in self.open:
                found = [
                    name for name in DEFAULT_COLUMNS[role] if name in self.seen and name not in self.named.values()
                ]
                if found:
                    self.open.discard(role)
                    self.names[position] = found[0]

    def require(self) -> None:
        """Raises UnknownColumn when the text, or a column the client named, is not in the file."""
        if not self.seen:
            return
        has = f"The file has {', '.join(quoted(name) for name in list(self.seen)[:20])}{', …' * (len(self.seen) > 20)}."
        for role, name in self.named.items():
            if name not in self.seen:
                raise UnknownColumn(f"There is no column {quoted(name)} ({role}_column). {has}")
        if self.names[0] is None:
            expected = ", ".join(DEFAULT_COLUMNS["text"])
            if len(self.seen) == 1:
                [only] = self.seen
                has += next(
                    (f" It seems to be separated by {told}." for sign, told in SEPARATORS.items() if sign in only), ""
                )
            raise UnknownColumn(f"No column holds the text: looked for {expected}. Name it with text_column. {has}")


class Checker:
    """Turns the values of a row into a Row, or says why not; keeps count of the labels."""

    def __init__(self, roles: Roles, limits: Limits) -> None:
        self.roles, self.limits = roles, limits
        self.labels: dict[str, int] = {}

    def check(self, values: Sequence[Any] | BadRow) -> Row:
        """The row. Raises BadRow, or TooManyLabels."""
        if isinstance(values, BadRow):
            raise values
        text_column, pair_column, label_column, confidence_column, distribution_column = self.roles.names
        text, pair, label, confidence, distribution = values
        row = Row(
            self._text(text, text_column),
            None if pair is None or pair == "" else self._pair(pair, pair_column),
            None if label is None else self._label(label, label_column),
            None if confidence is None else _confidence(confidence, confidence_column),
            None if distribution is None else self._distribution(distribution, distribution_column),
        )
        if row.label is not None:
            self.labels[row.label] += 1
        return row

    def _text(self, value: Any, column: str | None) -> str:
        if value is None:
            raise BadRow(column, "missing_text", "the row has no text")
        if not isinstance(value, str):
            raise BadRow(column, "not_a_string", f"the text must be a string, not {json_type(value)}")
        if not value or value.isspace():
            raise BadRow(column, "empty_text", "the text is empty")
        if len(value) > self.limits.max_text_characters:
            most = self.limits.max_text_characters
            raise BadRow(column, "text_too_long", f"the text has {len(value):,} characters; at most {most:,} are taken")
        if flaw := _flaw(value):
            raise BadRow(column, flaw[0], f"the text {flaw[1]}")
        return value

    def _pair(self, value: Any, column: str | None) -> str | None:
        return None if isinstance(value, str) and value.isspace() else self._text(value, column)

    def _label(self, value: Any, column: str | None) -> str | None:
        """Labels are strings; numbers and booleans become the strings JSON writes, and 1.0 the label "1"."""
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, float):
            if math.isnan(value):
                return None
            value = str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
        elif isinstance(value, int):
            value = str(value)
        elif not isinstance(value, str):
            raise BadRow(
                column, "not_a_label", f"a label must be a string, a number or a boolean, not {json_type(value)}"
            )
        if value in self.labels:
            return value
        if not value or value.isspace():
            return None
        return self._new_label(value, column)

    def _new_label(self, value: str, column: str | None) -> str:
        if len(value) > MAX_LABEL_CHARACTERS:
            raise BadRow(
                column,
                "label_too_long",
                f"the label has {len(value):,} characters; at most {MAX_LABEL_CHARACTERS} are taken: {quoted(value)}",
            )
        if flaw := _flaw(value):
            raise BadRow(column, flaw[0], f"the label {flaw[1]}")
        if len(self.labels) >= MAX_LABELS:
            raise TooManyLabels(
                f"The column {quoted(column)} names more than {MAX_LABELS:,} different labels. "
                "Name another one with label_column, or send label_column= empty to take the rows without labels."
            )
        self.labels[value] = 0
        return value

    def _distribution(self, value: Any, column: str | None) -> dict[str, float] | None:
        """Probabilities by label, as an object or as JSON text; a sum within 1e-3 of 1 is scaled to 1."""
        if isinstance(value, str):
            if not value or value.isspace():
                return None
            try:
                value = orjson.loads(value)
            except ValueError as error:
                raise BadRow(column, "invalid_json", f"the distribution is not JSON: {error}") from None
        if value is None:
            return None
        if not isinstance(value, dict) or not value:
            raise BadRow(column, "not_a_distribution", "the distribution must be an object of label: probability")
        for label, probability in value.items():
            if isinstance(probability, bool) or not isinstance(probability, int | float):
                raise BadRow(column, "not_a_probability", f"the probability of {quoted(label)} is not a number")
            if not 0 <= probability <= 1 + SUM_TOLERANCE:
                message = f"the probability of {quoted(label)} is {probability:g}; it must lie between 0 and 1"
                raise BadRow(column, "not_a_probability", message)
        total = math.fsum(value.values())
        if abs(total - 1) > SUM_TOLERANCE:
            raise BadRow(column, "does_not_sum_to_one", f"the probabilities sum to {total:.6g}, not to 1")
        for label in value:
            if label not in self.labels:
                if not label or label.isspace():
                    raise BadRow(column, "not_a_distribution", "the distribution has an empty label")
                self._new_label(label, column)
        return {label: probability / total for label, probability in value.items()}


def _confidence(value: Any, column: str | None) -> float | None:
    if isinstance(value, str):
        if not value or value.isspace():
            return None
        try:
            value = float(value)
        except ValueError:
            raise BadRow(column, "not_a_confidence", f"the confidence is not a number: {quoted(value)}") from None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(column, "not_a_confidence", f"the confidence must be a number, not {json_type(value)}")
    elif math.isnan(value):
        return None
    if not 0 < value <= 1:
        raise BadRow(column, "not_a_confidence", f"the confidence is {value:g}; it must be above 0 and at most 1")
    return float(value)


def _flaw(value: str) -> tuple[str, str] | None:
    """What keeps a string from being stored: a code and the end of a sentence."""
    if "\x00" in value:
        return "nul_character", "contains a NUL character"
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # Bytes that are not UTF-8 come here as the lone surrogates of Python's `surrogateescape`.
        return "invalid_utf8", f"is not valid UTF-8 at character {error.start + 1}; save the file as UTF-8"
    return None


def json_type(value: Any) -> str:
    """What JSON calls a value of this type."""
    names = {dict: "an object", list: "an array", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def quoted(value: str | None) -> str:
    """A short, printable form of what a client sent."""
    text = value or ""
    return ascii(text[:60] + "…") if len(text) > 60 else repr(text) if not _flaw(text) else ascii(text)

"""A prompt as tokens: those that every row shares, those of the row, and those of each answer.

The tokens are those of the whole string, prompt, row and answer in one piece: nothing is tokenised apart where a merge
could reach across.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from app.lifecycle import WorkFailed
from workers.teachers.prompts import Prompt, question_about

TextAndPair = tuple[str, str | None]

QUESTION, ANSWER = "UNDERSTUDYQUESTION", "UNDERSTUDYANSWER"
PROBES: tuple[TextAndPair, ...] = (("A first text", None), ("7 €", None), ("", None), ("Another", "and its pair"))
MIN_ROOM = 8
"""Tokens that must be left for a text."""


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens."""

    rows: list[tuple[int, list[int]]]
    """For each row how many of the prefix's tokens it begins with, nearly always all, and its own tokens after those."""
    cut: int
    """How many rows' texts were longer than what is read of them."""


class PromptTokens:
    """What a tokenizer makes of one prompt, with the model's chat template where it has one and `chat` allows it."""

    prefix: list[int]
    """Shared by every row."""
    answers: list[list[int]]
    """What follows a row for each label; where a merge reaches across, it begins with the prompt's last characters."""
    end: int
    """The token after an answer: the end of the model's turn, or of the line."""

    def __init__(self, tokenizer: Any, prompt: Prompt, *, chat: bool, max_length: int, context: int | None) -> None:
        """`max_length`: tokens read of a text, both of a pair together; `context`: tokens that the model can read.

        Raises WorkFailed: prompt_too_long, labels_read_alike.
        """
        self._tokenizer = tokenizer
        self.is_chat = chat and tokenizer.chat_template is not None
        before, self._after, gap, closing = self._chat_parts(prompt) if self.is_chat else (prompt.prefix, "", " ", "\n")
        self._specials = [token for token in _special_tokens(tokenizer) if len(token) > 1]
        self._lead = [] if self.is_chat else _leading_tokens(tokenizer)
        self._head: list[int] = []
        self._tail_text = before
        self._head, self._tail_text = self._split(before)
        self.prefix = self._read_answers(prompt.answers, gap, closing)
        room = max_length if context is None else min(max_length, context - self._tokens_around_a_text())
        if room < MIN_ROOM:
            raise WorkFailed(
                "prompt_too_long",
                f"The prompt takes {self._tokens_around_a_text()} tokens and the model reads {context}, which leaves no room "
                "for a text; give fewer or shorter examples, or a model with a longer context.",
            )
        self._room = room

    def encode(self, texts: Sequence[TextAndPair]) -> Encoded:
        """The tokens of rows."""
        shortened = [self._shortened(text) for text in texts]
        questions = [self._question(text) for text in shortened]
        rows = [self._row(ids) for ids in self._tokens(questions)] if questions else []
        return Encoded(rows, sum(short is not text for short, text in zip(shortened, texts, strict=True)))

    # --- making -----------------------------------------------------------------------------------------------------

    def _chat_parts(self, prompt: Prompt) -> tuple[str, str, str, str]:
        """Text before and after the question, between the prompt and the answer, and after the answer."""
        messages = prompt.messages_asking(QUESTION)
        asked = self._render(messages, add_generation_prompt=True)
        answered = self._render([*messages, {"role": "assistant", "content": ANSWER}], add_generation_prompt=False)
        before, _, after = asked.rpartition(QUESTION)
        start, _, closing = answered.rpartition(ANSWER)
        gap = start[len(asked) :] if start.startswith(asked) else ""
        return before, after, gap, closing or self._tokenizer.eos_token or "\n"

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )

    def _split(self, before: str) -> tuple[list[int], str]:
        """The tokens of what stands before the question but for its last lines, and those lines.

        Only the last lines are tokenised anew with each row, if the tokenizer, tried on the probes, allows to cut there.
        """
        whole = self._tokens([self._question(probe) for probe in PROBES])
        lines = [position + 1 for position, character in enumerate(before[:-2]) if character == "\n"]
        for cut in reversed(lines[-4:]):
            head = self._lead + self._ids([before[:cut]])[0]
            tails = self._ids([before[cut:] + self._question(probe) + self._after for probe in PROBES])
            if all(head + tail == ids for tail, ids in zip(tails, whole, strict=True)):
                return head, before[cut:]
        return [], before

    def _read_answers(self, answers: Sequence[str], gap: str, closing: str) -> list[int]:
        """Sets `answers` and `end`; the prefix that is left."""
        self._dropped = 0
        self._prefix_length = 0
        probes = [self._question(probe) for probe in PROBES]
        plain = self._tokens(probes)
        answered = [self._tokens([probes[0] + self._after + gap + answer], after="")[0] for answer in answers]
        kept = min(_common(plain[0], ids) for ids in answered)
        self._dropped = len(plain[0]) - kept
        self.answers = [ids[kept:] for ids in answered]
        closed = self._tokens([probes[0] + self._after + gap + answers[0] + closing], after="")[0]
        self.end = closed[_common(closed, answered[0])]
        seen: dict[tuple[int, ...], str] = {}
        for answer, ids in zip(answers, self.answers, strict=True):
            if tuple(ids) in seen:
                raise WorkFailed(
                    "labels_read_alike",
                    f"The model's tokenizer reads {answer!r} and {seen[tuple(ids)]!r} as the same tokens; "
                    "write one of them in other words with teacher.verbalised.",
                )
            seen[tuple(ids)] = answer
        prefix = plain[0]
        for ids in plain[1:]:
            prefix = prefix[: _common(prefix, ids)]
        return prefix

    def _tokens_around_a_text(self) -> int:
        longest = max(len(answer) for answer in self.answers) + 1
        return len(self._tokens([self._question(("", ""))])[0]) + longest + MIN_ROOM

    # --- rows -------------------------------------------------------------------------------------------------------

    def _row(self, ids: list[int]) -> tuple[int, list[int]]:
        if self._dropped:
            ids = ids[: -self._dropped]
        shared = _common(self.prefix, ids)
        return shared, ids[shared:]

    def _question(self, text: TextAndPair) -> str:
        """The question, in which what looks like one of the model's control tokens is no longer one."""
        question = question_about(*text)
        for token in self._specials:
            if token in question:
                question = question.replace(token, f"{token[0]} {token[1:]}")
        return question

    def _shortened(self, text: TextAndPair) -> TextAndPair:
        """The text as it is if it fits, else its beginning; of a pair, the longer text gives way first."""
        first, second = text
        # A token takes a byte at least.
        if len(first.encode()) + len((second or "").encode()) <= self._room:
            return text
        encoded = self._tokenizer([first, second or ""], add_special_tokens=False, return_offsets_mapping=True)
        ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
        lengths = [len(each) for each in ends]
        if sum(lengths) <= self._room:
            return text
        room = max(self._room // 2, self._room - lengths[1])
        rooms = (room, self._room - min(lengths[0], room))
        kept = [
            content if room >= len(end) else content[: end[room - 1]]
            for content, end, room in zip((first, second or ""), ends, rooms, strict=True)
        ]
        return kept[0], None if second is None else kept[1]

    def _tokens(self, questions: Sequence[str], after: str | None = None) -> list[list[int]]:
        """Tokens of the whole prompts with these questions."""
        after = self._after if after is None else after
        head = self._head or self._lead
        return [head + ids for ids in self._ids([self._tail_text + question + after for question in questions])]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    if list(first) == list(second[: len(first)]):
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _special_tokens(tokenizer: Any) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)


def _leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: the beginning-of-sequence token, or nothing."""
    bare, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return dressed[:1] if dressed[:1] == [tokenizer.bos_token_id] != bare[:1] else []

"""What a language model reads: instruction, labels, examples and the row, as chat messages or as plain text.

Everything before the row is the same for every row, so a teacher may read it once. A new wording here needs a new
`template` in app/options.py: it keys the label cache.

    Decide which of the labels fits best. Answer with the label alone.

    Labels:
    - billing: questions about invoices and payments
    - sports

    Text: My card was charged twice
    Label: billing

    Text: <the row>
    Label:

With `answers: "numbers"` the list has `1. billing: …`, and the answer is ` 1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.options import Example, Label, LLMTeacher
from workers.teachers.teacher import Row

INSTRUCTIONS = {
    "labels": "Decide which of the labels fits best. Answer with the label alone.",
    "numbers": "Decide which of the labels fits best. Answer with its number alone.",
}
"""By the option `answers`."""


@dataclass(frozen=True)
class Prompt:
    """One prompt for many rows; only the last question differs from row to row."""

    instruction: str
    """The instruction and the list of labels."""
    examples: tuple[tuple[str, str], ...]
    """Question and answer of each example."""
    answers: tuple[str, ...]
    """What the model is expected to say for each label, in the order of the labels."""

    @property
    def prefix(self) -> str:
        """The plain text before every row's question."""
        shown = [f"{question} {answer}" for question, answer in self.examples]
        return "\n\n".join([self.instruction, *shown, ""])

    def text(self, row: Row) -> str:
        """The plain text for a row; the model's answer follows it after one space."""
        return self.prefix + question_about(row.text, row.text_pair)

    def messages(self, row: Row) -> list[dict[str, str]]:
        """The chat for a row: user and assistant in turn, as some chat templates know no other role."""
        return self.messages_asking(question_about(row.text, row.text_pair))

    def messages_asking(self, question: str) -> list[dict[str, str]]:
        """As `messages`, for a question that is written already."""
        questions = [*(asked for asked, _ in self.examples), question]
        questions[0] = f"{self.instruction}\n\n{questions[0]}"
        return [*_turns(questions, [answer for _, answer in self.examples])]


def build_prompt(options: LLMTeacher, labels: Sequence[Label], examples: Sequence[Example]) -> Prompt:
    """The prompt that shows these examples, whose labels are among `labels`."""
    numbered = options.answers == "numbers"
    said = {
        label.name: str(place) if numbered else options.written(label.name) for place, label in enumerate(labels, 1)
    }
    lines = [
        (f"{said[label.name]}. " if numbered else "- ")
        + options.written(label.name)
        + (f": {label.description}" if label.description else "")
        for label in labels
    ]
    shown = [(question_about(example.text, example.text_pair), said[example.label]) for example in examples]
    instruction = options.instruction or INSTRUCTIONS[options.answers]
    return Prompt("\n".join([instruction, "", "Labels:", *lines]), tuple(shown), tuple(said.values()))


def question_about(text: str, text_pair: str | None) -> str:
    """What is asked about one row, up to where the label stands."""
    if text_pair is None:
        return f"Text: {text.strip()}\nLabel:"
    return f"First text: {text.strip()}\nSecond text: {text_pair.strip()}\nLabel:"


def _turns(questions: Sequence[str], answers: Sequence[str]) -> Iterator[dict[str, str]]:
    for number, question in enumerate(questions):
        yield {"role": "user", "content": question}
        if number < len(answers):
            yield {"role": "assistant", "content": answers[number]}

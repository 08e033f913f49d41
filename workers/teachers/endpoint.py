"""The teacher behind an OpenAI-compatible server: what it says about each row, by the best way that the server offers.

prompt_logprobs     `/completions` with `echo`: each label stands behind the prompt in turn, and the server tells how
                    probable its tokens were; softmax over the labels of the mean log-probability of a token
top_logprobs        `/chat/completions` with `top_logprobs`: see `read_alternatives`
sampled_frequency   `/chat/completions` at temperature 1, several times: the shares of the answers
none                `/chat/completions` at temperature 0: a label, and no confidence
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app import endpoints
from app import options as spec
from app.config import Endpoint, settings
from app.db import session_scope
from app.endpoints import Ability
from app.lifecycle import WorkFailed
from app.options import Label
from app.pretrained import Source
from workers.teachers.endpoint_client import ATTEMPTS, EndpointClient, RowRefused
from workers.teachers.few_shot import Prompts
from workers.teachers.teacher import AskedToStop, Labeled, Row, never

LABELS_PER_REQUEST = 32
"""Prompts in one request to `/completions`."""
TOP_LOGPROBS = (20, 5)
"""Alternatives to ask for: the most that OpenAI lists, and the most that some others do."""
LONGEST_ANSWER_TOKENS = 256
CHECK_SECONDS = 0.2
"""How often a teacher that is waiting for answers looks whether it should stop."""
STOP_SECONDS = 5.0
"""How long rows that were begun may still get their answer when it should stop: what is on its way is paid for."""
NOT_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Usage:
    """Tokens as the server counts them; 0 where it does not."""

    input: int = 0
    output: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.input + other.input, self.output + other.output)


@dataclass(frozen=True)
class Answer:
    """What the server said about one row, and what that took."""

    usage: Usage
    probabilities: NDArray[np.float64] | None = None
    """(C,), sums to 1; None when the answer names no label."""
    error: str = ""


class EndpointTeacher:
    """Asks about many rows at a time; an answer depends on its own row alone, as far as the server keeps to that."""

    cacheable = True

    def __init__(self, options: spec.EndpointTeacher, labels: list[Label], source: Source | None = None) -> None:
        self.should_stop: Callable[[], bool] = never
        self.on_answers: Callable[[dict[int, Answer]], None] = lambda answers: None
        """Told of each answer as it comes, in a thread, by its row's place; several at once if they came during the last call.

        No row begins in the place of one whose answer it has not taken: see `_rows_at_once`.
        """
        endpoint = settings().endpoints.get(options.endpoint)
        if endpoint is None:
            raise WorkFailed(
                "endpoint_refuses",
                f"This worker's settings have no endpoint {options.endpoint!r}; the operator has to configure server and workers alike.",
            )
        self._options, self._endpoint = options, endpoint
        self._prompts = Prompts(options, labels)
        self._prompt = self._prompts.prompts[0]
        self._client = EndpointClient(options.endpoint, endpoint)
        self._loop = asyncio.Runner()
        with session_scope() as session:
            self._ability = endpoints.known(session, options.endpoint, endpoint)
        self._label_tokens: list[int] = []
        """`prompt_logprobs`: how many tokens each label has."""

    @property
    def confidence_method(self) -> str:
        """How the probabilities came about; "none" if there is only a label."""
        return endpoints.reading(self._options, self._endpoint, self._ability) or "none"

    @property
    def revision(self) -> str:
        """What answers depend on besides the spec.

        Asks the server what it can do, once. Raises WorkFailed, TeacherAway or AskedToStop.
        """
        return endpoints.revision(
            self._endpoint, endpoints.reading(self._options, self._endpoint, self._find_ability())
        )

    def label(self, rows: list[Row]) -> Labeled:
        """Probabilities (N, C) for N rows, 1 at the label where the server gives none; see Labeled for what goes wrong.

        Raises WorkFailed, TeacherAway or AskedToStop while it does not know yet what the server can do.
        """
        ability = self._find_ability()
        answers: dict[int, Answer] = {}
        untold: dict[int, Answer] = {}
        telling = asyncio.Lock()

        async def ask(number: int, row: Row) -> None:
            answers[number] = untold[number] = await self._ask(row, ability)
            async with telling:
                if number in untold:  # else it was told together with the one before it
                    some = dict(untold)
                    untold.clear()
                    await asyncio.to_thread(self.on_answers, some)

        works = [partial(ask, number, row) for number, row in enumerate(rows)]
        tasks, ended = self._loop.run(self._together(works, at_once=self._rows_at_once, to_the_end=STOP_SECONDS))
        probabilities = np.full((len(rows), len(self._prompt.answers)), np.nan, np.float32)
        tokens = np.zeros(len(rows), np.int32)
        errors: dict[int, str] = {}
        unasked: set[int] = set()
        total = Usage()
        for number, task in enumerate(tasks):
            error = None if task.cancelled() else task.exception()
            if (answer := answers.get(number)) is not None:
                total += answer.usage
                tokens[number] = answer.usage.input + answer.usage.output
                if answer.probabilities is None:
                    errors[number] = answer.error
                else:
                    probabilities[number] = answer.probabilities
            elif isinstance(error, RowRefused):
                errors[number] = str(error)
            else:
                unasked.add(number)
        cost = self._endpoint.cost(total.input, total.output)
        return Labeled(probabilities, tokens, errors, cost, frozenset(unasked), ended)

    def report(self) -> dict[str, Any]:
        """What the job records: which endpoint and model, how its answers are read, and what a row takes."""
        mode, labels = self.confidence_method, len(self._prompt.answers)
        requests = {
            "prompt_logprobs": math.ceil(labels / LABELS_PER_REQUEST),
            "sampled_frequency": self._options.samples,
        }
        told: dict[str, Any] = {
            "mode": mode, "endpoint": self._options.endpoint, "model": self._endpoint.model,
            "revision": self._endpoint.revision, "samples": self._options.samples,
            "requests_per_row": requests.get(mode, 1), "prompts_per_row": labels if mode == "prompt_logprobs" else requests.get(mode, 1),
        }  # fmt: skip
        alternatives = self._ability.top_logprobs if self._ability is not None else 0
        if mode == "top_logprobs" and alternatives < labels:
            told["note"] = (
                f"The server lists {alternatives} alternatives for a token and there are {labels} labels: what an answer "
                "does not list is known to be improbable and no more. The confidence of a sure answer is good, that of an "
                "unsure one is rough."
            )
        return told

    def _find_ability(self) -> Ability:
        if self._ability is None:
            tasks, ended = self._loop.run(self._together([partial(find_ability, self._client, self._endpoint)]))
            if ended is not None:
                raise ended
            with session_scope() as session:
                self._ability = endpoints.learn(session, self._options.endpoint, self._endpoint, tasks[0].result())
        if self._client.canary is None:
            self._client.canary = canary(self._endpoint, self._ability)
        if self.confidence_method == "prompt_logprobs" and not self._label_tokens:
            tasks, ended = self._loop.run(self._together([partial(self._count_label_tokens, self._ability)]))
            if ended is not None:
                raise ended
            self._label_tokens = tasks[0].result()
        return self._ability

    @property
    def _rows_at_once(self) -> int:
        """Twice as many as keep every connection busy: a row that waits to be asked again, or whose answer is being told,
        leaves its connection to another. A process that is killed loses no more answers than this."""
        requests = self._options.samples if self.confidence_method == "sampled_frequency" else 1
        return max(1, 2 * self._endpoint.concurrency // requests)

    async def _together(
        self, works: Sequence[Callable[[], Coroutine[Any, Any, Any]]], *, at_once: int = 1, to_the_end: float = 0.0
    ) -> tuple[list[asyncio.Task[Any]], Exception | None]:
        """Do all, so many at once, until one ends with more than RowRefused or the teacher should stop; cancel the rest.

        When it should stop, those that have begun may go on for `to_the_end` seconds.
        """
        places = asyncio.Semaphore(at_once)
        begun: set[asyncio.Task[Any] | None] = set()

        async def do(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
            async with places:
                begun.add(asyncio.current_task())
                return await work()

        tasks = [asyncio.ensure_future(do(work)) for work in works]
        pending: set[asyncio.Task[Any]] = set(tasks)
        ended: BaseException | None = None
        while pending and ended is None:
            done, pending = await asyncio.wait(pending, timeout=CHECK_SECONDS)
            errors = (task.exception() for task in done)
            ended = next((error for error in errors if error is not None and not isinstance(error, RowRefused)), None)
            if ended is None and pending and self.should_stop():
                ended = AskedToStop()
                for task in pending - begun:
                    task.cancel()
                _, pending = await asyncio.wait(pending, timeout=to_the_end)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)
        if ended is not None and not isinstance(ended, Exception):
            raise ended
        return tasks, ended

    # --- one row ----------------------------------------------------------------------------------------------------

    async def _ask(self, row: Row, ability: Ability) -> Answer:
        method = self.confidence_method
        if method == "prompt_logprobs":
            return await self._score_labels(row, ability)
        if method == "top_logprobs":
            return await self._ask_for_alternatives(row, ability)
        if method == "sampled_frequency":
            return await self._ask_often(row, ability)
        return self._read_label(*await self._chat(row, ability))

    async def _score_labels(self, row: Row, ability: Ability) -> Answer:
        """softmax over the labels of the mean log-probability of a label's tokens behind the prompt."""
        prompt = self._prompts.of(row.text, row.text_pair).text(row)
        texts = [f"{prompt} {answer}" for answer in self._prompt.answers]
        scored, usage = await self._echo(texts, ability)
        means = np.array([np.mean(values[-count:]) for values, count in zip(scored, self._label_tokens, strict=True)])
        return Answer(usage, softmax(means))

    async def _count_label_tokens(self, ability: Ability) -> list[int]:
        """How many tokens each label adds to a prompt. A prompt ends the same way for every row, so once will do."""
        prompt = self._prompt.text(Row("text"))
        texts = [prompt, *(f"{prompt} {answer}" for answer in self._prompt.answers)]
        try:
            (bare, *labeled), _ = await self._echo(texts, ability)
        except RowRefused as refusal:
            raise WorkFailed("endpoint_refuses", f"Endpoint {self._options.endpoint!r}: {refusal}") from None
        return [max(1, len(values) - len(bare)) for values in labeled]

    async def _echo(self, texts: list[str], ability: Ability) -> tuple[list[list[float]], Usage]:
        """The log-probabilities of each text's tokens, without the first, which has none."""
        scored: list[list[float]] = []
        usage = Usage()
        for start in range(0, len(texts), LABELS_PER_REQUEST):
            some = texts[start : start + LABELS_PER_REQUEST]
            answer = await self._client.post("/completions", echo_body(self._endpoint, some, ability.least_tokens))
            usage += usage_of(answer)
            found = echoed(answer, some, ability.least_tokens)
            if found is None:
                raise RowRefused("the server did not give the log-probabilities of the prompt")
            scored += found
        return scored, usage

    async def _ask_for_alternatives(self, row: Row, ability: Ability) -> Answer:
        content, usage, choice = await self._chat(row, ability, logprobs=True, top_logprobs=ability.top_logprobs)
        try:
            probabilities = read_alternatives(choice["logprobs"]["content"], content, self._prompt.answers)
        except (KeyError, TypeError, ValueError):
            return Answer(usage, error="the server gave no log-probabilities with its answer")
        return Answer(usage, probabilities, _no_label(content))

    async def _ask_often(self, row: Row, ability: Ability) -> Answer:
        """The shares of the labels among the answers that name one."""
        asked = [self._chat(row, ability, temperature=1.0) for _ in range(self._options.samples)]
        tasks = [asyncio.ensure_future(work) for work in asked]
        try:
            answers = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        usage = sum((usage for _, usage, _ in answers), Usage())
        named = [match_label(content, self._prompt.answers) for content, _, _ in answers]
        counts = Counter(index for index in named if index is not None)
        if not counts:
            return Answer(usage, error=_no_label(answers[0][0]))
        shares = np.array([counts[index] for index in range(len(self._prompt.answers))], np.float64)
        return Answer(usage, shares / shares.sum())

    def _read_label(self, content: str, usage: Usage, _: dict[str, Any]) -> Answer:
        index = match_label(content, self._prompt.answers)
        if index is None:
            return Answer(usage, error=_no_label(content))
        return Answer(usage, np.eye(len(self._prompt.answers))[index])

    async def _chat(self, row: Row, ability: Ability, **more: Any) -> tuple[str, Usage, dict[str, Any]]:
        """The text of the model's answer, its price, and the whole choice."""
        longest = max(len(answer.encode()) for answer in self._prompt.answers) + 2
        body = chat_body(
            self._endpoint,
            self._prompts.of(row.text, row.text_pair).messages(row),
            ability,
            min(longest, LONGEST_ANSWER_TOKENS),
        )
        answer = await self._client.post("/chat/completions", body | more)
        choice = first_choice(answer)
        return str(choice.get("message", {}).get("content") or ""), usage_of(answer), choice


# --- what the server can do -----------------------------------------------------------------------------------------


async def find_ability(client: EndpointClient, endpoint: Endpoint) -> Ability:
    """Ask the server small questions until it is clear how its answers can be read. Raises WorkFailed or TeacherAway."""
    if endpoint.mode in ("auto", "prompt_logprobs"):
        texts = ["One two three four five six.", "Seven eight nine ten eleven."]
        for least in (0, 1):
            answer = await _attempt(client, "/completions", echo_body(endpoint, texts, least))
            if answer is not None and echoed(answer, texts, least) is not None:
                return Ability(mode="prompt_logprobs", least_tokens=least)
        if endpoint.mode == "prompt_logprobs":
            raise _unable(
                client, "does not give the log-probabilities of a prompt (`echo` with `logprobs` at /completions)"
            )
    for field in ("max_tokens", "max_completion_tokens"):
        plain = Ability(mode="label_only", length_field=field)
        if await _attempt(client, *canary(endpoint, plain), last=field == "max_completion_tokens") is not None:
            break
    else:
        raise _unable(client, "does not answer a chat (/chat/completions)")
    if endpoint.mode in ("auto", "chat_logprobs"):
        for count in TOP_LOGPROBS:
            path, body = canary(endpoint, plain)
            answer = await _attempt(client, path, body | {"logprobs": True, "top_logprobs": count})
            if answer is not None and lists_alternatives(first_choice(answer)):
                return plain.model_copy(update={"mode": "chat_logprobs", "top_logprobs": count})
        if endpoint.mode == "chat_logprobs":
            raise _unable(client, "does not give `top_logprobs` with a chat")
    return plain


def canary(endpoint: Endpoint, ability: Ability) -> tuple[str, dict[str, Any]]:
    """Path and body of the smallest request of the kind that the teacher sends."""
    if ability.mode == "prompt_logprobs":
        return "/completions", echo_body(endpoint, ["One two three."], ability.least_tokens)
    return "/chat/completions", chat_body(endpoint, [{"role": "user", "content": "Say yes."}], ability, 1)


async def _attempt(
    client: EndpointClient, path: str, body: dict[str, Any], *, last: bool = False
) -> dict[str, Any] | None:
    """The answer, or None when the server does not take such a request; what it says to the last one counts."""
    try:
        return await client.post(path, body, attempts=ATTEMPTS if last else 2)
    except RowRefused:
        return None
    except WorkFailed:
        if last:
            raise
        return None


def _unable(client: EndpointClient, what: str) -> WorkFailed:
    return WorkFailed(
        "endpoint_refuses", f"Endpoint {client.name!r} {what}; the operator has to choose another `mode` for it."
    )


# --- requests and answers -------------------------------------------------------------------------------------------


def echo_body(endpoint: Endpoint, texts: list[str], least_tokens: int) -> dict[str, Any]:
    """A request that asks how probable the tokens of these texts are."""
    return {
        "model": endpoint.model, "prompt": texts, "max_tokens": least_tokens, "echo": True, "logprobs": 1, "temperature": 0.0,
    }  # fmt: skip


def chat_body(endpoint: Endpoint, messages: list[dict[str, str]], ability: Ability, longest: int) -> dict[str, Any]:
    """A request for the most probable answer to a chat."""
    return {"model": endpoint.model, "messages": messages, "temperature": 0.0, ability.length_field: longest}


def first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    """The first of an answer's choices. Raises RowRefused when it has none."""
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        raise RowRefused("the answer has no choices") from None
    if not isinstance(choice, dict):
        raise RowRefused("the answer has no choices")
    return choice


def usage_of(answer: dict[str, Any]) -> Usage:
    """What the server says an answer took."""
    usage = answer.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return Usage(*(count if isinstance(count, int) else 0 for count in counts))


def echoed(answer: dict[str, Any], texts: Sequence[str], least_tokens: int) -> list[list[float]] | None:
    """The log-probabilities of each text's tokens without the first; None unless every text came back with its own."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != len(texts):
        return None
    found: list[list[float]] = []
    try:
        for choice, text in zip(sorted(choices, key=lambda choice: int(choice["index"])), texts, strict=True):
            values = choice["logprobs"]["token_logprobs"]
            values = [float(value) for value in values[1 : len(values) - least_tokens]]
            if text not in choice["text"] or len(values) < 2:
                return None
            found.append(values)
    except (KeyError, TypeError, ValueError):
        return None
    return found


def lists_alternatives(choice: dict[str, Any]) -> bool:
    """Whether a choice tells how probable its first token was, and others."""
    try:
        return len(choice["logprobs"]["content"][0]["top_logprobs"]) > 1
    except (KeyError, TypeError, IndexError):
        return False


def read_alternatives(steps: list[dict[str, Any]], content: str, answers: Sequence[str]) -> NDArray[np.float64] | None:
    """(C,) the distribution over the labels that the tokens of a greedy answer and their alternatives show.

    The answer is followed token by token while more than one label begins with what is written so far. At each step an
    alternative that continues to one label gives it its probability; one that fits several is shared evenly among them.
    Labels that could have come but are not listed share what the list leaves over, each at most the least that is
    listed. What is left at the end belongs to the label that was answered. The sum is then scaled to 1: probabilities
    are given that the answer is a label. None if nothing listed is the beginning of a label.
    """
    written, mass = "", 1.0
    labels = [_beginning(answer) for answer in answers]
    total = np.zeros(len(labels))
    possible = list(range(len(labels)))
    for step in steps:
        listed = {str(entry["token"]): math.exp(float(entry["logprob"])) for entry in step["top_logprobs"]}
        listed[str(step["token"])] = math.exp(float(step["logprob"]))
        named: set[int] = set()
        for token, probability in listed.items():
            text = _beginning(written + token)
            fits = [index for index in possible if text and labels[index].startswith(text)]
            named.update(fits)
            if token != step["token"]:
                total[fits] += mass * probability / max(1, len(fits))
        unlisted = [index for index in possible if index not in named and labels[index] != _beginning(written)]
        if unlisted and named:
            rest = max(0.0, 1.0 - sum(listed.values())) / len(unlisted)
            total[unlisted] += mass * min(rest, *listed.values())
        mass *= listed[str(step["token"])]
        written += str(step["token"])
        possible = [index for index in possible if labels[index].startswith(_beginning(written))]
        if len(possible) <= 1:
            break
    answered = possible[0] if len(possible) == 1 else match_label(content, answers)
    if answered is not None:
        total[answered] += mass
    return total / total.sum() if total.sum() > 0 else None


def match_label(content: str, answers: Sequence[str]) -> int | None:
    """The label that an answer names: as it is written, or but for case, punctuation and a `Label:` before it. Where
    answers are numbers, the one that the answer begins with."""
    text = re.sub(r"<think>.*?</think>", "", content, flags=re.DOTALL).strip()
    line = next(iter(text.splitlines()), "").strip()
    if line in answers:
        return list(answers).index(line)
    wanted = _bare(line)
    bare = [_bare(answer) for answer in answers]
    if all(answer.isdigit() for answer in bare):
        wanted = wanted.removeprefix("label ").partition(" ")[0]
    for candidate in (wanted, wanted.removeprefix("label ")):
        if candidate and bare.count(candidate) == 1:
            return bare.index(candidate)
    return None


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(C,) -> (C,), sums to 1."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _beginning(text: str) -> str:
    return text.lstrip(" \t\r\n\"'`*").casefold()


def _bare(text: str) -> str:
    return NOT_WORDS.sub(" ", text.casefold()).strip()


def _no_label(content: str) -> str:
    return f"the answer is none of the labels: {content.strip()[:80]!r}"

"""A server of the outside world: it speaks the OpenAI dialect over real HTTP, knows three topics, and fails on request."""

from __future__ import annotations

import json
import math
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from app.config import Endpoint
from tests.support import TOPICS, WORDS

ECHO, ECHO_AND_ONE, ALTERNATIVES, FEW_ALTERNATIVES, NEW_LENGTH = "echo", "echo and one", "20", "5", "new length"


class World:
    """What the server can do, what it was asked, and what shall go wrong."""

    def __init__(self, *able: str) -> None:
        self.able = set(able)
        self.requests: list[tuple[float, str, dict[str, Any]]] = []
        """When, path and body."""
        self.keys: list[str | None] = []
        self.sampled: Counter[str | None] = Counter()
        """How many answers were drawn about each text."""
        self.faults: dict[str, list[Any]] = {}
        """By a piece of the row's text, or "" for every request: what goes wrong, one entry a request."""
        self.down_after: str | None = None
        """The text of the row after whose request every request fails."""
        self.headers: dict[str, str] = {}
        """Sent with every answer."""
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.release = threading.Event()
        """Lets the requests that hang end."""
        self.answer_seconds = 0.0
        self.url = ""
        self.opinion: Callable[[str, Sequence[str]], dict[str, float]] = opinion
        """How probable each topic is for a text."""
        self.complete = complete
        """Answers `/completions`; a test may put a real model here."""

    def endpoint(self, **changes: Any) -> Endpoint:
        return Endpoint(**{"base_url": self.url, "model": "tiny", "timeout_seconds": 5.0, **changes})

    def asked(self, path: str = "") -> list[str]:
        """The texts of the rows that were asked about, in order, with repetitions."""
        return [text for _, where, body in self.requests if path in where and (text := row_of(body)) is not None]

    def fault_for(self, body: dict[str, Any]) -> Any:
        text = row_of(body) or ""
        if text == self.down_after:
            self.down_after, self.faults = None, {"": ["always 500"]}
        for piece, faults in self.faults.items():
            if piece in text and faults:
                return faults[0] if faults[0] == "always 500" else faults.pop(0)
        return None


def row_of(body: dict[str, Any]) -> str | None:
    """The text of the row that a request is about; None for a question of another kind."""
    prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"][0]
    found = re.findall(r"[Tt]ext: (.*)\nLabel:", prompt)
    return found[-1] if found else None


def opinion(text: str, topics: Sequence[str] = TOPICS) -> dict[str, float]:
    """How probable each topic is: the more of its words, the more."""
    weights = {topic: 0.5 + sum(word in text.split() for word in WORDS.get(topic, [topic])) for topic in topics}
    return {topic: weight / sum(weights.values()) for topic, weight in weights.items()}


def pieces(text: str) -> list[str]:
    """Tokens: at most four letters, with the space before them."""
    return re.findall(r"\s?\w{1,4}|\s|[^\w\s]", text)


def listed(prompt: str) -> list[str]:
    """The labels that a prompt lists."""
    return re.findall(r"^- ([^:\n]+)", prompt, re.MULTILINE)


def next_pieces(chances: dict[str, float], written: list[str]) -> Counter[str]:
    """How probable each next piece is after those that are written; "" is the end of the answer."""
    following: Counter[str] = Counter()
    for topic, chance in chances.items():
        said = [*pieces(topic), ""]
        if said[: len(written)] == written and len(said) > len(written):
            following[said[len(written)]] += chance  # type: ignore[assignment]
    total = sum(following.values())
    return Counter({piece: chance / total for piece, chance in following.items()})


def greedy(chances: dict[str, float]) -> str:
    """What a model answers that always takes the most probable piece."""
    written: list[str] = []
    while (piece := next_pieces(chances, written).most_common(1)[0][0]) != "":
        written.append(piece)
    return "".join(written)


def complete(world: World, body: dict[str, Any]) -> dict[str, Any]:
    choices = []
    tokens = 0
    for index, text in enumerate(body["prompt"]):
        question, _, answer = text.rpartition("Label:")
        shown = pieces(question + "Label:") if question else pieces(text)
        said = pieces(answer) if question else []
        row = re.findall(r"[Tt]ext: (.*)\n$", question)
        topics = listed(body["prompt"][0]) or TOPICS
        chance = world.opinion(row[-1], topics).get(answer.strip(), 1e-6) if row else 0.5
        values = [None, *[-1.0] * (len(shown) - 1), *[math.log(chance)] * len(said)]
        more = [" and"] * body["max_tokens"]
        values += [-0.5] * len(more)
        tokens += len(shown) + len(said)
        logprobs = {"tokens": [*shown, *said, *more], "token_logprobs": values} if body.get("logprobs") else None
        choices.append({"index": index, "text": text + "".join(more), "logprobs": logprobs})
    # Servers need not keep the order of the prompts.
    usage = {"prompt_tokens": tokens, "completion_tokens": body["max_tokens"] * len(choices)}
    return {"choices": choices[::-1], "usage": usage}


def chat(world: World, body: dict[str, Any]) -> dict[str, Any]:
    text = row_of(body)
    topics = listed(body["messages"][0]["content"])
    chances = world.opinion(text, topics) if text is not None else {"yes": 0.9, "no": 0.1}
    best = greedy(chances)
    if body["temperature"] > 0:  # one after the other, so that the shares can be foretold
        with world.lock:
            turn = world.sampled[text]
            world.sampled[text] += 1
        shares = [topic for topic, chance in chances.items() for _ in range(round(chance * 10))]
        best = shares[turn % len(shares)]
    if world.faults.get(f"wrong {text}"):
        best = world.faults[f"wrong {text}"][0]
    said = pieces(best)
    limit = 20 if ALTERNATIVES in world.able else 5 if FEW_ALTERNATIVES in world.able else 0
    logprobs = None
    if body.get("logprobs") and limit:
        content = []
        for number, piece in enumerate(said):
            following = next_pieces(chances, said[:number])
            most = [{"token": token, "logprob": math.log(chance)} for token, chance in following.most_common(limit)]
            content.append({"token": piece, "logprob": math.log(following[piece] or 1e-9), "top_logprobs": most})
        logprobs = {"content": content}
    message = {"role": "assistant", "content": best}
    usage = {"prompt_tokens": len(pieces(body["messages"][-1]["content"])), "completion_tokens": len(said)}
    return {"choices": [{"index": 0, "message": message, "logprobs": logprobs}], "usage": usage}


def refusal(world: World, path: str, body: dict[str, Any]) -> tuple[int, str] | None:
    """What a server of this ability answers to what it does not know."""
    if path == "/v1/completions":
        if not {ECHO, ECHO_AND_ONE} & world.able:
            return 404, "no such path"
        if ECHO not in world.able and body["max_tokens"] == 0:
            return 400, "max_tokens must be at least 1"
    elif path == "/v1/chat/completions":
        if NEW_LENGTH in world.able and "max_tokens" in body:
            return 400, "use max_completion_tokens"
        if ALTERNATIVES not in world.able and body.get("top_logprobs", 0) > 5:
            return 400, "top_logprobs must be at most 5"
    else:
        return 404, "no such path"
    return None


class Handler(BaseHTTPRequestHandler):
    """One connection to the world."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    world: World

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self.world.requests.append((time.monotonic(), f"GET {self.path}", {"prompt": [""]}))
        self.reply(200, {})

    def do_POST(self) -> None:
        world = self.world
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with world.lock:
            world.requests.append((time.monotonic(), self.path, body))
            world.keys.append(self.headers.get("authorization"))
            world.busy += 1
            world.most_busy = max(world.busy, world.most_busy)
            fault = world.fault_for(body)
        try:
            time.sleep(world.answer_seconds)
            self.answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with world.lock:
                world.busy -= 1

    def answer(self, body: dict[str, Any], fault: Any) -> None:
        if fault == "hang":
            self.world.release.wait(30)
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "truncated":
            self.send(200, b'{"choices": [{"message": {"cont')
        elif fault == "cut":
            self.send(200, b'{"choices": [', length=500)
            self.close_connection = True
        elif fault == "always 500":
            self.reply(500, {"error": {"message": "boom"}})
        elif isinstance(fault, tuple):
            status, headers = fault
            self.reply(status, {"error": {"message": f"no, {self.headers.get('authorization')}"}}, headers)
        elif (wrong := refusal(self.world, self.path, body)) is not None:
            self.reply(wrong[0], {"error": {"message": wrong[1]}})
        else:
            world = self.world
            self.reply(200, (world.complete if self.path == "/v1/completions" else chat)(world, body))

    def reply(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), {**self.world.headers, **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(length or len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Says nothing of clients that were killed."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(world: World) -> Iterator[World]:
    """The world behind a port of this machine."""

    class Connection(Handler):
        pass

    Connection.world = world
    server = Server(("127.0.0.1", 0), Connection)
    server.daemon_threads = True
    world.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield world
    finally:
        world.release.set()
        server.shutdown()
        server.server_close()
        thread.join()

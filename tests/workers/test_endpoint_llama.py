"""The endpoint teacher and a LLaMA that has learned the task: behind a server, it labels as `causal_lm` does."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from sqlalchemy import Engine
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils.import_utils import is_serve_available

from app import pretrained
from app.config import Endpoint, settings
from app.embedded import free_port
from app.options import CausalLMTeacher, EndpointTeacher, Label
from app.storage import storage
from tests.llms import tiny_llama
from tests.openai_server import ECHO, World, serving
from tests.support import (
    FILLER,
    TOPICS,
    WORDS,
    add_dataset,
    job_of,
    label,
    sentences,
    shards_of,
    submit,
    tiny_spec,
    wait_until,
)
from workers import labeling
from workers.labeling import read_labels
from workers.teachers import causal_lm, endpoint
from workers.teachers.prompt_tokens import PromptTokens
from workers.teachers.prompts import build_prompt
from workers.teachers.teacher import Row

LABELS = [Label(name=topic) for topic in TOPICS]
STEPS, BATCH = 120, 24
PLACES = ["bar", "gym", "inn", "lab", "pub", "spa", "zoo"]
MATTERS = ["bill", "dirt", "fire", "leak", "line", "mold", "rain", "rust", "snow", "wait", "wind"]
COMPLAINTS = [Label(name=f"{place}_{matter}") for place in PLACES for matter in MATTERS]
PAIR_STEPS, PAIR_BATCH = 150, 32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a LLaMA of two layers that was taught to answer with the topic of a text."""
    words = " ".join([*FILLER, *TOPICS, *(word for topic in TOPICS for word in WORDS[topic])])
    place = tiny_llama(tmp_path_factory.mktemp("models") / "llama", chat=True, words=words, initializer_range=0.1)
    tokenizer, model = AutoTokenizer.from_pretrained(place), LlamaForCausalLM.from_pretrained(place)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    prompt = build_prompt(EndpointTeacher(kind="endpoint", endpoint="any"), LABELS, [])
    rows = sentences(STEPS * BATCH, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for start in range(0, len(rows), BATCH):
        chats, plain = [], []
        for row in rows[start : start + BATCH]:
            asked = tokenizer.apply_chat_template(prompt.messages(Row(row["text"])), add_generation_prompt=True)[
                "input_ids"
            ]
            chats.append((asked, [*tokenizer(row["label"], add_special_tokens=False)["input_ids"], end]))
            text = tokenizer(prompt.text(Row(row["text"])), add_special_tokens=False)["input_ids"]
            plain.append((text, tokenizer(f" {row['label']}", add_special_tokens=False)["input_ids"]))
        pairs = chats[::2] + plain[1::2]
        longest = max(len(asked) + len(answer) for asked, answer in pairs)
        ids, targets = torch.zeros(len(pairs), longest, dtype=torch.long), torch.full((len(pairs), longest), -100)
        for number, (asked, answer) in enumerate(pairs):
            stop = len(asked) + len(answer)
            ids[number, :stop] = torch.tensor(asked + answer)
            targets[number, len(asked) : stop] = torch.tensor(answer)
        model(input_ids=ids, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = [2, end]
    model.save_pretrained(place)
    return place


def complaints(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs: the first text has the place of the label in it, the second the matter, both spelled backwards."""
    luck = random.Random(seed)

    def text_about(word: str) -> str:
        words = [*luck.choices(FILLER, k=3), word[::-1]]
        return " ".join(luck.sample(words, 4))

    chosen = [(luck.choice(PLACES), luck.choice(MATTERS)) for _ in range(count)]
    return [
        {"text": text_about(place), "text_pair": text_about(matter), "label": f"{place}_{matter}"}
        for place, matter in chosen
    ]


@pytest.fixture(scope="module")
def llama_of_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a LLaMA of two layers that was taught which of 77 complaints a pair of texts is."""
    names = [label.name for label in COMPLAINTS]
    words = " ".join([*FILLER, *names, *(word[::-1] for word in PLACES + MATTERS)])
    place = tiny_llama(tmp_path_factory.mktemp("models") / "pairs", chat=True, words=words, initializer_range=0.1)
    tokenizer, model = AutoTokenizer.from_pretrained(place), LlamaForCausalLM.from_pretrained(place)
    prompt = build_prompt(EndpointTeacher(kind="endpoint", endpoint="any"), COMPLAINTS, [])
    tokens = PromptTokens(tokenizer, prompt, chat=True, max_length=64, context=None)
    rows = complaints(PAIR_STEPS * PAIR_BATCH, 9)
    asked = tokens.encode([(row["text"], row["text_pair"]) for row in rows]).rows
    assert {shared for shared, _ in asked} == {len(tokens.prefix)}
    answers = [[*tokens.answers[names.index(row["label"])], tokens.end] for row in rows]
    examples = [(question, answer) for (_, question), answer in zip(asked, answers, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=PAIR_STEPS, pct_start=0.1)
    for start in range(0, len(examples), PAIR_BATCH):
        # The rows stand one after the other behind one prompt, and see it and themselves.
        shared = len(tokens.prefix)
        ids, positions = list(tokens.prefix), list(range(shared))
        whose, targets = [-1] * shared, [-100] * shared
        for number, (question, answer) in enumerate(examples[start : start + PAIR_BATCH]):
            ids += question + answer
            positions += range(shared, shared + len(question + answer))
            whose += [number] * len(question + answer)
            targets += [-100] * len(question) + answer
        owner, target = torch.tensor(whose), torch.tensor(targets[1:])
        sees = ((owner[:, None] == owner) | (owner == -1)).tril()
        states = model.model(
            input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=sees[None, None],
            use_cache=False,
        ).last_hidden_state[0, :-1]  # fmt: skip
        is_answer = target != -100
        torch.nn.functional.cross_entropy(model.lm_head(states[is_answer]), target[is_answer]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = [2, tokens.end]
    model.save_pretrained(place)
    return place


def by_causal_lm(place: Path, labels: list[Label], rows: list[Row], **changes: Any) -> np.ndarray:
    """(N, C) what the model says where it is loaded."""
    source = pretrained.resolve(place.name, purpose="causal_lm", roots=[place.parent], allow_hub=False)
    options = CausalLMTeacher(kind="causal_lm", model=place.name, **changes)
    return causal_lm.CausalLMTeacher(options, labels, source).label(rows).probabilities


def configure(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(settings(), "endpoints", {"llama": Endpoint(**changes)})
    monkeypatch.setattr(labeling, "_loaded", None)


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `transformers serve`; it loads the model that a request names."""
    if not is_serve_available():
        pytest.skip("transformers serve needs the package openai, which is not installed")
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(trust_env=False) as http:

            def answers() -> bool:
                assert server.poll() is None, log.read_text()[-2000:]
                try:
                    return http.get(f"http://127.0.0.1:{port}/health").is_success
                except httpx.TransportError:
                    return False

            wait_until(answers, 180, "transformers serve starts")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("kind", ["three topics", "pairs and 77 labels"])
def test_a_job_on_transformers_serve_gets_the_labels_that_causal_lm_gives(
    database: Engine,
    transformers_serve: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    kind: str,
) -> None:
    if kind == "three topics":
        place, labels, rows, right = request.getfixturevalue("llama"), LABELS, sentences(200, 5), 0.8
    else:
        place, labels, rows, right = request.getfixturevalue("llama_of_pairs"), COMPLAINTS, complaints(100, 5), 0.5
    names = [label.name for label in labels]
    texts = [{name: value for name, value in row.items() if name != "label"} for row in rows]
    configure(monkeypatch, base_url=transformers_serve, model=str(place), concurrency=4)
    job_id = submit(tiny_spec(add_dataset(texts), labels=names, teacher={"kind": "endpoint", "endpoint": "llama"}))
    label(job_id)
    job = job_of(job_id)
    assert job.phase == "training", job.error
    said = read_labels(storage(), shards_of(job_id), "train", len(rows)).to_pylist()
    assert {answer["confidence"] for answer in said} == {None}  # it gives no log-probabilities
    by_server = np.array([np.argmax(answer["distribution"] or [np.nan] * len(names)) for answer in said])
    assert sum(answer["error"] is not None for answer in said) <= len(rows) // 100
    here = by_causal_lm(place, labels, [Row(**text) for text in texts]).argmax(axis=1)
    assert (by_server == here).mean() >= 0.99
    # Else the model has learned nothing; chance is a third, and one in 77.
    assert (here == [names.index(row["label"]) for row in rows]).mean() > right
    assert sum(answer["tokens"] for answer in said) > len(rows) * 20


def test_the_log_probabilities_of_a_prompt_give_the_distribution_that_causal_lm_gives(
    database: Engine, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(llama), LlamaForCausalLM.from_pretrained(llama).eval()
    rows = [Row(row["text"]) for row in sentences(30, 5, labeled=False)]

    @torch.inference_mode()
    def complete(world: World, body: dict[str, Any]) -> dict[str, Any]:
        choices, tokens = [], 0
        for index, text in enumerate(body["prompt"]):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            logs = model(input_ids=ids).logits[0].log_softmax(dim=-1)
            values = [None, *logs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]
            logprobs = {"tokens": tokenizer.convert_ids_to_tokens(ids[0]), "token_logprobs": values}
            choices.append({"index": index, "text": text, "logprobs": logprobs})
            tokens += ids.shape[1]
        return {"choices": choices, "usage": {"prompt_tokens": tokens, "completion_tokens": 0}}

    with serving(World(ECHO)) as world:
        world.complete = complete
        configure(monkeypatch, base_url=world.url, model="llama")
        teacher = endpoint.EndpointTeacher(EndpointTeacher(kind="endpoint", endpoint="llama"), LABELS)
        answer = teacher.label(rows)
    assert teacher.confidence_method == "prompt_logprobs"
    assert answer.errors == {}
    np.testing.assert_allclose(answer.probabilities, by_causal_lm(llama, LABELS, rows, chat="never"), atol=1e-4)

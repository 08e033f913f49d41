"""The endpoint teacher and a LLaMA that has learned the task: behind a server, it labels as `causal_lm` does."""

from __future__ import annotations

import os
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
from workers.teachers.prompts import build_prompt
from workers.teachers.teacher import Row

LABELS = [Label(name=topic) for topic in TOPICS]
ROWS = [Row(row["text"]) for row in sentences(200, 5, labeled=False)]
STEPS, BATCH = 120, 24


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


def by_causal_lm(place: Path, rows: list[Row], **changes: Any) -> np.ndarray:
    """(N, C) what the model says where it is loaded."""
    source = pretrained.resolve(place.name, purpose="causal_lm", roots=[place.parent], allow_hub=False)
    options = CausalLMTeacher(kind="causal_lm", model=place.name, **changes)
    return causal_lm.CausalLMTeacher(options, LABELS, source).label(rows).probabilities


def configure(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(settings(), "endpoints", {"llama": Endpoint(**changes)})
    monkeypatch.setattr(labeling, "_loaded", None)


@pytest.fixture
def transformers_serve(llama: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of `transformers serve` with the model."""
    if not is_serve_available():
        pytest.skip("transformers serve needs the package openai, which is not installed")
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(llama), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "serve.log"
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


def test_a_job_on_transformers_serve_gets_the_labels_that_causal_lm_gives(
    database: Engine, llama: Path, transformers_serve: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, base_url=transformers_serve, model=str(llama), concurrency=4)
    rows = sentences(200, 5)
    job_id = submit(
        tiny_spec(
            add_dataset([{"text": row["text"]} for row in rows]),
            labels=TOPICS,
            teacher={"kind": "endpoint", "endpoint": "llama"},
        )
    )
    label(job_id)
    job = job_of(job_id)
    assert job.phase == "training", job.error
    said = read_labels(storage(), shards_of(job_id), "train", len(rows)).to_pylist()
    assert {answer["confidence"] for answer in said} == {None}  # it gives no log-probabilities
    by_server = np.array([np.argmax(answer["probabilities"] or [np.nan] * 3) for answer in said])
    assert sum(answer["error"] is not None for answer in said) <= 2
    here = by_causal_lm(llama, ROWS).argmax(axis=1)
    assert (by_server == here).mean() >= 0.99
    assert (here == [TOPICS.index(row["label"]) for row in rows]).mean() > 0.8  # else the model has learned nothing
    assert sum(answer["tokens"] for answer in said) > 200 * 20


def test_the_log_probabilities_of_a_prompt_give_the_distribution_that_causal_lm_gives(
    database: Engine, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(llama), LlamaForCausalLM.from_pretrained(llama).eval()

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
        answer = teacher.label(ROWS[:30])
    assert teacher.confidence_method == "prompt_logprobs"
    assert answer.errors == {}
    np.testing.assert_allclose(answer.probabilities, by_causal_lm(llama, ROWS[:30], chat="never"), atol=1e-4)

"""Make a small LLaMA that knows something, have it label rows through the service, and train a student by LLKD on them.

    python -m benchmarks.small_llama train models/small-llama [--steps 1500] [--data emotion] [--threads 1]
    UNDERSTUDY_MODEL_ROOTS='["models"]' understudy up --port 8090 --data-dir data &
    python -m benchmarks.small_llama label small-llama --url http://127.0.0.1:8090 --key "$(cat data/api-key)" --rows 5000

    python -m benchmarks.small_llama train models/ending-llama --end
    transformers serve models/ending-llama --port 8091 --device cpu &
    UNDERSTUDY_MODEL_ROOTS='["models"]' UNDERSTUDY_ENDPOINTS='{"served": {"base_url": "http://127.0.0.1:8091/v1",
        "model": "models/ending-llama"}}' understudy up --port 8090 --data-dir data &
    python -m benchmarks.small_llama agree ending-llama --endpoint served --url … --key … --rows 5000

`train` starts from random weights and a byte-level BPE of the rows, and learns the label as the continuation of the prompt
that the causal_lm teacher writes, from the first half of the train rows. `label` uploads the first --rows of the second
half without their labels, the validation and the test set, runs the job, and prints what the job says about the teacher
and the student. With --end the model also learns to end its answer, and gets a chat template that writes the same prompt: a
server that generates needs both. `agree` runs one job with the model as causal_lm and one with the same model behind a
server, each with a student of a second or two, and prints on how many rows the two teachers' labels are the same.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.client import Client
from app.options import CausalLMTeacher, Label
from benchmarks.data import Rows, read_split
from benchmarks.record import upload
from workers.teachers.prompts import Prompt, build_prompt
from workers.teachers.teacher import Row

VOCABULARY = 4000
BATCH = 32
LEARNING_RATE = 2e-3
INSTRUCTION = "Which label fits?"
CHAT = (
    "{% for m in messages %}{{ ' ' + m['content'] + '</s>' if m['role'] == 'assistant' else m['content'] }}{% endfor %}"
)
SMALLEST_STUDENT = {"model": "scratch", "num_layers": 1, "hidden_size": 32, "vocab_size": 300, "max_length": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("directory", type=Path)
    training.add_argument("--steps", type=int, default=1500, help=f"of {BATCH} rows; some minutes on one quiet core")
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--end", action="store_true", help="learn to end the answer too, and have a chat template")
    labeling = commands.add_parser("label")
    agreeing = commands.add_parser("agree")
    for command in (labeling, agreeing):
        command.add_argument("model", help="its name under a model root of the service")
        command.add_argument("--url", default="http://127.0.0.1:8000")
        command.add_argument("--key", required=True)
        command.add_argument("--rows", type=int, default=5000)
    labeling.add_argument("--epochs", type=int, default=3)
    agreeing.add_argument("--endpoint", required=True, help="the service's name of the server that has the model")
    for command in (training, labeling, agreeing):
        command.add_argument("--data", default="emotion", help="a shared data set")
    arguments = parser.parse_args()
    if arguments.command == "train":
        torch.set_num_threads(arguments.threads)
        train(arguments.directory, arguments.data, arguments.steps, arguments.seed, end=arguments.end)
    else:
        {"label": label, "agree": agree}[arguments.command](arguments)


def halves(data: str) -> tuple[Rows, Rows]:
    """The rows that the model learns from, and the rows that it may label: no text is in both."""
    rows = read_split(data, "train")
    middle = len(rows) // 2
    learned = {row["text"] for row in rows[:middle]}
    return rows[:middle], [row for row in rows[middle:] if row["text"] not in learned]


def prompt_for(data: str) -> Prompt:
    """What the teacher of `label` will read."""
    names = sorted({row["label"] for row in read_split(data, "train")})
    return build_prompt(
        CausalLMTeacher(kind="causal_lm", model="-", instruction=INSTRUCTION),
        [Label(name=name) for name in names],
        examples=[],
    )


def train(directory: Path, data: str, steps: int, seed: int, *, end: bool) -> None:
    """Train with a learning rate that falls to 0; save model and tokenizer. `end`: the answer ends with `</s>`."""
    rows, _ = halves(data)
    prompt = prompt_for(data)
    tokenizer = train_tokenizer((prompt.text(Row(row["text"])) + f" {row['label']}" for row in rows), VOCABULARY)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    luck = random.Random(seed)
    texts = [(tokenizer(prompt.text(Row(row["text"])))["input_ids"], row["label"]) for row in rows]
    closing = [tokenizer.eos_token_id] if end else []
    examples = [(ids, tokenizer(f" {label}")["input_ids"] + closing) for ids, label in texts]
    if end:
        tokenizer.chat_template = CHAT
    began = time.perf_counter()
    running = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (1 - step / steps)
        loss = loss_of(model, luck.sample(examples, BATCH))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}, loss {running:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.1f} M parameters, {steps} steps of {BATCH} rows: {directory}")


def loss_of(model: LlamaForCausalLM, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Cross-entropy of the labels' tokens alone."""
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    asked = torch.zeros(len(batch), width, dtype=torch.bool)
    for number, (prompt, answer) in enumerate(batch):
        ids[number, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        asked[number, len(prompt) : len(prompt) + len(answer)] = True
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return torch.nn.functional.cross_entropy(model.lm_head(states[asked[:, 1:]]), ids[asked])


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as LLaMA 3 has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def label(arguments: argparse.Namespace) -> None:
    """Upload, run the job, print what it says."""
    _, rows = halves(arguments.data)
    names = sorted({row["label"] for row in rows})
    pool = [{"text": row["text"]} for row in rows[: arguments.rows]]
    with Client(arguments.url, arguments.key) as client:
        ids = {
            name: upload(client, f"{arguments.data}-{name}", content)
            for name, content in {
                "train": pool,
                "validation": read_split(arguments.data, "validation"),
                "test": read_split(arguments.data, "test"),
            }.items()
        }
        job = client.submit({
            "dataset_id": ids["train"], "validation_dataset_id": ids["validation"], "test_dataset_id": ids["test"],
            "labels": names, "teacher": {"kind": "causal_lm", "model": arguments.model, "instruction": INSTRUCTION},
            "method": {"kind": "llkd"}, "training": {"epochs": arguments.epochs},
        })  # fmt: skip
        job = finished(client, job["id"])
    print_figures(job)


def agree(arguments: argparse.Namespace) -> None:
    """Run the job with the model here and with the model behind the server; print how the labels compare."""
    _, rows = halves(arguments.data)
    gold = [row["label"] for row in rows[: arguments.rows]]
    said: dict[str, list[str | None]] = {}
    with Client(arguments.url, arguments.key) as client:
        train = upload(client, f"{arguments.data}-train", [{"text": row["text"]} for row in rows[: arguments.rows]])
        for teacher in (
            {"kind": "causal_lm", "model": arguments.model},
            {"kind": "endpoint", "endpoint": arguments.endpoint},
        ):
            job = client.submit({
                "dataset_id": train, "labels": sorted(set(gold)), "teacher": {**teacher, "instruction": INSTRUCTION},
                "student": SMALLEST_STUDENT, "method": {"kind": "no_selection"}, "training": {"epochs": 1},
            })  # fmt: skip
            job = finished(client, job["id"])
            said[teacher["kind"]] = [row["label"] for row in client.samples(job["id"])]
            labeling = job["labeling"]
            right = sum(label == name for label, name in zip(said[teacher["kind"]], gold, strict=True))
            print(
                f"{teacher['kind']}: {len(gold)} rows, {right / len(gold):.2%} right, {labeling['rows_failed']} without a label, "
                f"{labeling['tokens']} tokens, {labeling['seconds']:.0f} s, confidence by {labeling['confidence_method']}"
            )
    same = sum(here == served for here, served in zip(*said.values(), strict=True))
    print(f"the same label on {same} of {len(gold)} rows: {same / len(gold):.2%}")


def finished(client: Client, job_id: str) -> dict[str, Any]:
    """The job when it has succeeded; else the program ends with the reason."""
    job = client.wait(job_id)
    if job["status"] != "succeeded":
        raise SystemExit(f"{job['id']} {job['status']}: {job['error']}")
    return job


def print_figures(job: dict[str, Any]) -> None:
    """The teacher, its calibration, and the student."""
    labeling = job["labeling"]
    found = labeling["teacher"]["calibration"]
    test = job["evaluation"]["test"]
    rate = job["phases"][0]["total"] / labeling["seconds"]
    print(
        f"{job['id']}: {labeling['tokens']} tokens read in {labeling['seconds']:.0f} s of labeling, {rate:.0f} rows/s"
    )
    print(f"temperature {found['temperature']} from {found['rows']} validation rows\n")
    print("| | test accuracy | test macro-F1 | validation ECE before | after |")
    print("|---|---|---|---|---|")
    errors = [found[side]["expected_calibration_error"] for side in ("before", "after")]
    print(
        f"| teacher | {test['teacher']['accuracy']:.4f} | {test['teacher']['macro_f1']:.4f} | {errors[0]:.4f} | {errors[1]:.4f} |"
    )
    print(f"| student, LLKD | {test['student']['accuracy']:.4f} | {test['student']['macro_f1']:.4f} | | |")
    print(f"\nselected: {json.dumps(job['selection'].get('ratio'))} of the rows offered")


if __name__ == "__main__":
    main()

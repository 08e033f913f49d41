"""Rows a second of the causal_lm teacher beside the ways that are at hand, on one model in one run.

    python -m benchmarks.labeling [--rows 48] [--rounds 3] [--layers 6] [--width 512] [--cpu-time] [--no-every-way] [--where]

A LLaMA of that size with random weights labels the same rows in turn by
  * the text-generation pipeline of transformers: the whole prompt, then as many tokens as the longest label has;
  * a plain loop: one forward pass of prompt and label for every row and label;
  * ours: the prompt read once, rows and label tree in one pass;
  * the floor: one forward pass of the texts alone, without prompt, labels or scores: nothing that reads a text can be faster.
Medians of alternating rounds. The slow ways get fewer rows. The prompt is filled with examples up to --prompt tokens.
With --where it also prints, for many labels, in which parts of the model the time of ours goes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, pipeline
from transformers.utils import logging

from app import pretrained
from app.options import CausalLMTeacher as CausalLMOptions
from app.options import Example, Label
from benchmarks.data import SHARED, read_split
from benchmarks.small_llama import train_tokenizer
from workers.teachers.causal_lm import CausalLMTeacher, plain_scores
from workers.teachers.prompts import build_prompt
from workers.teachers.teacher import Row

# Texts of 48 tokens, 14 labels; then short texts with the fewest and the most labels.
WITH_EVERY_WAY = "dbpedia14-sample"
LABELS = 10
VOCABULARY = 16_000
MORE = ["emotion", "banking77", "clinc150"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=500, help="tokens of the prompt before the row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every-way", action=argparse.BooleanOptionalAction, default=True, help="the slow ways too")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: the ratios of a busy machine, with one thread"
    )
    parser.add_argument("--where", action="store_true", help="with many labels, print where the time of ours goes")
    arguments = parser.parse_args()
    if not (SHARED / WITH_EVERY_WAY).is_dir():
        print(f"labeling: skipped, the data set {WITH_EVERY_WAY} is not at {SHARED}")
        return
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory) / "llama", arguments.layers, arguments.width)
        source = pretrained.resolve("llama", purpose="causal_lm", roots=[Path(directory)], allow_hub=False)
        print(
            f"LLaMA, {arguments.layers} layers of width {arguments.width}, random weights; "
            f"{arguments.threads} thread(s), medians of {arguments.rounds} rounds" + ", CPU time" * arguments.cpu_time
        )
        if arguments.every_way:
            compare(WITH_EVERY_WAY, source, arguments, every_way=True)
        for name in MORE:
            compare(name, source, arguments, every_way=False)


def compare(name: str, source: pretrained.Source, arguments: argparse.Namespace, *, every_way: bool) -> None:
    """Print the table of one data set; where labels are many, also of answers by number."""
    train = read_split(name, "train", 2000)
    names = sorted({row["label"] for row in read_split(name, "test", 100_000)})[: LABELS if every_way else None]
    labels = [Label(name=label) for label in names]
    teacher, shown = make_teacher(source, labels, [row for row in train if row["label"] in names], arguments.prompt)
    # Short texts and many labels: what a row costs is the tree, and fewer rows tell it.
    count = arguments.rows if every_way or len(labels) < 20 else max(1, arguments.rows // 4)
    rows = [Row(row["text"]) for row in read_split(name, "test", count)]
    reader = teacher._prompts[0]
    encoded = reader.tokens.encode([(row.text, None) for row in rows]).rows
    prompts = [[*reader.tokens.prefix[:shared], *own] for shared, own in encoded]
    texts = teacher.tokenizer([row.text for row in rows], add_special_tokens=False)["input_ids"]
    texts = [ids[: teacher._options.max_length] for ids in texts]

    ways: dict[str, tuple[int, Callable[[int], object]]] = {
        "floor: the texts alone": (len(rows), lambda count: read_texts(teacher, texts[:count])),
        "ours": (len(rows), lambda count: teacher.label(rows[:count])),
    }
    if every_way:
        generate = pipeline("text-generation", model=teacher.model, tokenizer=teacher.tokenizer)
        prompt = build_prompt(teacher._options, labels, shown)
        longest = max(len(label) for label in reader.labels)
        ways["text-generation pipeline"] = (
            min(8, len(rows)),
            lambda count: generate(
                [prompt.text(row) for row in rows[:count]],
                max_new_tokens=longest, do_sample=False, batch_size=8, return_full_text=False,
            ),
        )  # fmt: skip
        ways["plain loop over the labels"] = (
            1,
            lambda count: plain_scores(teacher.model, prompts[:count], reader.labels),
        )
        difference = agreement(teacher, prompts[:2], rows[:2])
    if len(labels) > 20:
        numbered, _ = make_teacher(source, labels, [], arguments.prompt, answers="numbers")
        nodes = len(numbered._prompts[0].tree.tokens)
        ways[f"ours, answers by number: {nodes} inner tree nodes"] = (
            len(rows),
            lambda count: numbered.label(rows[:count]),
        )
    rates = measure(ways, arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)
    print(
        f"\n{name}: {len(labels)} labels, {len(reader.tree.tokens)} inner tree nodes, prompt of {len(reader.tokens.prefix)} "
        f"tokens, texts of {statistics.median(map(len, texts)):.0f} tokens"
    )
    print("\n| way | rows/s | ours is faster by | time / floor |")
    print("|---|---|---|---|")
    for way, rate in sorted(rates.items(), key=lambda entry: entry[1]):
        print(f"| {way} | {rate:.2f} | {rates['ours'] / rate:.2f} | {rates['floor: the texts alone'] / rate:.2f} |")
    if every_way:
        print(f"\nLargest difference of a probability to the plain loop: {difference:.1e}")
    if arguments.where and len(labels) > 20:
        print("\n| where the time of ours goes | share |")
        print("|---|---|")
        for part, share in shares(teacher, rows).most_common():
            print(f"| {part} | {share:.0%} |")


def shares(teacher: CausalLMTeacher, rows: list[Row]) -> Counter[str]:
    """The share of each part of the model in the time of labeling these rows, told by the shapes of what is computed."""
    vocabulary, nodes = teacher.model.config.vocab_size, len(teacher._prompts[0].tree.tokens)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        teacher.label(rows)
    seconds: Counter[str] = Counter()
    for operation in profiler.key_averages(group_by_input_shape=True):
        last = {shape[-1] for shape in operation.input_shapes if shape}
        if vocabulary in last:
            part = "scores of nodes over the vocabulary, and their sums"
        elif "scaled_dot_product" in operation.key:
            part = "attention to the prompt"
        elif operation.key in ("aten::mm", "aten::addmm"):
            part = "matrices of the layers"
        elif any(nodes <= size <= nodes + teacher._options.max_length + 16 for size in last):
            part = "attention of rows and nodes to each other"
        else:
            part = "all else"
        seconds[part] += operation.self_cpu_time_total
    return Counter({part: each / seconds.total() for part, each in seconds.items()})


def measure(
    ways: dict[str, tuple[int, Callable[[int], object]]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Rows a second of each way, the median over rounds in which they take turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _, work in ways.values():
        work(1)
    for _ in range(rounds):
        for way, (count, work) in ways.items():
            began = clock()
            work(count)
            seconds[way].append((clock() - began) / count)
    return {way: 1 / statistics.median(each) for way, each in seconds.items()}


@torch.inference_mode()
def read_texts(teacher: CausalLMTeacher, texts: list[list[int]]) -> None:
    """One forward pass of the texts alone, sorted by length, in batches of the same number of tokens as the teacher's."""
    ordered = sorted(texts, key=len)
    while ordered:
        count = max(1, teacher._tokens_per_batch // len(ordered[min(len(ordered) - 1, 15)]))
        batch, ordered = ordered[:count], ordered[count:]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in batch])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in batch])
        teacher.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


def agreement(teacher: CausalLMTeacher, prompts: list[list[int]], rows: list[Row]) -> float:
    """The largest difference of a probability between the plain loop and ours."""
    scores = plain_scores(teacher.model, prompts, teacher._prompts[0].labels)
    return float(np.abs(scores.softmax(dim=1).numpy() - teacher.label(rows).probabilities).max())


def make_teacher(
    source: pretrained.Source,
    labels: list[Label],
    train: list[dict[str, str]],
    tokens: int,
    answers: Literal["labels", "numbers"] = "labels",
) -> tuple[CausalLMTeacher, list[Example]]:
    """The teacher whose prompt has about that many tokens, and its examples."""
    shown: list[Example] = []
    while True:
        options = CausalLMOptions(kind="causal_lm", model="llama", examples=shown, max_length=48, answers=answers)
        teacher = CausalLMTeacher(options, labels, source)
        missing = tokens - len(teacher._prompts[0].tokens.prefix)
        if missing < 10 or len(shown) == 100:
            return teacher, shown
        more = max(1, missing // 60)
        shown = [
            Example(text=" ".join(row["text"].split()[:32]), label=row["label"]) for row in train[: len(shown) + more]
        ]


def save_model(directory: Path, layers: int, width: int) -> None:
    """A LLaMA with random weights and a tokenizer trained on the rows of the data sets."""
    rows = [row for name in [WITH_EVERY_WAY, *MORE] for row in read_split(name, "train", 2000)]
    tokenizer = train_tokenizer((f"{row['text']}\nLabel: {row['label']}" for row in rows), VOCABULARY)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()

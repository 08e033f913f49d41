"""Time of one step of LGTM against the authors' algorithm, and against ProKT, side by side.

    python -m benchmarks.lgtm_step [--small] [--rounds 7] [--batch 32] [--length 64]

A teacher of 12 layers and a student of 6, 384 wide as the bundled encoder (--small: 4 and 2 layers, 128 wide), on random
tokens, in one process and in turn; medians over the rounds after one for warming up. On a CPU the seconds are those of the
process, so that other work on the machine weighs little; on a GPU those of the clock. `--small` is what `make bench` runs.
The authors' algorithm is benchmarks/plain_lgtm.py; tests/workers/test_lgtm_step.py shows that its gradients are ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from app import options
from benchmarks.plain_lgtm import plain_step
from workers.training.lgtm import learn_lgtm
from workers.training.prokt import learn_prokt
from workers.training.step import Batch, Inputs, Pair

TRAINING = options.Training(learning_rate=5e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    width, layers = (128, (4, 2)) if arguments.small else (384, (12, 6))

    times = measure(contestants(width, layers, arguments.batch, arguments.length), arguments.rounds)
    base = statistics.median(times["the authors' algorithm"])
    print(
        f"teacher {layers[0]} and student {layers[1]} layers of width {width}, batch {arguments.batch} x {arguments.length} tokens,"
        f" {arguments.threads} thread(s), {arguments.rounds} rounds, medians\n"
    )
    print("| one step | seconds | share of the authors' | times faster |")
    print("|---|---|---|---|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.3f} | {median / base:.2f} | {base / median:.2f} |")


def contestants(width: int, layers: tuple[int, int], rows: int, length: int) -> dict[str, Callable[[int], object]]:
    """What is measured: by name, the n-th step of a pair of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, feedback = data(rows, length, device)

    def lgtm(**wish: object) -> Callable[[int], object]:
        method = options.LGTM.model_validate({"kind": "lgtm", **wish})
        of = pair(width, layers, device)
        every = method.influence_every
        return lambda number: learn_lgtm(of, batch, feedback if number % every == 0 else None, method, TRAINING)

    authors = options.LGTM(kind="lgtm", influence="finite_difference")
    plain, prokt = pair(width, layers, device), pair(width, layers, device)
    return {
        "the authors' algorithm": lambda number: plain_step(plain, batch, feedback, authors, TRAINING),
        "lgtm, exact": lgtm(),
        "lgtm, finite_difference": lgtm(influence="finite_difference"),
        "lgtm, exact, influence_every 4 (mean of 4 steps)": _mean_of(4, lgtm(influence_every=4)),
        "prokt": lambda number: learn_prokt(prokt, batch, options.ProKT(kind="prokt"), TRAINING),
    }


def _mean_of(count: int, step: Callable[[int], object]) -> Callable[[int], object]:
    def steps(number: int) -> int:
        for each in range(count):
            step(each)
        return count

    return steps


def measure(steps: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds a step, round by round, each contestant once a round; a step that answers a number made so many."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = clock()
            made = step(number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append((clock() - began) / (made if isinstance(made, int) else 1))
    return times


def pair(width: int, layers: tuple[int, int], device: torch.device) -> Pair:
    """Teacher and student with random weights and dropout 0.1."""
    torch.manual_seed(0)
    models = [
        RobertaForSequenceClassification(
            RobertaConfig(
                vocab_size=30_522, hidden_size=width, num_hidden_layers=count, num_attention_heads=12 if width % 12 == 0 else 4,
                intermediate_size=4 * width, num_labels=3,
            )
        ).to(device).train()
        for count in layers
    ]  # fmt: skip
    optimizers = [torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True) for model in models]
    return Pair(models[1], optimizers[1], models[0], optimizers[0])


def data(rows: int, length: int, device: torch.device) -> tuple[Batch, tuple[Inputs, torch.Tensor]]:
    """A batch and feedback rows of random tokens."""
    made = []
    for seed in (1, 2):
        luck = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 30_000, (rows, length), generator=luck).to(device)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    labels = (torch.arange(rows) % 3).to(device)
    return Batch(made[0], made[0], labels), (made[1], labels)


if __name__ == "__main__":
    main()

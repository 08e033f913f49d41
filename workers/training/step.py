"""What every kind of step is given and answers, and what several of them do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from app.lifecycle import WorkFailed
from app.options import ByDistance, Method, TaughtTogether, Training
from workers.algorithms.distillation import LOSSES
from workers.algorithms.selection.rule import Selection
from workers.reporter import Report
from workers.training import shares
from workers.training.data import Tokens, length_sorted_batches
from workers.training.run import HeldOut, Measured, Pool, Run

TRAIN_TOKENS_PER_BATCH = {"cpu": 384, "cuda": 65_536}
"""Padded tokens of one forward pass with gradients. On a CPU, padding a batch of short texts to its longest costs more
than the further passes do; a GPU wants it full. `python -m benchmarks.epoch_cost` times the loop beside the Trainer's."""
Inputs = dict[str, Tensor]
"""A model's arguments for a batch."""
Forward = Callable[[Inputs], tuple[Tensor, ...]]
"""Arguments of B rows -> results (B, …), each row's of its own arguments alone."""


@dataclass(frozen=True)
class Lesson:
    """The S rows that were chosen for one step."""

    rows: NDArray[np.int64]
    teacher: Tensor
    """(S, C) distributions over the labels, by the job's teacher."""
    selection: Selection
    """Of the whole batch that the rows were chosen from."""
    rule: Any
    """What chose them."""
    step: int
    """0-based."""


@dataclass(frozen=True)
class Learned:
    """What a step tells."""

    loss: float
    """The student's."""
    figures: dict[str, float] = field(default_factory=dict)
    """By the name of their series, which shows the mean over the steps between two points."""
    measured: Measured | None = None


Step = Callable[[Run, Pool, Method, Training, Lesson], Learned]
"""Learn from the rows of one lesson: leaves the models changed, their optimizers advanced and no gradients."""


@dataclass(frozen=True)
class Pair:
    """A student and an encoder teacher that learn together; both in train mode. Both answer `model(**inputs).logits`."""

    student: nn.Module
    student_optimizer: torch.optim.AdamW
    teacher: nn.Module
    teacher_optimizer: torch.optim.AdamW

    @classmethod
    def of(cls, run: Run, teacher: str = "teacher") -> Pair:
        """The student of a run, and the companion of this part."""
        companion = run.companions[teacher]
        return cls(run.student.model, run.optimizer, companion.encoder.model, companion.optimizer)


@dataclass(frozen=True)
class Batch:
    """B rows as both models read them."""

    student: Inputs
    teacher: Inputs
    labels: Tensor
    """(B,) class indices."""

    @classmethod
    def of(cls, pool: Pool, lesson: Lesson, device: torch.device) -> Batch:
        """A lesson's rows, with the job teacher's labels."""
        mine = inputs(pool.tokens, lesson.rows, device)
        theirs = mine if pool.teacher_tokens is None else inputs(pool.teacher_tokens, lesson.rows, device)
        return cls(mine, theirs, lesson.teacher.argmax(dim=1).to(device))


def inputs(tokens: Tokens, rows: NDArray[np.int64], device: torch.device) -> Inputs:
    """The model's arguments for these rows, on its device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tokens.batch(rows).items()}


def logits_of(model: nn.Module, arguments: Inputs, training: Training) -> Tensor:
    """(B, C) logits in float32 at least, computed in the precision of the training."""
    return outputs_of(lambda part: (model(**part).logits,), arguments, training)[0]


def outputs_of(forward: Forward, arguments: Inputs, training: Training) -> tuple[Tensor, ...]:
    """What `forward` gives for each of B rows, (B, …) each: this process computes its share, in the parts it is asked for."""
    rows = len(next(iter(arguments.values())))
    mine = own_inputs(arguments)
    parts = [mine]
    if training.gradient_accumulation > 1:
        chunks = [tensor.chunk(training.gradient_accumulation) for tensor in mine.values()]
        parts = [dict(zip(mine, part, strict=True)) for part in zip(*chunks, strict=True)]
    computed = [in_precision(forward, part, training) for part in parts]
    return tuple(
        shares.gather(torch.cat(each) if len(each) > 1 else each[0], rows) for each in zip(*computed, strict=True)
    )


def own_inputs(arguments: Inputs) -> Inputs:
    """This process's share of the rows of a batch."""
    if shares.processes() == 1:
        return arguments
    places = torch.from_numpy(shares.own(len(next(iter(arguments.values())))))
    return {name: tensor[places.to(tensor.device)] for name, tensor in arguments.items()}


def logits_by_length(model: Any, tokens: Tokens, rows: NDArray[np.int64], training: Training) -> Tensor:
    """(S, C) logits of S rows, with gradients, computed on batches of rows of like length: little is spent on padding.

    The loss is that of the whole batch; only which rows share a forward pass depends on their lengths.
    """
    mine = rows[shares.own(len(rows))]
    lengths = tokens.offsets[mine + 1] - tokens.offsets[mine]
    budget = TRAIN_TOKENS_PER_BATCH[model.device.type]
    if training.gradient_accumulation > 1:
        budget = min(budget, math.ceil(int(lengths.sum()) / training.gradient_accumulation))
    parts = length_sorted_batches(lengths, np.arange(len(mine)), budget)
    logits = [
        in_precision(lambda part: (model(**part).logits,), inputs(tokens, mine[part], model.device), training)[0]
        for part in parts
    ]
    return shares.gather(torch.cat(logits)[np.argsort(np.concatenate(parts))], len(rows))


def in_precision(forward: Forward, part: Inputs, training: Training) -> tuple[Tensor, ...]:
    """What `forward` gives under the autocast of the training, in float32 at least.

    With gradient accumulation, a part is computed again when its gradient is asked for, and keeps nothing until then: the
    backward pass takes one part after the other, whatever the loss does with the rows.
    """

    def compute(arguments: Inputs) -> tuple[Tensor, ...]:
        device = next(iter(arguments.values())).device
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            outputs = forward(arguments)
        return tuple(output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs)

    if training.gradient_accumulation > 1 and torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = checkpoint(compute, part, use_reentrant=False)
        return outputs
    return compute(part)


def student_loss(teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, method: ByDistance) -> Tensor:
    """α ℓ(T, S) + (1 - α) CE(y, S), mean over the rows; α is `distillation_share`."""
    distilled = LOSSES[method.distillation_loss](teacher_logits, student_logits, method.temperature).mean()
    share = method.distillation_share
    return share * distilled + (1 - share) * functional.cross_entropy(student_logits, labels)


def auxiliary_loss(teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, method: TaughtTogether) -> Tensor:
    """λ ℓ(S, T) + (1 - λ) CE(y, T), mean over the rows: the student is the target. λ is `teacher_distillation_share`."""
    distilled = LOSSES[method.distillation_loss](student_logits, teacher_logits, method.temperature).mean()
    share = method.teacher_distillation_share
    return share * distilled + (1 - share) * functional.cross_entropy(teacher_logits, labels)


def backward_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, training: Training) -> None:
    """One step of the optimizer on the loss of the whole batch, its gradient clipped; no gradients are left."""
    loss.backward()
    clip_and_step(model, optimizer, training)


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, training: Training) -> None:
    """One step of the optimizer along the gradients of all processes, clipped; none are left.

    Raises WorkFailed where they are no longer finite, and leaves the weights as they are.
    """
    shares.add_up_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
    if not norm.isfinite():
        raise WorkFailed(
            "training_diverged",
            "The loss or its gradient is no longer a finite number; choose a lower training.learning_rate, or look at the model's weights.",
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def interruptible(report: Report, models: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, every layer of the models asks the report whether to go on, on the way forward and back.

    On a CPU, a step with a large batch takes longer than an owner should wait. Raises what `check_within_step` raises, anywhere in a step.
    """

    def ask(*_: Any) -> None:
        report.check_within_step()

    def ask_both_ways(layer: nn.Module, arguments: Any, output: Any) -> None:
        report.check_within_step()
        state = output[0] if isinstance(output, tuple) else output
        if isinstance(state, Tensor) and state.requires_grad:
            state.register_hook(ask)

    blocks = (block for model in models for block in model.modules() if isinstance(block, nn.ModuleList))
    handles = [layer.register_forward_hook(ask_both_ways) for block in blocks for layer in block]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, and afterwards as before."""
    with without_dropout(model), torch.no_grad():
        yield


@contextmanager
def without_dropout(*models: nn.Module) -> Iterator[None]:
    """Dropout off, and afterwards as before."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, trained in zip(models, before, strict=True):
            model.train(trained)


def feedback_batch(feedback: HeldOut, size: int, number: int, seed: int, device: torch.device) -> tuple[Inputs, Tensor]:
    """The `number`-th batch of feedback rows, and their labels: shuffled anew in every round over them.

    A function of its arguments alone, so that nothing of it need be saved. A batch in which one round ends and the next
    begins may hold a row twice.
    """
    rows = len(feedback.rows)
    size = min(size, rows)
    places = np.arange(number * size, (number + 1) * size)
    orders = {
        turn: np.random.Generator(np.random.PCG64([seed, turn, 1])).permutation(rows)
        for turn in range(int(places[0]) // rows, int(places[-1]) // rows + 1)
    }
    chosen = np.array([orders[place // rows][place % rows] for place in places.tolist()])
    labels = torch.from_numpy(feedback.gold[chosen]).to(device)
    return inputs(feedback.tokens, feedback.rows[chosen], device), labels

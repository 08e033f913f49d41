"""What a student predicts for many rows, and how good that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import RobertaForSequenceClassification

from workers.training.data import Rows, Tokens, length_sorted_batches


class PredictionStopped(Exception):
    """`should_stop` said so before the last batch."""


def predict_probabilities(
    model: RobertaForSequenceClassification,
    tokens: Tokens,
    rows: Tensor | NDArray[Any] | None = None,
    *,
    tokens_per_batch: int = 8192,
    should_stop: Callable[[], bool] | None = None,
    bf16: bool = False,
) -> Tensor:
    """Class probabilities of N rows, without dropout and gradients: float32 on the CPU, shape (N, classes).

    rows: the row numbers wanted, shape (N,), and the order of the result; None: all. tokens_per_batch: padded tokens a
    batch holds at most; halved as often as the device runs out of memory. should_stop: asked before each batch.
    bf16: compute in bfloat16 where autocast would; worth it on GPUs only.

    The model's training mode is as before when this returns or raises. Raises PredictionStopped.
    """
    wanted = np.arange(len(tokens)) if rows is None else np.asarray(rows, dtype=np.int64)
    places = np.arange(len(wanted))  # duplicates in `rows` are rows of the result like any other
    lengths = tokens.lengths[wanted]
    device = model.device
    probabilities = torch.empty(len(wanted), model.config.num_labels, device=device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            pending = length_sorted_batches(lengths, places, tokens_per_batch)[::-1]
            while pending:
                if should_stop is not None and should_stop():
                    raise PredictionStopped
                batch = pending.pop()
                try:
                    probabilities[torch.from_numpy(batch)] = _forward(model, tokens, wanted[batch], device)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    tokens_per_batch = max(1, tokens_per_batch // 2)
                    rest = np.concatenate([batch, *reversed(pending)])
                    pending = length_sorted_batches(lengths, rest, tokens_per_batch)[::-1]
    finally:
        model.train(training)
    return probabilities.cpu()


def _forward(model: RobertaForSequenceClassification, tokens: Tokens, rows: Rows, device: torch.device) -> Tensor:
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in tokens.batch(rows).items()}
    return model(**batch).logits.float().softmax(dim=-1)

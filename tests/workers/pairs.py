"""Small pairs of student and encoder teacher, made from configs, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

from app import options
from workers.training.step import Batch, Inputs, Pair

CLASSES = 3
TRAINING = options.Training(learning_rate=1e-3)


def lgtm(**values: Any) -> options.LGTM:
    return options.LGTM.model_validate({"kind": "lgtm", **values})


def model(layers: int, seed: int, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=14, num_labels=CLASSES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).to(dtype).train()


def optimizer(of: Any, rate: float = 1e-3) -> torch.optim.AdamW:
    decayed = [parameter for parameter in of.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in of.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=rate, fused=True
    )


def pair(dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Pair:
    """A student of one layer and a teacher of two; the student's optimizer has a memory of two steps."""
    student, teacher = model(1, 10 * seed + 1, dropout, dtype), model(2, 10 * seed + 2, dropout, dtype)
    made = Pair(student, optimizer(student), teacher, optimizer(teacher))
    for number in (8, 9):
        arguments, labels = feedback(6, number)
        torch.nn.functional.cross_entropy(student(**arguments).logits, labels).backward()
        made.student_optimizer.step()
        made.student_optimizer.zero_grad()
    return made


def texts(rows: int, seed: int) -> Inputs:
    """Token ids with padding, of lengths 4 to 12."""
    luck = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (rows, 12), generator=luck)
    lengths = torch.randint(4, 13, (rows, 1), generator=luck)
    mask = (torch.arange(12) < lengths).long()
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def batch(rows: int = 5, seed: int = 3) -> Batch:
    arguments = texts(rows, seed)
    return Batch(arguments, arguments, torch.arange(rows) % CLASSES)


def feedback(rows: int = 6, seed: int = 4) -> tuple[Inputs, Tensor]:
    return texts(rows, seed), (torch.arange(rows) + seed) % CLASSES

"""Attention for many rows that share one prefix: the prefix's keys and values are neither computed nor copied again.

The queries of all rows meet the prefix in one matrix product, their own tokens in another, and both parts are put
together by their softmax normalisers, as in Hydragen (Juravsky et al., arXiv:2402.05099) and cascade inference. It is
exact. The mask of a row's own tokens is free, so the branches of a label tree can stand behind each row at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache

NAME = "shared_prefix"


@dataclass(frozen=True)
class SharedPrefix:
    """What was read once, by layer: keys and values, each (key-value heads, P, D)."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    def first(self, length: int) -> SharedPrefix:
        """Its first tokens alone."""
        if length == self.length:
            return self
        return SharedPrefix([layer[:, :length] for layer in self.keys], [layer[:, :length] for layer in self.values])


@dataclass(frozen=True)
class Branches:
    """Rows behind a shared prefix."""

    prefix: SharedPrefix
    positions: Tensor
    """(B, S) place of each token in its row's text, the prefix included."""
    sees: Tensor
    """(B, S, S) bool: which of its row's own tokens a token attends to; all of them attend to the prefix."""


class CannotShare(Exception):
    """The model's attention is of a kind that is not known here."""


@torch.inference_mode()
def read_prefix(model: PreTrainedModel, tokens: list[int]) -> SharedPrefix:
    """Keys and values of a prefix, by the model's own attention. Raises CannotShare for other kinds of memory."""
    # A cache made without the model's configuration keeps every key, in layers with a sliding window too.
    cache = DynamicCache()
    inputs = torch.tensor([tokens], device=model.device)
    model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    try:
        keys = [layer.keys[0] for layer in cache.layers]
        values = [layer.values[0] for layer in cache.layers]
    except (AttributeError, TypeError) as error:
        raise CannotShare("its memory is not keys and values alone") from error
    if not keys or any(layer.shape[1] != len(tokens) for layer in keys):
        raise CannotShare("it does not keep the keys of every token")
    return SharedPrefix(keys, values)


@contextmanager
def sharing(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model attends as `attend` does, and `forward` may be called; afterwards it is what it was."""
    own = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def forward(model: PreTrainedModel, tokens: Tensor, branches: Branches, logits_at: Tensor) -> Tensor:
    """Logits (B, len(logits_at), V) of rows' own tokens (B, S), within `sharing`."""
    answer = model(
        input_ids=tokens, position_ids=branches.positions, use_cache=False, logits_to_keep=logits_at, branches=branches
    )
    return answer.logits


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    branches: Branches,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (B, H, S, D), key and value (B, G, S, D) of the rows' own tokens -> (B, S, H, D)."""
    if s_aux is not None:
        raise CannotShare("it has attention sinks")
    rows, heads, steps, width = query.shape
    groups = key.shape[1]
    layer = cast(int, module.layer_idx)
    prefix_keys, prefix_values = branches.prefix.keys[layer], branches.prefix.values[layer]
    query = query * (width**-0.5 if scaling is None else scaling)

    by_group = query.reshape(rows, groups, heads // groups * steps, width)
    near = (by_group @ key.transpose(2, 3)).view(rows, groups, -1, steps, steps)
    together = by_group.transpose(0, 1).reshape(groups, -1, width)  # (G, B * H/G * S, D)
    sees, in_window = branches.sees, None
    if sliding_window is not None:
        positions, length = branches.positions, branches.prefix.length
        sees = sees & (positions[:, :, None] - positions[:, None, :] < sliding_window)
        in_window = positions[:, :, None] - torch.arange(length, device=positions.device) < sliding_window
    if softcap is None and in_window is None and query.device.type == "cpu":
        # Twice as fast as the products and the softmax one by one, and the only kernel of torch that tells the normaliser.
        far_sum, far_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            together[None], prefix_keys[None], prefix_values[None], scale=1.0
        )
        far_sum, far_norm = far_sum[0], far_norm[0]
    else:
        far = together @ prefix_keys.transpose(1, 2)  # (G, B * H/G * S, P)
        if softcap is not None:
            far, near = softcap * torch.tanh(far / softcap), softcap * torch.tanh(near / softcap)
        if in_window is not None:
            far.view(groups, rows, -1, steps, length).masked_fill_(~in_window[None, :, None], float("-inf"))
        far_share, far_norm = _softmax(far)
        far_sum = far_share @ prefix_values
    near = near.masked_fill(~sees[:, None, None], float("-inf")).view(rows, groups, -1, steps)
    near_share, near_norm = _softmax(near)
    far_norm = far_norm.view(groups, rows, -1, 1).transpose(0, 1)
    far_sum = far_sum.view(groups, rows, -1, width).transpose(0, 1)
    weight = torch.sigmoid(far_norm - near_norm).to(value.dtype)
    mixed = torch.lerp(near_share @ value, far_sum, weight)  # (B, G, H/G * S, D)
    return mixed.reshape(rows, heads, steps, width).transpose(1, 2).contiguous(), None


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-normaliser (..., 1) in float32; all -inf gives zeros and -inf."""
    highest = scores.amax(dim=-1, keepdim=True).float()
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32)
    norm = highest - shares.amax(dim=-1, keepdim=True).log()
    empty = highest == float("-inf")
    if bool(empty.any()):
        shares, norm = shares.masked_fill(empty, 0.0), norm.masked_fill(empty, float("-inf"))
    return shares.to(scores.dtype), norm


AttentionInterface.register(NAME, attend)

"""The answers a language model may give, as a prefix tree of tokens: what labels share is scored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelTree:
    """Inner nodes are read by the model; edges are the tokens whose probability makes up the labels.

    Position 0 stands for the last token of the prompt, position 1 + n for inner node n.
    """

    tokens: Tensor
    """(T,) token of each inner node; none for labels of one token."""
    depths: Tensor
    """(T,) 0 for a node that follows the prompt."""
    sees: Tensor
    """(T, T) bool: which nodes a node attends to, its ancestors and itself."""
    edge_from: Tensor
    """(E,) the position that predicts the edge's token."""
    edge_tokens: Tensor
    """(E,)"""
    means: Tensor
    """(E, C) float32: 1 / length of the label where the edge lies on its path, else 0."""

    def to(self, device: torch.device) -> LabelTree:
        """The same tree on another device."""
        return LabelTree(**{name: value.to(device) for name, value in vars(self).items()})


def build(labels: Sequence[Sequence[int]]) -> LabelTree:
    """The tree of C distinct, non-empty token sequences, none of which begins another (see `closed`)."""
    paths: dict[tuple[int, ...], int] = {}  # of inner nodes
    edges: dict[tuple[int, ...], int] = {}
    for label in labels:
        for end in range(1, len(label) + 1):
            path = tuple(label[:end])
            edges.setdefault(path, len(edges))
            if end < len(label):
                paths.setdefault(path, len(paths))
    sees = torch.zeros(len(paths), len(paths), dtype=torch.bool)
    for path, node in paths.items():
        sees[node, [paths[path[:end]] for end in range(1, len(path) + 1)]] = True
    means = torch.zeros(len(edges), len(labels))
    for number, label in enumerate(labels):
        for end in range(1, len(label) + 1):
            means[edges[tuple(label[:end])], number] = 1 / len(label)
    return LabelTree(
        tokens=torch.tensor([path[-1] for path in paths], dtype=torch.long),
        depths=torch.tensor([len(path) - 1 for path in paths], dtype=torch.long),
        sees=sees,
        edge_from=torch.tensor([1 + paths[path[:-1]] if path[:-1] else 0 for path in edges]),
        edge_tokens=torch.tensor([path[-1] for path in edges]),
        means=means,
    )


def closed(labels: Sequence[Sequence[int]], end: int) -> list[list[int]]:
    """Labels with the end-of-answer token after those that begin another label.

    Without it `calendar` would be as probable as `calendar_update` wherever the model is sure of the latter.
    """
    beginnings = {tuple(label[:stop]) for label in labels for stop in range(1, len(label))}
    return [[*label, end] if tuple(label) in beginnings else list(label) for label in labels]


def mean_log_probabilities(logits: Tensor, tree: LabelTree) -> Tensor:
    """The mean log-probability of each label's tokens: logits (B, 1 + T, V) of prompt end and nodes -> (B, C) float32."""
    norms = logits.float().logsumexp(dim=-1)
    chosen = logits[:, tree.edge_from, tree.edge_tokens].float()
    return (chosen - norms[:, tree.edge_from]) @ tree.means

"""Distillation influence: how much learning from a row lowers the loss on feedback rows (LGTM, arXiv:2305.09651, Eq. 2).

    I_i = < ∇θ ℓ_i , v >        ℓ_i: distillation loss of row i;  v: gradient of the feedback loss, constant here

is the derivative of ℓ_i as the student's weights θ move along v, so one pass in forward mode gives it for every row at once:
it carries along each logit's own derivative. I_i > 0: a step that lowers ℓ_i lowers the feedback loss too. I_i < 0: the
row does harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Weights = Mapping[str, Tensor]
Forward = Callable[[Weights], Tensor]
"""Weights by name -> (B, C) logits of the batch."""


@dataclass(frozen=True)
class Tangent:
    """The student's logits on a batch, and their derivative along the feedback gradient; both (B, C), without gradient."""

    logits: Tensor
    velocity: Tensor

    def derivative(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """(B,) derivative along the feedback gradient of `loss`, (B, C) logits -> (B,); differentiable in what it holds.

        A loss may couple the rows of a batch: row i's part is what reaches the mean through row i's logits, times B, so
        the mean over the rows is always the derivative of the mean.
        """
        logits = self.logits.detach().requires_grad_()
        with torch.enable_grad():
            values = loss(logits)
            (slope,) = torch.autograd.grad(values.sum(), logits, create_graph=True)
        return (slope * self.velocity).sum(dim=-1)


@dataclass(frozen=True)
class Difference:
    """The student's logits a little ahead of and a little behind its weights, along the feedback gradient; (B, C) each."""

    ahead: Tensor
    behind: Tensor
    width: Tensor
    """Scalar: how far apart the two are, in units of the feedback gradient."""

    @property
    def logits(self) -> Tensor:
        """(B, C) the student's logits, up to the square of the radius."""
        return (self.ahead + self.behind) / 2

    def derivative(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """(B,) the central difference of `loss`, (B, C) logits -> (B,)."""
        return (loss(self.ahead) - loss(self.behind)) / self.width


def exact(forward: Forward, weights: Weights, direction: Weights) -> Tangent:
    """One forward-mode pass; no graph is kept.

    Attention runs in its plain form inside, as the fused kernels have no forward mode; outside nothing changes. A tangent
    on the embedding of the padding token would not be zeroed; gradients are zero there, so `direction` must be one.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        carried = torch.func.jvp(forward, (dict(weights),), (dict(direction),))
    return Tangent(carried[0].detach(), carried[1].detach())


def finite_difference(forward: Forward, weights: Weights, direction: Weights, radius: float) -> Difference:
    """Two passes without gradient at weights ± radius · v / ‖v‖ (Eq. 4 of the paper with the step of the authors' code).

    Both passes draw the same dropout masks. The weights themselves are not touched.
    """
    names, slopes = list(direction), list(direction.values())
    here = [weights[name].detach() for name in names]
    shrink = radius / torch.nn.utils.get_total_norm(slopes).clamp_min(1e-30)
    shift = torch._foreach_mul(slopes, shrink)
    devices = [here[0].device] if here[0].is_cuda else []
    with torch.no_grad():
        with torch.random.fork_rng(devices):
            ahead = forward({**weights, **dict(zip(names, torch._foreach_add(here, shift), strict=True))})
        behind = forward({**weights, **dict(zip(names, torch._foreach_sub(here, shift), strict=True))})
    return Difference(ahead, behind, 2 * shrink)

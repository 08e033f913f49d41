"""What an optimizer's next step would make of the parameters, without taking it: LGTM's pilot student."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


def virtual_step(optimizer: torch.optim.AdamW, gradients: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
    """The values the parameters would have after `optimizer.step()` with these gradients; nothing is changed.

    Every parameter of the optimizer needs a gradient. The arithmetic is torch's AdamW (Loshchilov and Hutter,
    arXiv:1711.05101): decay first, then the step along bias-corrected moments, eps outside the root. All tensors of a
    group at a time, two values of temporary memory per parameter beside the result.

    Raises ValueError for variants of AdamW whose step is another one.
    """
    after: dict[Parameter, Tensor] = {}
    for group in optimizer.param_groups:
        if group["amsgrad"] or group["maximize"]:
            raise ValueError("a virtual step is known for plain AdamW only, without amsgrad and maximize")
        parameters: list[Parameter] = group["params"]
        slopes = [gradients[parameter] for parameter in parameters]
        states = [optimizer.state.get(parameter) or {} for parameter in parameters]
        beta1, beta2 = group["betas"]
        first = torch._foreach_mul(
            [_moment(state, "exp_avg", p) for state, p in zip(states, parameters, strict=True)], beta1
        )
        second = torch._foreach_mul(
            [_moment(state, "exp_avg_sq", p) for state, p in zip(states, parameters, strict=True)], beta2
        )
        torch._foreach_add_(first, slopes, alpha=1 - beta1)
        torch._foreach_addcmul_(second, slopes, slopes, value=1 - beta2)
        step = 1 + (int(states[0]["step"]) if states and states[0] else 0)
        torch._foreach_sqrt_(second)
        torch._foreach_div_(second, math.sqrt(1 - beta2**step))
        torch._foreach_add_(second, group["eps"])
        moved = torch._foreach_mul(
            [parameter.detach() for parameter in parameters], 1 - group["lr"] * group["weight_decay"]
        )
        torch._foreach_addcdiv_(moved, first, second, value=-group["lr"] / (1 - beta1**step))
        after.update(zip(parameters, moved, strict=True))
    return after


def _moment(state: Mapping[str, Tensor], name: str, parameter: Parameter) -> Tensor:
    return state[name] if name in state else torch.zeros_like(parameter)

"""A virtual step is the optimizer's own step, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.algorithms.virtual_step import virtual_step


def begun(dtype: torch.dtype, steps: int, fused: bool) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}],
        lr=1e-2, betas=(0.8, 0.95), eps=1e-6, fused=fused,
    )  # fmt: skip
    for _ in range(steps):
        model(torch.randn(4, 5, dtype=dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def remembered(model: nn.Module, optimizer: torch.optim.AdamW) -> list[bytes]:
    """Weights and moments, bit for bit."""
    moments = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return [tensor.detach().numpy().tobytes() for tensor in (*model.parameters(), *moments)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_it_is_what_the_optimizer_does_next(dtype: torch.dtype, bound: float, steps: int, fused: bool) -> None:
    model, optimizer = begun(dtype, steps, fused)
    slopes = torch.autograd.grad(model(torch.randn(4, 5, dtype=dtype)).square().sum(), list(model.parameters()))
    before = remembered(model, optimizer)
    after = virtual_step(optimizer, dict(zip(model.parameters(), slopes, strict=True)))
    assert remembered(model, optimizer) == before
    for parameter, slope in zip(model.parameters(), slopes, strict=True):
        parameter.grad = slope
        assert not torch.equal(after[parameter], parameter)
    optimizer.step()
    for parameter in model.parameters():
        assert torch.allclose(after[parameter], parameter, rtol=bound, atol=bound)


def test_another_kind_of_step_is_refused() -> None:
    model = nn.Linear(2, 2)
    slopes = {parameter: torch.ones_like(parameter) for parameter in model.parameters()}
    with pytest.raises(ValueError, match="amsgrad"):
        virtual_step(torch.optim.AdamW(model.parameters(), amsgrad=True), slopes)

"""Adam over one buffer: torch's own, numbers by hand, and parameters that somebody replaced."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from ppo_hpo.ppo.adam import FlatAdam

# Both implementations of a step: the fused one of the CPU, and the one of a GPU.
STEPS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])


def adam_of(*values: list[float], fused: bool = True, lr: float = 0.1, eps: float = 1e-8) -> FlatAdam:
    adam = FlatAdam([nn.Parameter(torch.tensor(value)) for value in values], lr, eps)
    return adam if fused else as_on_a_gpu(adam)


def as_on_a_gpu(adam: FlatAdam) -> FlatAdam:
    assert adam._grad is not None  # which chooses the fused step
    adam._grad = None
    return adam


@STEPS
def test_adam_equals_torchs(fused: bool) -> None:
    """With clipping, over gradients of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((3, 4), (4,), ())]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    their = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    adam, reference = FlatAdam(ours, 0.01, 1e-5), torch.optim.Adam(their, lr=0.01, eps=1e-5)
    if not fused:
        as_on_a_gpu(adam)
    for step in range(50):
        grads = [10.0 ** (step % 7 - 5) * torch.randn(p.shape, generator=generator) for p in their]
        for one, other, grad in zip(ours, their, grads, strict=True):
            assert one.grad is not None
            one.grad.add_(grad)
            other.grad = grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(their, 0.5)
        reference.step()
        assert float(adam.step(0.5)) == pytest.approx(float(expected), rel=1e-5)
        for one, other in zip(ours, their, strict=True):
            torch.testing.assert_close(one.data, other.data, rtol=1e-5, atol=1e-6)
            assert not one.grad.any()  # ready for the next backpropagation


@STEPS
def test_two_steps_by_hand(fused: bool) -> None:
    # eps = 1 is as large as the gradients. After one step the corrected moments are g and g^2:
    #   3 - 0.1 * 4 / (4 + 1) = 2.92
    # After two with g = 4 and then 0 they are m = 0.9 * 0.1 * 4 / 0.19 and v = 0.999 * 0.001 * 16 / 0.001999.
    adam = adam_of([3.0], fused=fused, eps=1.0)
    adam.grad[:] = 4.0
    assert float(adam.step(100.0)) == 4.0
    assert float(adam.flat) == pytest.approx(2.92, rel=1e-6)
    assert float(adam.moments()["exp_avg"][0]) == pytest.approx(0.4)
    assert float(adam.moments()["exp_avg_sq"][0]) == pytest.approx(0.016)
    adam.step(100.0)
    mean, square = 0.36 / 0.19, 0.999 * 0.016 / 0.001999
    assert float(adam.flat) == pytest.approx(2.92 - 0.1 * mean / (math.sqrt(square) + 1.0), rel=1e-6)
    assert adam.n_steps == 2


@STEPS
@pytest.mark.parametrize("scale", [1.0, 2.0**-20], ids=["large", "tiny"])
def test_the_gradient_is_clipped_to_the_norm(scale: float, fused: bool) -> None:
    # Of norm 5 and bound 1 is left (3, 4) / (5 + 1e-6), where torch adds 1e-6 whatever the scale is. With an
    # eps of the gradient's size the step shows it.
    adam = adam_of([0.0, 0.0], fused=fused, lr=1.0, eps=scale)
    adam.grad[:] = torch.tensor([3.0, 4.0]) * scale
    assert float(adam.step(scale)) == pytest.approx(5.0 * scale, rel=1e-6)
    left = torch.tensor([3.0, 4.0]) * scale * scale / (5.0 * scale + 1e-6)
    torch.testing.assert_close(adam.flat, -left / (left + scale), rtol=1e-5, atol=0.0)


def test_a_norm_at_the_bound_is_not_clipped_on_the_cpu() -> None:
    adam = adam_of([0.0], lr=1.0, eps=2.0**-20)
    adam.grad[:] = 2.0**-20
    adam.step(2.0**-20)
    assert float(adam.flat) == pytest.approx(-0.5)


def test_a_gradient_that_is_not_finite_is_not_hidden_by_clipping() -> None:
    for bad in (float("nan"), float("inf")):
        adam = adam_of([1.0, 2.0])
        adam.grad[:] = torch.tensor([bad, 1.0])
        with np.errstate(invalid="ignore"):
            assert not math.isfinite(float(adam.step(0.5)))
        assert not adam.finite()


@pytest.mark.parametrize("buffer", ["flat", "_exp_avg", "_exp_avg_sq"])
def test_every_buffer_must_be_finite(buffer: str) -> None:
    adam = adam_of([1.0], [2.0, 3.0])
    assert adam.finite()
    getattr(adam, buffer)[2] = float("inf")
    assert not adam.finite()


def test_parameters_gradients_and_moments_are_views_in_their_order() -> None:
    adam = adam_of([1.0, 2.0], [3.0])
    first, second = adam._parameters
    assert adam.flat.tolist() == [1.0, 2.0, 3.0]
    adam.flat.mul_(2.0)
    assert (first.tolist(), second.tolist()) == ([2.0, 4.0], [6.0])
    (first.sum() + 3.0 * second.sum()).backward()
    assert adam.grad.tolist() == [1.0, 1.0, 3.0]
    for name, views in adam.moments().items():
        views[1].fill_(7.0)
        assert getattr(adam, f"_{name}").tolist() == [0.0, 0.0, 7.0]


def dropped(parameter: nn.Parameter) -> None:
    parameter.grad = None


def assigned(parameter: nn.Parameter) -> None:
    parameter.data = torch.full_like(parameter, 5.0)


def in_double(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.data, parameter.grad.data = parameter.data.double(), parameter.grad.double()


@STEPS
@pytest.mark.parametrize("replace", [dropped, assigned, in_double])
def test_replaced_tensors_become_views_again(replace: Callable[[nn.Parameter], None], fused: bool) -> None:
    adam = adam_of([1.0, 2.0], [3.0], fused=fused)
    assert adam.attached()
    adam.grad[:] = 9.0  # left by somebody's own backpropagation
    replace(adam._parameters[1])
    assert adam.attached() == (replace is dropped)
    adam.attach()
    assert adam.attached()
    assert adam.flat.tolist() == [1.0, 2.0, 5.0 if replace is assigned else 3.0]
    before = adam.flat.clone()
    sum(parameter.sum() for parameter in adam._parameters).backward()
    assert adam.grad.tolist() == [1.0, 1.0, 1.0]
    adam.step(10.0)
    torch.testing.assert_close(adam.flat, before - 0.1)
    assert torch.equal(torch.cat([parameter.detach() for parameter in adam._parameters]), adam.flat)

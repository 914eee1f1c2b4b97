"""Adam over one flat buffer.

`torch.optim.Adam` is not used for two measured reasons. The first optimizer of a process imports torch's
compiler, which takes 0.8 to 1.2 s in every trial. And a step over the twelve small tensors of a multilayer
perceptron takes four times as long as one over a single array of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_BETA1, _BETA2 = 0.9, 0.999


class FlatAdam:
    """Adam (Kingma & Ba 2015, algorithm 1), with the gradient clipped to a global norm.

    The parameters become views into one buffer, and so do their gradients. So a module that holds the
    parameters sees every step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, eps: float) -> None:
        self.lr = lr
        self.eps = eps  # added to the root of the second moment, after the correction of its bias
        self.n_steps = 0
        self._parameters = list(parameters)
        self.flat = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        # Backpropagation adds to the gradients, and `step` sets them to zero.
        self.grad, self._exp_avg, self._exp_avg_sq, self._work = (
            torch.zeros_like(self.flat) for _ in range(4)
        )
        self._places = [view.data_ptr() for view in self._views(self.flat)]
        self._grads: list[Tensor] = []
        self.attach()
        self._steps = torch.zeros((), dtype=torch.float32, device=self.flat.device)
        # On the CPU numpy's norm over the same memory takes a fraction of the time of torch's.
        self._grad = self.grad.numpy() if self.flat.device.type == "cpu" else None

    def step(self, max_norm: float) -> Tensor | float:
        """Take one step along the gradient, clipped to ``max_norm``; return the norm before clipping."""
        self.n_steps += 1
        return self._step_torch(max_norm) if self._grad is None else self._step_fused(self._grad, max_norm)

    def _step_fused(self, grad: NDArray[np.float32], max_norm: float) -> float:
        norm = math.sqrt(float(np.dot(grad, grad)))
        if not norm <= max_norm:  # also where it is NaN
            grad *= np.float32(max_norm / (norm + 1e-6))
        # `torch.optim.Adam(fused=True)` calls this too. It is one pass over the buffers, and takes a third of
        # the time of the twelve passes that numpy needs.
        torch._fused_adam_(
            [self.flat], [self.grad], [self._exp_avg], [self._exp_avg_sq], [],
            [self._steps.fill_(self.n_steps)], lr=self.lr, beta1=_BETA1, beta2=_BETA2,
            weight_decay=0.0, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        grad.fill(0.0)
        return norm

    @torch.no_grad()
    def _step_torch(self, max_norm: float) -> Tensor:
        # theta -= lr / c1 * m / (sqrt(v) / sqrt(c2) + eps), with sqrt(c2) multiplied through.
        root2 = math.sqrt(1.0 - _BETA2**self.n_steps)
        rate, eps = self.lr * root2 / (1.0 - _BETA1**self.n_steps), self.eps * root2
        norm: Tensor = torch.linalg.vector_norm(self.grad)
        # No branch on the norm's value: it would make a GPU wait.
        self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._exp_avg.lerp_(self.grad, 1.0 - _BETA1)
        self._exp_avg_sq.mul_(_BETA2).addcmul_(self.grad, self.grad, value=1.0 - _BETA2)
        torch.sqrt(self._exp_avg_sq, out=self._work)
        self._work.add_(eps)
        self.flat.addcdiv_(self._exp_avg, self._work, value=-rate)
        self.grad.zero_()
        return norm

    def attached(self) -> bool:
        """Whether the parameters are still views into the buffer."""
        return all(p.data_ptr() == at for p, at in zip(self._parameters, self._places, strict=True))

    def attach(self) -> None:
        """Make parameters and gradients views again, where somebody replaced them, and drop the gradients.

        ``module.zero_grad()`` replaces the gradients. ``module.to`` and assignments to ``parameter.data``
        replace the parameters; these get the values that are there.
        """
        self.grad.zero_()
        if not self.attached():
            with torch.no_grad():
                for parameter, value in zip(self._parameters, self._views(self.flat), strict=True):
                    parameter.data = value.copy_(parameter)
            self._grads = self._views(self.grad)
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            if parameter.grad is not grad:
                parameter.grad = grad

    def finite(self) -> bool:
        """Whether every parameter and every moment is a finite number."""
        return all(bool(torch.isfinite(b).all()) for b in (self.flat, self._exp_avg, self._exp_avg_sq))

    def moments(self) -> dict[str, list[Tensor]]:
        """``exp_avg`` and ``exp_avg_sq``: live views, one for each parameter."""
        return {"exp_avg": self._views(self._exp_avg), "exp_avg_sq": self._views(self._exp_avg_sq)}

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, [p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

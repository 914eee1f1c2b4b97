"""Adam over one flat buffer.

`torch.optim.Adam` is not used for two reasons that were measured: constructing the first optimizer of a
process imports torch's compiler, 0.8 to 1.2 s in every trial, and a step over the twelve small tensors of a
multilayer perceptron takes longer than one over a single tensor of the same size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatAdam:
    """Adam (Kingma & Ba 2015, algorithm 1), with the gradient clipped to a global norm.

    The parameters become views into one buffer, and so do their gradients; whatever else holds the
    parameters sees every step.

    Attributes:
        lr: learning rate of the next step.
        eps: added to the root of the second moment, after its bias was corrected.
        n_steps: steps taken.
        grad: all gradients, flat. Backpropagation adds to it; `step` sets it to zero.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        eps: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.lr = lr
        self.eps = eps
        self.n_steps = 0
        self._betas = betas
        self._parameters = list(parameters)
        self._flat = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self.grad = torch.zeros_like(self._flat)
        self._exp_avg = torch.zeros_like(self._flat)
        self._exp_avg_sq = torch.zeros_like(self._flat)
        self._denominator = torch.empty_like(self._flat)
        for parameter, value, grad in zip(
            self._parameters, self._views(self._flat), self._views(self.grad), strict=True
        ):
            parameter.data = value
            parameter.grad = grad

    @torch.no_grad()
    def step(self, max_norm: float) -> Tensor:
        """Take one step along the gradient, scaled down where its norm exceeds ``max_norm``.

        Returns:
            The norm before clipping, a scalar.
        """
        norm = torch.linalg.vector_norm(self.grad)
        # No branch on the norm's value: it would make a GPU wait.
        self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        self.n_steps += 1
        beta1, beta2 = self._betas
        correction1 = 1.0 - beta1**self.n_steps
        correction2 = 1.0 - beta2**self.n_steps
        self._exp_avg.lerp_(self.grad, 1.0 - beta1)
        self._exp_avg_sq.mul_(beta2).addcmul_(self.grad, self.grad, value=1.0 - beta2)
        torch.sqrt(self._exp_avg_sq, out=self._denominator)
        self._denominator.div_(correction2**0.5).add_(self.eps)
        self._flat.addcdiv_(self._exp_avg, self._denominator, value=-self.lr / correction1)
        self.grad.zero_()
        return norm

    def finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return bool(torch.isfinite(self._flat).all())

    def moments(self) -> dict[str, list[Tensor]]:
        """``exp_avg`` and ``exp_avg_sq``, each a live view for each parameter."""
        return {
            "exp_avg": self._views(self._exp_avg),
            "exp_avg_sq": self._views(self._exp_avg_sq),
        }

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

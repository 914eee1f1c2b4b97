"""Dry runs of a network or a criterion of the user's own, before anything is trained with it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.ppo.autograd import Criterion
from ppo_hpo.ppo.device import seeded_rng
from ppo_hpo.spec.errors import UserError

# Parts of the names of outputs, and what to do if one has the wrong shape.
_ADVICE = {"policy": "Give it one output for each action.", "value": "Add .squeeze(-1) to its single output."}


def check(network: nn.Module, info: EnvInfo, device: torch.device, seed: int) -> bool:
    """Refuse a network that breaks a rule; return whether it draws random numbers as it learns.

    The network is moved to the device. If the first input gives layers their parameters, ``seed`` draws them.
    """
    run = _DryRun(network.to(device), info, device)
    run.check_dtypes()
    with seeded_rng(seed, device):
        network.eval()
        with torch.no_grad():
            run.outputs(1)
            run.check_repeats()
        run.check_log_std()
        return run.draws_in_train_mode()


def check_criterion(criterion: Criterion, device: torch.device) -> None:
    """Refuse a loss of the critic that gives no scalar."""
    value = torch.zeros(3, dtype=torch.float32, device=device, requires_grad=True)
    try:
        loss = criterion(value, torch.ones_like(value))
    except Exception as error:
        raise UserError(
            f"`criterion` must take values [B] and returns [B], but raised {_line(error)}."
        ) from error
    if not isinstance(loss, Tensor) or loss.shape != () or not loss.requires_grad:
        raise UserError(
            f"`criterion` must return a scalar that depends on the values, as with reduction='mean', but got "
            f"{_kind_of(loss)}."
        )


class _DryRun:
    def __init__(self, network: nn.Module, info: EnvInfo, device: torch.device) -> None:
        self._network: Any = network
        self._info, self._device = info, device

    def outputs(self, n: int) -> dict[str, Tensor]:
        """The outputs for ``n`` observations by name, after a check of their shapes."""
        dtype = torch.uint8 if self._info.images else torch.float32
        obs = torch.zeros((n, *self._info.obs_shape), dtype=dtype, device=self._device)
        found = {name: self._call(name, obs) for name in ("policy", "value")}
        if hasattr(self._network, "policy_and_value"):
            both = self._call("policy_and_value", obs)
            if not isinstance(both, tuple) or len(both) != 2:
                self._refuse(f"must return two tensors from policy_and_value(obs), but got {both!r:.100}.")
            found |= {"policy of policy_and_value": both[0], "value of policy_and_value": both[1]}
        for name, output in found.items():
            kind = name.split()[0]
            shape = (n, self._info.action_dim) if kind == "policy" else (n,)
            if not isinstance(output, Tensor) or output.shape != shape or output.dtype != torch.float32:
                self._refuse(
                    f"must return torch.float32 of shape {shape} as {name}(obs) of {n} observations of "
                    f"{self._info.id}, but got {_kind_of(output)}. {_ADVICE[kind]}"
                )
        return found

    def check_dtypes(self) -> None:
        for name, parameter in self._network.named_parameters():
            if parameter.dtype != torch.float32:
                self._refuse(
                    f"must have parameters of torch.float32, but {name} has {parameter.dtype}. Call .float()."
                )

    def check_repeats(self) -> None:
        first, again = self.outputs(3), self.outputs(3)
        if not all(torch.allclose(first[name], again[name], equal_nan=True) for name in first):
            self._refuse(
                "must give the same outputs twice in eval mode, since PPO compares probabilities of the same "
                "actions. Let it draw random numbers, or keep a state, in train mode only."
            )
        for name, output in first.items():
            if not torch.allclose(output, first[name.split()[0]], rtol=1e-3, atol=1e-4, equal_nan=True):
                self._refuse(
                    "must give the same from policy_and_value(obs) as from policy(obs) and value(obs)."
                )

    def check_log_std(self) -> None:
        if not self._info.continuous:
            return
        log_std, n = getattr(self._network, "log_std", None), self._info.action_dim
        if not isinstance(log_std, Tensor) or log_std.shape != (n,) or log_std.dtype != torch.float32:
            self._refuse(
                f"must have log_std, torch.float32 of shape ({n},), since the actions of {self._info.id} are "
                f"continuous, but got {_kind_of(log_std)}. Set self.log_std = nn.Parameter(torch.zeros({n}))."
            )

    def draws_in_train_mode(self) -> bool:
        """Whether train mode draws from torch's rng. Running statistics are restored."""
        kept = [buffer.clone() for buffer in self._network.buffers()]
        self._network.train()
        before = self._rng_state()
        found = self.outputs(3)
        draws = not torch.equal(before, self._rng_state())
        self._network.eval()
        with torch.no_grad():
            for buffer, value in zip(self._network.buffers(), kept, strict=True):
                buffer.copy_(value)
        if not any(output.requires_grad for output in found.values()):
            self._refuse("must have a parameter that its outputs depend on and that requires a gradient.")
        return draws

    def _rng_state(self) -> Tensor:
        cuda = self._device.type == "cuda"
        return torch.cuda.get_rng_state(self._device) if cuda else torch.get_rng_state()

    def _call(self, name: str, obs: Tensor) -> Any:
        method = getattr(self._network, name, None)
        if not callable(method):
            self._refuse(f"must have a method {name}(obs).")
        try:
            return method(obs)
        except Exception as error:
            raise UserError(
                f"`model`, a {type(self._network).__name__}, must take observations {_kind_of(obs)} of "
                f"{self._info.id}, but {name}(obs) raised {_line(error)}."
            ) from error

    def _refuse(self, rule: str) -> NoReturn:
        raise UserError(f"`model`, a {type(self._network).__name__}, {rule}")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _kind_of(output: Any) -> str:
    return (
        f"{output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"{output!r:.100}"
    )

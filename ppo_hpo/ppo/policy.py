"""A trained policy by itself: from raw observations to actions that an environment's ``step`` takes.

A policy file is a safetensors file with the format, the checks and the bounds of a checkpoint
(`ppo_hpo.state.checkpoint`). It holds weights and the normaliser's statistics as arrays, hyperparameters and
the description of the environment as plain data. Loading it runs no code of its author, and imports no
environment.

    from ppo_hpo import load_policy
    policy = load_policy("policy.safetensors")
    action = policy.act(observation)
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_hpo.envs.make import EnvInfo, probe
from ppo_hpo.envs.take import Intake
from ppo_hpo.ppo.agent import build_network, build_normalizer
from ppo_hpo.ppo.device import resolve_device, torch_threads
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.networks import after_convolutions
from ppo_hpo.ppo.normalize import EPSILON
from ppo_hpo.spec.config import TrialConfig, without_effectless
from ppo_hpo.spec.errors import CheckpointError, MachineError, UserError
from ppo_hpo.state.checkpoint import MAX_BYTES, Checkpoint, Storage, from_bytes, to_bytes
from ppo_hpo.state.files import read_bytes, write_atomically

_KIND = "policy"
_MODEL, _NORMALIZER = "model.", "observation_normalizer."
_MAX_SIZE = 1 << 24
# Subdirectory of the first seed, where a trial has several.
_FIRST_SEED = "seed-1"


class Policy(nn.Module):
    """Takes the most probable action for each observation; it contains the normaliser of training.

    `act` is for playing. It takes numpy observations and returns what ``env.step`` takes, by the same code
    that evaluated the trial. `forward` is the same as a torch module, for batches on any device and for
    export. Its actions differ from those of `act` by rounding.

    Attributes:
        config: hyperparameters of the trial.
        info: description of the environment, as it was when the policy was exported.
        epoch: epochs that the policy was trained for.
        network: actor and critic, with `policy`, `value` and, for continuous actions, `log_std`.
    """

    _mean: Tensor
    _scale: Tensor
    _low: Tensor
    _high: Tensor

    def __init__(
        self,
        config: TrialConfig,
        info: EnvInfo,
        epoch: int,
        arrays: Mapping[str, NDArray[Any]],
        device: str | torch.device = "cpu",
    ) -> None:
        """Build the network and load its weights.

        Args:
            config: hyperparameters of the trial.
            info: description of the environment.
            epoch: epochs that the policy was trained for.
            arrays: ``model.*`` and ``observation_normalizer.*`` of a checkpoint.
            device: device that `forward` and `act` compute on.

        Raises:
            KeyError: an array is missing.
            ValueError: an array has another shape.
        """
        super().__init__()
        self.config, self.info, self.epoch = config, info, epoch
        self._intake = Intake(info)
        self._normalizer = build_normalizer(config, info)
        moments = self._normalizer.moments.state()
        for name, array in moments.items():
            moments[name] = _array_of(arrays, f"{_NORMALIZER}{name}", array.shape)
        self._normalizer.moments.load(moments)
        _refuse_other_sizes(config, info, arrays)
        network = build_network(config, info, blank=True)
        own = network.state_dict()
        for name, tensor in own.items():
            array = _array_of(arrays, f"{_MODEL}{name}", tuple(tensor.shape))
            own[name] = torch.from_numpy(np.array(array))
        network.load_state_dict(own)
        self.network = network.to(resolve_device(device))
        self._learner = self._learner_of(network)
        mean, scale = self._normalizer.moments.mean, np.sqrt(self._normalizer.moments.var + EPSILON)
        for name, values in (("_mean", mean), ("_scale", scale), ("_low", info.low), ("_high", info.high)):
            buffer = torch.from_numpy(np.array(values)).to(self._learner.device)
            self.register_buffer(name, buffer, persistent=False)

    def _learner_of(self, network: nn.Module) -> Learner:
        config, device = self.config, next(network.parameters()).device
        return Learner(network, config.optimizer, config.ppo, device, continuous=self.info.continuous)

    def extra_repr(self) -> str:
        """The environment and the epochs, for ``repr``."""
        return f"{self.info.id}, {self.info.kind} actions, {self.epoch} epochs"

    def act(self, observation: Any) -> Any:
        """The action that ``env.step`` takes; for a batch ``[N, ...]`` an array of N actions.

        Args:
            observation: raw observation, or a batch of raw observations.

        Raises:
            UserError: the observation has another shape.
        """
        shape = self.info.obs_shape
        obs = np.asarray(observation)
        if obs.shape != shape and obs.shape[1:] != shape:
            raise UserError(
                f"An observation of {self.info.id} must have the shape {shape}, or in a batch (N, ...) "
                f"with N of them, but got {obs.shape}."
            )
        one = obs.shape == shape
        obs = np.asarray(self._intake.observation(obs, None if one else len(obs)), self.info.obs_dtype)
        if not self._learner.optimizer.attached():  # after `Policy.to`, for example
            self._learner = self._learner_of(self.network)
        with torch_threads(self.config.task.threads):
            actions = self._learner.act(self._normalizer(obs[None] if one else obs), None)
        found = self.info.to_env(actions)
        return found[0] if one else np.array(found)

    def forward(self, observations: Tensor) -> Tensor:
        """Actions ``[N]`` or ``[N, *action_shape]`` for a batch of raw observations ``[N, ...]``."""
        info, rules = self.info, self.config.normalize
        obs = observations
        if rules.norm_obs:
            scaled = (obs.double() - self._mean) / self._scale
            obs = scaled if rules.clip_obs is None else scaled.clamp(-rules.clip_obs, rules.clip_obs)
        output: Tensor = self.network.policy(obs if info.images else obs.float())  # type: ignore[operator]
        if not info.continuous:
            return output.argmax(-1) + info.first_action
        bounded = torch.maximum(torch.minimum(output, self._high), self._low).to(self._low.dtype)
        return bounded.reshape(-1, *info.action_shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a policy file for `load_policy`.

        Args:
            path: file to write; an existing file is replaced.

        Raises:
            UserError: the file cannot be written.
        """
        weights, moments = self.network.state_dict(), self._normalizer.moments.state()
        arrays = {f"{_MODEL}{name}": tensor.detach().cpu().numpy() for name, tensor in weights.items()}
        arrays |= {f"{_NORMALIZER}{name}": array for name, array in moments.items()}
        hyperparameters, interface = self.config.identity_mapping(), _to_plain(self.info)
        meta = {"kind": _KIND, "hyperparameters": hyperparameters, "interface": interface}
        write_atomically(Path(path), to_bytes(Checkpoint(self.epoch, arrays, meta)))

    def save_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write `forward` in ONNX: input ``observations [N, ...]``, output ``actions``, for any N.

        Args:
            path: file to write; an existing file is replaced.

        Raises:
            UserError: the packages of ``ppo-hpo[onnx]`` are missing, or the file cannot be written.
        """
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise MachineError(
                f"ONNX needs a package that is not installed ({error}). Install it with: "
                f"pip install 'ppo-hpo[onnx]'"
            ) from None
        # The exporter warns about its own parts, and about packages that nothing here uses.
        log = logging.getLogger("torch.onnx")
        level = log.level
        log.setLevel(logging.ERROR)
        example = torch.from_numpy(np.zeros((2, *self.info.obs_shape), self.info.obs_dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program = torch.onnx.export(
                    self, (example.to(self._learner.device),), dynamo=True, verbose=False,
                    input_names=["observations"], output_names=["actions"],
                    dynamic_shapes=({0: torch.export.Dim("N")},),
                )  # fmt: skip
            finally:
                log.setLevel(level)
        assert program is not None
        write_atomically(Path(path), program.model_proto.SerializeToString())


def load_policy(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Policy:
    """Read a policy that `Policy.save` or ``ppo-hpo best --policy`` wrote.

    Args:
        path: policy file.
        device: device that the policy computes on.

    Raises:
        CheckpointError: the file is torn, cannot be read, or is not a policy.
        UserError: there is no such device.
    """
    found = from_bytes(read_bytes(Path(path), MAX_BYTES), str(path))
    if found.meta.get("kind") != _KIND:
        raise CheckpointError(
            f"{path} is a checkpoint, not a policy. Use ppo_hpo.export_policy on the trial's directory."
        )
    try:
        config = TrialConfig.from_mapping(without_effectless(found.meta["hyperparameters"]))
        return Policy(config, _from_plain(found.meta["interface"]), found.epoch, found.arrays, device)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError) and not isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a policy that this ppo_hpo can read: {error}.") from None


def export_policy(
    directory: str | os.PathLike[str], path: str | os.PathLike[str], epoch: int | None = None
) -> Policy:
    """Write the policy of a trial's newest checkpoint to a file, as ONNX if its name ends in ``.onnx``.

    The environment is made once, to describe it. A trial of several seeds gives the policy of the first.

    Args:
        directory: directory of the trial.
        path: file to write; an existing file is replaced.
        epoch: epoch that the checkpoint must be of; None takes the newest.

    Returns:
        The policy.

    Raises:
        UserError: there is no usable checkpoint, the environment cannot be made, or the file cannot be
            written.
    """
    policy = _newest_policy(Path(directory), epoch)
    if str(path).endswith(".onnx"):
        policy.save_onnx(path)
    else:
        policy.save(path)
    return policy


def _newest_policy(directory: Path, epoch: int | None) -> Policy:
    place = directory / _FIRST_SEED if (directory / _FIRST_SEED).is_dir() else directory
    found = Storage(place).load(lambda checkpoint: _refuse_other_epochs(checkpoint, epoch, place))
    if found is None:
        raise UserError(
            f"{place} has no checkpoint. `ppo-hpo clean` keeps only those of the best trials. To train the "
            f"trial again run `ppo-hpo run --config {directory / 'config.yaml'} --dir {directory}`."
        )
    try:
        config = TrialConfig.from_mapping(without_effectless(found.meta["hyperparameters"]))
        return Policy(config, probe(config.env), found.epoch, found.arrays)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise CheckpointError(f"The checkpoint in {place} does not fit its environment: {error}.") from None


def _refuse_other_sizes(config: TrialConfig, info: EnvInfo, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Refuse arrays that do not fit the network, before it is built: it could need much memory."""
    model, shapes = config.model, dict[str, tuple[int, ...]]()
    if info.images:
        height, width = info.obs_shape[:2] if info.channels_last else info.obs_shape[1:]
        pixels = after_convolutions(height) * after_convolutions(width)
        shapes["dense.1.weight"] = model.features_dim, 64 * pixels
        shapes["policy_head.weight"] = info.action_dim, model.features_dim
    else:
        for name, outputs in (("actor", info.action_dim), ("critic", 1)):
            sizes = [info.obs_dim, *[model.width] * model.depth, outputs]
            for index in range(model.depth + 1):
                shapes[f"{name}.{2 * index}.weight"] = sizes[index + 1], sizes[index]
    for name, shape in shapes.items():
        _array_of(arrays, f"{_MODEL}{name}", shape)


def _array_of(arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if arrays[name].shape != shape:
        raise ValueError(f"{name} has shape {arrays[name].shape}, but {shape} is needed")
    return arrays[name]


def _refuse_other_epochs(checkpoint: Checkpoint, epoch: int | None, place: Path) -> None:
    if epoch not in (None, checkpoint.epoch):
        raise CheckpointError(f"{place} has a checkpoint of epoch {checkpoint.epoch}, not of {epoch}.")


def _to_plain(info: EnvInfo) -> dict[str, Any]:
    """The description of an environment as JSON can hold it; an infinite bound is null."""

    def bounds(values: NDArray[Any]) -> list[float | None]:
        return [float(value) if math.isfinite(value) else None for value in values]

    dtypes = {name: np.dtype(getattr(info, name)).name for name in ("obs_dtype", "action_dtype")}
    return vars(info) | dtypes | {"low": bounds(info.low), "high": bounds(info.high)}


def _from_plain(plain: Mapping[str, Any]) -> EnvInfo:
    """Read and check what `_to_plain` returned; it may come from anybody."""
    obs_dtype, action_dtype = _dtype(plain["obs_dtype"]), _dtype(plain["action_dtype"])
    obs_shape, action_shape = _shape(plain["obs_shape"]), _shape(plain["action_shape"])
    kind, dim = plain["kind"], plain["action_dim"]
    low, high = plain["low"], plain["high"]
    if kind not in ("discrete", "continuous") or len(obs_shape) not in (1, 3):
        raise ValueError(f"actions are {kind!r}, observations have the shape {obs_shape}")
    continuous = kind == "continuous"
    sizes = {len(low), len(high), math.prod(action_shape)} if continuous else {dim}
    if type(dim) is not int or not 0 < dim <= _MAX_SIZE or sizes != {dim}:
        raise ValueError(f"`action_dim` is {dim!r}, which does not fit the bounds and the shape of actions")
    if continuous and action_dtype.kind != "f":
        raise ValueError(f"continuous actions cannot be {action_dtype}")

    def bounds(values: list[float | None], infinite: float) -> NDArray[Any]:
        return np.array([infinite if v is None else float(v) for v in values], action_dtype)

    return EnvInfo(
        str(plain["id"]), obs_shape, obs_dtype, kind, dim, action_shape, int(plain["first_action"]),
        low=bounds(low, -math.inf) if continuous else np.zeros(0),
        high=bounds(high, math.inf) if continuous else np.zeros(0),
        action_dtype=action_dtype,
        time_limit=None if plain["time_limit"] is None else int(plain["time_limit"]),
    )  # fmt: skip


def _shape(sides: Any) -> tuple[int, ...]:
    if not isinstance(sides, list) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"a shape must be a list of whole numbers, but got {sides!r}")
    if math.prod(sides) > _MAX_SIZE:
        raise ValueError(f"a shape must have at most {_MAX_SIZE} entries, but got {sides!r}")
    return tuple(sides)


def _dtype(name: Any) -> np.dtype[Any]:
    found = np.dtype(str(name))
    if found.kind not in "fiub":
        raise ValueError(f"numbers cannot be {name!r}")
    return found

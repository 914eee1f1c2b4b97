"""Making environments, and checking that they are supported."""

from __future__ import annotations

import copy
import inspect
import math
import os
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.envs.take import Intake, check_form, is_finite
from ppo_hpo.spec.config import EnvConfig, ModelConfig, TrialConfig
from ppo_hpo.spec.errors import EnvironmentFault, MachineError, NotFinite, UserError

if TYPE_CHECKING:
    import gymnasium

_SUPPORTED = (
    "Supported are Box observations of one dimension, images (Box of uint8 from 0 to 255 with three "
    "dimensions, channels first or last), and Discrete or Box actions."
)
# The three convolutions of the image network leave one pixel of an image of this size.
_SMALLEST_IMAGE = 36


@dataclass(frozen=True)
class EnvInfo:
    """Description of an environment, as networks and training need it."""

    id: str  # gymnasium's, as the user typed it
    obs_shape: tuple[int, ...]  # (D,), or (H, W, C) or (C, H, W) for an image
    obs_dtype: Any  # of the observation space
    kind: Literal["discrete", "continuous"]  # of the actions
    action_dim: int  # A, number of discrete actions or dimensions of a continuous one
    action_shape: tuple[int, ...]  # of an action that `step` takes; () where actions are discrete
    first_action: int  # smallest discrete action; 0 where actions are continuous
    low: NDArray[Any]  # [A] lower bounds of a continuous action; empty where actions are discrete
    high: NDArray[Any]  # [A] upper bounds, likewise
    action_dtype: Any  # of the action space
    time_limit: int | None  # most steps of an episode, or None where there is no limit

    @property
    def obs_dim(self) -> int:
        """D, entries of an observation."""
        return math.prod(self.obs_shape)

    @property
    def images(self) -> bool:
        """Whether observations are images."""
        return len(self.obs_shape) == 3

    @property
    def channels_last(self) -> bool:
        """Whether an image is ``(H, W, C)``: channels are fewer than rows and columns."""
        return self.obs_shape[-1] <= self.obs_shape[0]

    @property
    def continuous(self) -> bool:
        """Whether actions are continuous."""
        return self.kind == "continuous"

    def to_env(self, actions: NDArray[Any]) -> list[Any]:
        """Actions of a policy, ``[N]`` or ``[N, A]``, as a list of what each environment's ``step`` takes."""
        if self.kind == "discrete":
            chosen = actions + self.first_action
            # Integers of the type that the space samples.
            return list(chosen if chosen.dtype is self.action_dtype else chosen.astype(self.action_dtype))
        return list(self.clipped(actions))

    def clipped(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Continuous actions ``[N, A]``, clipped to the bounds (detail 27), as ``[N, *action_shape]``.

        Only the environment sees the clipped action: the update uses the sampled one.
        """
        if not is_finite(actions):
            raise NotFinite(f"The policy gives actions that are not finite: {actions.tolist()!r:.200}.")
        bounded: NDArray[Any] = np.clip(actions, self.low, self.high).astype(self.action_dtype)
        return bounded.reshape(len(actions), *self.action_shape)


def make(config: EnvConfig, *, evaluation: bool = False) -> gymnasium.Env[Any, Any]:
    """Make one environment.

    With `env.wrapper: atari` the episodes of ``evaluation`` are whole games with their own rewards.
    """
    if config.wrapper == "none":
        return _make(config, options_of(config))
    from ppo_hpo.envs.atari import Atari, game_options

    env = _make(config, game_options(config.kwargs))
    if not hasattr(env.unwrapped, "ale"):
        env.close()
        raise UserError(_NO_GAME.format(config.id))
    return Atari(env, training=not evaluation, max_steps=config.max_episode_steps)


def make_several(config: EnvConfig, n: int, *, evaluation: bool = False) -> list[gymnasium.Env[Any, Any]]:
    """Make ``n`` environments. If one of them fails, those before it are closed."""
    envs: list[gymnasium.Env[Any, Any]] = []
    try:
        for _ in range(n):
            env = make(config, evaluation=evaluation)
            envs.append(env)
            if _is_gymnasiums_own(env):
                _speed_up_contains(env.action_space)
    except BaseException:
        close_all(envs)
        raise
    return envs


def _is_gymnasiums_own(env: Any) -> bool:
    """Whether an environment and all its wrappers are classes of gymnasium's: nobody sees a change then."""
    while type(env).__module__.startswith("gymnasium."):
        if env is env.unwrapped:
            return True
        env = env.env
    return False


def _speed_up_contains(space: Any) -> None:
    """Make the method `contains` of a `Discrete` space faster; its answers stay the same.

    gymnasium's environments assert in each step that the space contains the action, which takes a quarter of
    a step of CartPole. The object is kept, because it has an rng of its own.
    """
    from gymnasium.spaces import Discrete

    class QuickDiscrete(Discrete):
        def contains(self, x: Any) -> bool:
            if type(x) is np.int64 and self.start <= x < self.start + self.n:
                return True
            return super().contains(x)

    if type(space) is Discrete:
        space.__class__ = QuickDiscrete


def close_all(envs: Iterable[gymnasium.Env[Any, Any]]) -> BaseException | None:
    """Close environments, and return what the first one raised that failed to close."""
    first: BaseException | None = None
    for env in envs:
        try:
            env.close()
        except (Exception, SystemExit) as failure:
            first = first or failure
    return first


def options_of(config: EnvConfig) -> dict[str, Any]:
    """Arguments with which gymnasium makes an environment: copies, which it may change."""
    limit = config.max_episode_steps
    return copy.deepcopy(dict(config.kwargs)) | ({} if limit is None else {"max_episode_steps": limit})


def _make(config: EnvConfig, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    import gymnasium
    from gymnasium import error

    from ppo_hpo.envs import atari

    try:
        atari.register(config.id)
        # gymnasium's checker inspects every single step. `probe` checks once what matters here.
        return gymnasium.make(config.id, disable_env_checker=True, **options)
    except error.DependencyNotInstalled as failure:
        raise MachineError(
            f"`env.id: {config.id}` needs a package that is not installed ({_line(failure)}). "
            f"{_extra_for(config.id)}"
        ) from None
    except (error.UnregisteredEnv, error.Error) as failure:
        raise MachineError(
            f"`env.id: {config.id}` cannot be made ({_line(failure)}). Name an environment of your own as "
            f"module:EnvId, where importing the module registers it. What a script or a notebook registers "
            f"exists only there."
        ) from None
    except ModuleNotFoundError as failure:
        # For a `module:EnvId` gymnasium raises an error without a name from the one that has it.
        name = getattr(failure.__cause__, "name", None) or failure.name
        raise MachineError(
            f"`env.id: {config.id}` needs the module {name!r}, which is not installed or "
            f"not on the path. {_extra_for(config.id)}"
        ) from None
    except SystemExit as stop:
        raise EnvironmentFault(
            f"`env.id: {config.id}` ended the process ({stop!r}) as it was imported or made. Its module must "
            f"not call sys.exit or parse_args: put such calls under `if __name__ == '__main__':`."
        ) from stop
    except TypeError as failure:
        raise _of_type_error(config, options, failure) from failure.__cause__
    except Exception as failure:
        if not config.kwargs:  # the mistake is the environment's own, so its traceback helps
            raise
        package = os.path.dirname(inspect.getfile(gymnasium))
        inside = traceback.extract_tb(failure.__traceback__)[-1].filename.startswith(package)
        # A traceback of somebody else's code helps its author; gymnasium's own has wrong arguments only.
        kind = UserError if inside else EnvironmentFault
        raise kind(
            f"`env.id: {config.id}` cannot be made with `env.kwargs: {dict(config.kwargs)}`: "
            f"{type(failure).__name__}: {_line(failure)}."
        ) from failure


def _of_type_error(config: EnvConfig, options: dict[str, Any], failure: TypeError) -> Exception:
    """What a TypeError of `gymnasium.make` means: a wrong argument, no environment, or its own error."""
    import gymnasium

    own = failure.__cause__ or failure  # gymnasium raises another one, with its arguments in the text
    text = _line(own)
    if config.wrapper == "atari" and any(f"'{name}'" in text for name in ("frameskip", "obs_type")):
        return UserError(_NO_GAME.format(config.id))
    if "must inherit from the gymnasium.Env" in text or "Gym is incompatible with Gymnasium" in text:
        return EnvironmentFault(f"`env.id: {config.id}` is no environment of gymnasium's: {text}.")
    frames = traceback.extract_tb(own.__traceback__)
    if frames[-1].filename == inspect.getsourcefile(gymnasium.make) or any(
        f"unexpected keyword argument '{name}'" in text for name in options
    ):
        return UserError(f"`env.id: {config.id}` does not take `env.kwargs: {dict(config.kwargs)}`: {text}.")
    return failure


_NO_GAME = (
    "`env.wrapper: atari` needs a game of the Arcade Learning Environment, such as ALE/Pong-v5, but "
    "`env.id: {}` is not one. Set env.wrapper to none."
)


def probe(config: EnvConfig) -> EnvInfo:
    """Make an environment, describe it, look at its first step and close it; an error says what is wrong."""
    env = make(config)
    try:
        info = _describe(config, env)
        _check_arguments_of_reset(info.id, env)
        try:
            _look(env, info)
        except Exception:
            # A wrapper of gymnasium's may have stumbled over what the environment itself returns.
            _look_inside(env.unwrapped, info)
            raise
        return info
    finally:
        close_all([env])


def _look(env: gymnasium.Env[Any, Any], info: EnvInfo) -> None:
    """Reset an environment, take one step in it, and check what it returned."""
    intake = Intake(info)
    first = intake.reset(env.reset(seed=0))
    intake.check_finite(np.array(first, info.obs_dtype))
    obs, reward, _, _ = intake.step(env.step(_first_action(info)))
    intake.check_finite(np.array(obs, info.obs_dtype), np.array(reward))


def _first_action(info: EnvInfo) -> Any:
    zeros = np.zeros((1, info.action_dim), np.float32) if info.continuous else np.zeros(1, np.int64)
    return info.to_env(zeros)[0]


def _look_inside(env: gymnasium.Env[Any, Any], info: EnvInfo) -> None:
    """Raise an EnvironmentFault if an unwrapped environment returns tuples of another length."""
    for name, call in (("reset", lambda: env.reset(seed=0)), ("step", lambda: env.step(_first_action(info)))):
        try:
            returned: Any = call()
        except Exception:
            return
        check_form(info.id, name, returned)


def _check_arguments_of_reset(name: str, env: gymnasium.Env[Any, Any]) -> None:
    try:
        arguments = inspect.signature(env.unwrapped.reset).parameters
    except (TypeError, ValueError):
        return
    if any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values()):
        return
    for argument in ("seed", "options"):
        if argument not in arguments:
            raise EnvironmentFault(
                f"`env.id: {name}` has a `reset` without the argument `{argument}`, as in the old package "
                f"gym. It must be `reset(self, *, seed=None, options=None)`. Fix the environment."
            )


def check_hyperparameters_fit(config: TrialConfig, info: EnvInfo, *, own_network: bool = False) -> None:
    """Refuse hyperparameters that would have no effect on this environment's observations.

    A network of the caller's own (``own_network``) has its own hyperparameters.
    """
    if info.images and config.normalize.norm_obs:
        raise UserError(
            f"`normalize.norm_obs` is for vectors, but `env.id: {info.id}` has images, which the network "
            f"divides by 255. Set norm_obs to false."
        )
    if own_network:
        return
    _check_reach(config, info)
    model, default = config.model, ModelConfig()
    without_effect = ["features_dim"]
    where, use = "observations are vectors", " Set model.width for the network's size."
    if info.images:
        without_effect = ["width", "depth", "activation"]
        where, use = "observations are images", " Set model.features_dim for the network's size."
    reasons = [(name, where, use) for name in without_effect]
    if not info.continuous:
        reasons.append(("log_std_init", "actions are discrete", ""))
    for name, where, use in reasons:
        if getattr(model, name) != getattr(default, name):
            raise UserError(
                f"`model.{name}` has no effect where {where}, as those of `env.id: {info.id}` are, but got "
                f"{getattr(model, name)!r}. Leave it out.{use}"
            )


def _check_reach(config: TrialConfig, info: EnvInfo) -> None:
    """Refuse bounds of actions that the untrained policy never acts between, so that all are the same."""
    far = 4.0 * math.exp(config.model.log_std_init)  # standard deviations: one action in 30,000
    if (info.low > far).any() or (info.high < -far).any():
        raise UserError(
            f"`env.id: {info.id}` has actions from {info.low.min():g} to {info.high.max():g}, but an "
            f"untrained policy acts around 0, with the standard deviation {far / 4:g}: each of its actions "
            f"would be clipped to the same bound. Wrap the environment in "
            f"gymnasium.wrappers.RescaleAction(env, -1, 1)."
        )


def narrow_reach(config: TrialConfig, info: EnvInfo) -> str | None:
    """A warning if the untrained policy reaches only a small part of the range of an action."""
    std = math.exp(config.model.log_std_init)
    width = np.where(np.isfinite(info.high - info.low), info.high - info.low, std)
    if not info.continuous or (width <= 40 * std).all():
        return None
    return (
        f"{info.id} has actions from {info.low.min():g} to {info.high.max():g}, but an untrained policy acts "
        f"around 0, with the standard deviation {std:g}; gymnasium.wrappers.RescaleAction(env, -1, 1) brings "
        f"the whole range within its reach"
    )


def _describe(config: EnvConfig, env: gymnasium.Env[Any, Any]) -> EnvInfo:
    from gymnasium import spaces

    _check_observations(config.id, getattr(env, "observation_space", None))
    shape, dtype = env.observation_space.shape, env.observation_space.dtype
    assert shape is not None
    limit = None if env.spec is None else env.spec.max_episode_steps
    if config.wrapper == "atari":
        limit = env.time_limit  # type: ignore[attr-defined]
    actions, none = getattr(env, "action_space", None), np.zeros(0)
    if isinstance(actions, spaces.Discrete):
        return EnvInfo(
            config.id, shape, dtype, "discrete", int(actions.n), action_shape=(), low=none, high=none,
            first_action=int(actions.start), action_dtype=actions.dtype, time_limit=limit,
        )  # fmt: skip
    if isinstance(actions, spaces.Box) and np.issubdtype(actions.dtype, np.floating):
        low, high = actions.low.reshape(-1), actions.high.reshape(-1)
        if not low.size or not (low <= high).all():
            raise UserError(
                f"`env.id: {config.id}` has the action space {actions}, but an action must have at least one "
                f"dimension, and `low <= high` must hold in each. Fix the environment."
            )
        return EnvInfo(
            config.id, shape, dtype, "continuous", len(low), action_shape=actions.shape, first_action=0,
            low=low, high=high, action_dtype=actions.dtype, time_limit=limit,
        )  # fmt: skip
    raise UserError(f"`env.id: {config.id}` has the action space {actions}. {_SUPPORTED}")


def _check_observations(name: str, space: gymnasium.Space[Any] | None) -> None:
    """Refuse an observation space that no network takes."""
    from gymnasium import spaces

    shape: tuple[int, ...] = space.shape if isinstance(space, spaces.Box) else ()
    images = (
        isinstance(space, spaces.Box)
        and len(shape) == 3
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
    )
    if 0 in shape:
        raise UserError(
            f"`env.id: {name}` has the observation space {space}, but an observation must have at least one "
            f"number. Fix the environment."
        )
    if not images and len(shape) != 1:
        raise UserError(
            f"`env.id: {name}` has the observation space {space}. {_SUPPORTED} "
            f"gymnasium.wrappers.FlattenObservation turns most others into a vector."
        )
    if images and sorted(shape)[1] < _SMALLEST_IMAGE:
        raise UserError(
            f"`env.id: {name}` has images of shape {shape}, but their height and width must be "
            f"{_SMALLEST_IMAGE} or more for the convolutions. Enlarge the images, or flatten them with "
            f"gymnasium.wrappers.FlattenObservation."
        )


def _line(failure: BaseException) -> str:
    return " ".join(str(failure).split()).rstrip(".")


def _extra_for(name: str) -> str:
    import gymnasium

    spec = gymnasium.registry.get(name)
    entry = str(spec.entry_point) if spec is not None else name
    for extra, marks in (
        ("box2d", ("box2d",)),
        ("mujoco", ("mujoco",)),
        ("classic-control", ("classic_control",)),
        ("atari", ("ALE/", "ale_py", "NoFrameskip")),
    ):
        if any(mark in entry or mark in name for mark in marks):
            return f"Install it with: pip install 'ppo-hpo[{extra}]'"
    return "Install the package that has it."

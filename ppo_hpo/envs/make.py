"""Making environments, and checking that they are supported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.spec.config import EnvConfig, ModelConfig, TrialConfig
from ppo_hpo.spec.errors import MachineError, UserError

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
            return list(actions + self.first_action)
        return list(self.clipped(actions))

    def clipped(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Continuous actions ``[N, A]``, clipped to the bounds (detail 27), as ``[N, *action_shape]``.

        Only the environment sees the clipped action: the update uses the sampled one.
        """
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


def options_of(config: EnvConfig) -> dict[str, Any]:
    """Arguments with which gymnasium makes an environment."""
    limit = config.max_episode_steps
    return dict(config.kwargs) | ({} if limit is None else {"max_episode_steps": limit})


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
    except TypeError as failure:
        if config.wrapper == "atari" and any(
            f"'{name}'" in str(failure) for name in ("frameskip", "obs_type")
        ):
            raise UserError(_NO_GAME.format(config.id)) from None
        raise UserError(
            f"`env.id: {config.id}` does not take `env.kwargs: {dict(config.kwargs)}`: {_line(failure)}."
        ) from None
    except Exception as failure:
        if not config.kwargs:  # the mistake is the environment's own, so its traceback helps
            raise
        raise UserError(
            f"`env.id: {config.id}` cannot be made with `env.kwargs: {dict(config.kwargs)}`: "
            f"{type(failure).__name__}: {_line(failure)}."
        ) from failure


_NO_GAME = (
    "`env.wrapper: atari` needs a game of the Arcade Learning Environment, such as ALE/Pong-v5, but "
    "`env.id: {}` is not one. Set env.wrapper to none."
)


def probe(config: EnvConfig) -> EnvInfo:
    """Make an environment, describe it and close it; a UserError says what is not supported."""
    env = make(config)
    try:
        info = _describe(config, env)
        # numpy would silently spread a shorter observation over the whole row.
        shape = np.shape(env.reset(seed=0)[0])
        if shape != info.obs_shape:
            raise UserError(
                f"`env.id: {config.id}` promises observations of shape {info.obs_shape}, but its reset "
                f"gave {shape}. Fix the environment or its observation space."
            )
        return info
    finally:
        env.close()


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
    model, default = config.model, ModelConfig()
    names = ("width", "depth", "activation") if info.images else ("features_dim",)
    for name in names:
        if getattr(model, name) != getattr(default, name):
            has, use = ("images", "model.features_dim") if info.images else ("vectors", "model.width")
            raise UserError(
                f"`model.{name}` has no effect where observations are {has}, as those of `env.id: {info.id}` "
                f"are, but got {getattr(model, name)!r}. Leave it out, and set {use} for the network's size."
            )


def _describe(config: EnvConfig, env: gymnasium.Env[Any, Any]) -> EnvInfo:
    from gymnasium import spaces

    _check_observations(config.id, env.observation_space)
    shape, dtype = env.observation_space.shape, env.observation_space.dtype
    assert shape is not None
    limit = None if env.spec is None else env.spec.max_episode_steps
    if config.wrapper == "atari":
        limit = env.time_limit  # type: ignore[attr-defined]
    actions, none = env.action_space, np.zeros(0)
    if isinstance(actions, spaces.Discrete):
        return EnvInfo(
            config.id, shape, dtype, "discrete", int(actions.n), action_shape=(), low=none, high=none,
            first_action=int(actions.start), action_dtype=actions.dtype, time_limit=limit,
        )  # fmt: skip
    if isinstance(actions, spaces.Box) and np.issubdtype(actions.dtype, np.floating):
        low, high = actions.low.reshape(-1), actions.high.reshape(-1)
        return EnvInfo(
            config.id, shape, dtype, "continuous", len(low), action_shape=actions.shape, first_action=0,
            low=low, high=high, action_dtype=actions.dtype, time_limit=limit,
        )  # fmt: skip
    raise UserError(f"`env.id: {config.id}` has the action space {actions}. {_SUPPORTED}")


def _check_observations(name: str, space: gymnasium.Space[Any]) -> None:
    """Refuse an observation space that no network takes."""
    from gymnasium import spaces

    shape: tuple[int, ...] = space.shape if isinstance(space, spaces.Box) else ()
    images = (
        isinstance(space, spaces.Box)
        and len(shape) == 3
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
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

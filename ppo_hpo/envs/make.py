"""Environments: made, and checked."""

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
# What the three convolutions of the image network leave at least one pixel of.
_SMALLEST_IMAGE = 36


@dataclass(frozen=True)
class EnvInfo:
    """What the networks and the loop need to know of an environment.

    Attributes:
        id: as asked for.
        obs_shape: of an observation: ``(D,)``, or of an image ``(H, W, C)`` or ``(C, H, W)``.
        obs_dtype: of its observation space.
        kind: of the actions.
        action_dim: number of discrete actions, or dimensions of a continuous one.
        action_shape: what the environment's ``step`` takes; ``()`` where actions are discrete.
        first_action: the smallest discrete action.
        low: ``[action_dim]`` bounds of a continuous action, else empty.
        high: ``[action_dim]``.
        action_dtype: of what ``step`` takes.
        time_limit: steps of an episode, or None where nothing limits it.
    """

    id: str
    obs_shape: tuple[int, ...]
    obs_dtype: Any
    kind: Literal["discrete", "continuous"]
    action_dim: int
    action_shape: tuple[int, ...]
    first_action: int
    low: NDArray[Any]
    high: NDArray[Any]
    action_dtype: Any
    time_limit: int | None

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
        """Policy actions ``[N]`` or ``[N, A]`` in the environment's own terms, one for each environment."""
        if self.kind == "discrete":
            return list(actions + self.first_action)
        return list(self.clipped(actions))

    def clipped(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Continuous actions ``[N, A]``, clipped to the environment's bounds (detail 27), in its shape.

        Only the environment sees the clipped action: the update uses the one that was sampled.
        """
        bounded: NDArray[Any] = np.clip(actions, self.low, self.high).astype(self.action_dtype)
        return bounded.reshape(len(actions), *self.action_shape)


def make(config: EnvConfig, *, judged: bool = False) -> gymnasium.Env[Any, Any]:
    """Make one environment.

    Args:
        config: which one.
        judged: for evaluation: whole games with their own rewards, where `env.wrapper` makes others of them
            in training.

    Raises:
        UserError: unknown id, missing package, or arguments that the environment does not take.
    """
    if config.wrapper == "none":
        options = dict(config.kwargs)
        if config.max_episode_steps is not None:
            options["max_episode_steps"] = config.max_episode_steps
        return _make(config, options)
    from ppo_hpo.envs.atari import Atari, options_of

    env = _make(config, options_of(dict(config.kwargs)))
    if not hasattr(env.unwrapped, "ale"):
        env.close()
        raise UserError(_NO_GAME.format(config.id))
    return Atari(env, training=not judged, max_steps=config.max_episode_steps)


def _make(config: EnvConfig, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    import gymnasium
    from gymnasium import error

    from ppo_hpo.envs import atari

    try:
        atari.register(config.id)
        # The checker inspects every single step; `probe` checks what matters here, once.
        return gymnasium.make(config.id, disable_env_checker=True, **options)
    except error.DependencyNotInstalled as failure:
        raise MachineError(
            f"`env.id: {config.id}` needs a package that is not installed ({_line(failure)}). "
            f"{_extra_for(config.id)}"
        ) from None
    except (error.UnregisteredEnv, error.Error) as failure:
        raise MachineError(
            f"`env.id: {config.id}` cannot be made ({_line(failure)}). An environment of your own is "
            f"named module:EnvId, where importing the module registers it."
        ) from None
    except ModuleNotFoundError as failure:
        # For a `module:EnvId` gymnasium raises one without a name from the one that has it.
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
        if not config.kwargs:  # nobody's input but the environment's own mistake: its traceback helps
            raise
        raise UserError(
            f"`env.id: {config.id}` cannot be made with `env.kwargs: {dict(config.kwargs)}`: "
            f"{type(failure).__name__}: {_line(failure)}."
        ) from failure


_NO_GAME = (
    "`env.wrapper: atari` needs a game of the Arcade Learning Environment, such as ALE/Pong-v5, but "
    "`env.id: {}` is none. Set env.wrapper to none."
)


def probe(config: EnvConfig) -> EnvInfo:
    """Make an environment once, look at its spaces and close it.

    Raises:
        UserError: it cannot be made, its spaces are not supported, or its first observation does not
            have the shape that its space promises.
    """
    env = make(config)
    try:
        info = _describe(config, env)
        # A shorter observation would be spread over the whole row without a word.
        shape = np.shape(env.reset(seed=0)[0])
        if shape != info.obs_shape:
            raise UserError(
                f"`env.id: {config.id}` promises observations of shape {info.obs_shape}, but its reset "
                f"gave {shape}. Mend the environment or its observation space."
            )
        return info
    finally:
        env.close()


def check_hyperparameters_fit(config: TrialConfig, info: EnvInfo, *, own_network: bool = False) -> None:
    """Refuse hyperparameters that the environment's observations have no use for.

    Raises:
        UserError: one of them is set.
    """
    if info.images and config.normalize.norm_obs:
        raise UserError(
            f"`normalize.norm_obs` is for vectors, but `env.id: {info.id}` has images, which the network "
            f"divides by 255. Set it to false."
        )
    if own_network:
        return
    model, default = config.model, ModelConfig()
    names = ("width", "depth", "activation") if info.images else ("features_dim",)
    for name in names:
        if getattr(model, name) != getattr(default, name):
            has, use = ("images", "model.features_dim") if info.images else ("vectors", "model.width")
            raise UserError(
                f"`model.{name}` means nothing where observations are {has}, as those of `env.id: {info.id}` "
                f"are, but got {getattr(model, name)!r}. Leave it out, and set {use} for the network's size."
            )


def malformed(name: str, what: str, value: Any, promised: str) -> UserError:
    """The error for what an environment gave and must not.

    Args:
        name: the environment's id.
        what: it gave.
        value: of that.
        promised: in its place.
    """
    found = f"shape {np.shape(value)}" if what == "observation" and _has_shape(value) else repr(value)[:200]
    return UserError(
        f"`env.id: {name}` gave the {what} {found} where {promised} is promised. Mend the environment."
    )


def _has_shape(value: Any) -> bool:
    try:
        np.shape(value)
    except ValueError:
        return False
    return True


def _describe(config: EnvConfig, env: gymnasium.Env[Any, Any]) -> EnvInfo:
    from gymnasium import spaces

    name = config.id
    observations, actions = env.observation_space, env.action_space
    shape: tuple[int, ...] = observations.shape if isinstance(observations, spaces.Box) else ()
    images = (
        isinstance(observations, spaces.Box)
        and len(shape) == 3
        and observations.dtype == np.uint8
        and bool((observations.low == 0).all() and (observations.high == 255).all())
    )
    if not images and len(shape) != 1:
        raise UserError(
            f"`env.id: {name}` has the observation space {observations}. {_SUPPORTED} "
            f"gymnasium.wrappers.FlattenObservation turns most others into a vector."
        )
    if images and sorted(shape)[1] < _SMALLEST_IMAGE:
        raise UserError(
            f"`env.id: {name}` has images of shape {shape}, but their height and width must be "
            f"{_SMALLEST_IMAGE} or more for the convolutions. Enlarge them, or flatten them with "
            f"gymnasium.wrappers.FlattenObservation."
        )
    kind: Literal["discrete", "continuous"]
    low = high = np.zeros(0)
    action_shape: tuple[int, ...] = ()
    if isinstance(actions, spaces.Discrete):
        kind, dim, first = "discrete", int(actions.n), int(actions.start)
    elif isinstance(actions, spaces.Box) and np.issubdtype(actions.dtype, np.floating):
        kind, dim, action_shape, first = "continuous", int(np.prod(actions.shape)), actions.shape, 0
        low, high = actions.low.reshape(-1), actions.high.reshape(-1)
    else:
        raise UserError(f"`env.id: {name}` has the action space {actions}. {_SUPPORTED}")
    limit = None if env.spec is None else env.spec.max_episode_steps
    if config.wrapper == "atari":
        limit = env.time_limit  # type: ignore[attr-defined]
    return EnvInfo(
        id=name,
        obs_shape=shape,
        obs_dtype=observations.dtype,
        kind=kind,
        action_dim=dim,
        action_shape=action_shape,
        first_action=first,
        low=low,
        high=high,
        action_dtype=actions.dtype,
        time_limit=limit,
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
    return "Install the package that brings it."

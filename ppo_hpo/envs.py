"""Environments: made, and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.config import EnvConfig
from ppo_hpo.errors import UserError

if TYPE_CHECKING:
    import gymnasium

_SUPPORTED = "Supported are Box observations of one dimension, and Discrete or Box actions."


@dataclass(frozen=True)
class EnvInfo:
    """What the networks and the loop need to know of an environment.

    Attributes:
        id: as asked for.
        obs_dim: D, entries of an observation.
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
    obs_dim: int
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


def make(config: EnvConfig) -> gymnasium.Env[Any, Any]:
    """Make one environment.

    Raises:
        UserError: unknown id, missing package, or arguments that the environment does not take.
    """
    import gymnasium
    from gymnasium import error

    options = dict(config.kwargs)
    if config.max_episode_steps is not None:
        options["max_episode_steps"] = config.max_episode_steps
    try:
        # The checker inspects every single step; `probe` checks what matters here, once.
        return gymnasium.make(config.id, disable_env_checker=True, **options)
    except error.DependencyNotInstalled as failure:
        raise UserError(
            f"`env.id: {config.id}` needs a package that is not installed ({_line(failure)}). "
            f"{_extra_for(config.id)}"
        ) from None
    except (error.UnregisteredEnv, error.Error) as failure:
        raise UserError(
            f"`env.id: {config.id}` cannot be made ({_line(failure)}). An environment of your own is "
            f"named module:EnvId, where importing the module registers it."
        ) from None
    except ModuleNotFoundError as failure:
        # For a `module:EnvId` gymnasium raises one without a name from the one that has it.
        name = getattr(failure.__cause__, "name", None) or failure.name
        raise UserError(
            f"`env.id: {config.id}` needs the module {name!r}, which is not installed or "
            f"not on the path. {_extra_for(config.id)}"
        ) from None
    except TypeError as failure:
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


def probe(config: EnvConfig) -> EnvInfo:
    """Make an environment once, look at its spaces and close it.

    Raises:
        UserError: it cannot be made, its spaces are not supported, or its first observation does not
            have the shape that its space promises.
    """
    env = make(config)
    try:
        info = _describe(config.id, env)
        # A shorter observation would be spread over the whole row without a word.
        shape = np.shape(env.reset(seed=0)[0])
        if shape != (info.obs_dim,):
            raise UserError(
                f"`env.id: {config.id}` promises observations of shape ({info.obs_dim},), but its reset "
                f"gave {shape}. Mend the environment or its observation space."
            )
        return info
    finally:
        env.close()


def _describe(name: str, env: gymnasium.Env[Any, Any]) -> EnvInfo:
    from gymnasium import spaces

    observations, actions = env.observation_space, env.action_space
    if not isinstance(observations, spaces.Box) or len(observations.shape) != 1:
        raise UserError(
            f"`env.id: {name}` has the observation space {observations}. {_SUPPORTED} "
            f"gymnasium.wrappers.FlattenObservation turns most others into a vector."
        )
    kind: Literal["discrete", "continuous"]
    low = high = np.zeros(0)
    shape: tuple[int, ...]
    if isinstance(actions, spaces.Discrete):
        kind, dim, shape, first = "discrete", int(actions.n), (), int(actions.start)
    elif isinstance(actions, spaces.Box) and np.issubdtype(actions.dtype, np.floating):
        kind, dim, shape, first = "continuous", int(np.prod(actions.shape)), actions.shape, 0
        low, high = actions.low.reshape(-1), actions.high.reshape(-1)
    else:
        raise UserError(f"`env.id: {name}` has the action space {actions}. {_SUPPORTED}")
    return EnvInfo(
        id=name,
        obs_dim=int(observations.shape[0]),
        obs_dtype=observations.dtype,
        kind=kind,
        action_dim=dim,
        action_shape=shape,
        first_action=first,
        low=low,
        high=high,
        action_dtype=actions.dtype,
        time_limit=None if env.spec is None else env.spec.max_episode_steps,
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
        ("atari", ("ALE/", "ale_py", "shimmy")),
    ):
        if any(mark in entry or mark in name for mark in marks):
            if extra == "atari":
                return "Atari games have images, which are not supported."
            return f"Install it with: pip install 'ppo-hpo[{extra}]'"
    return "Install the package that brings it."

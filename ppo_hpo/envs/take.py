"""Taking what environments return: one set of rules for the first look, for training and for evaluation.

Nothing is cast silently. What cannot be taken is an `EnvironmentFault`, which names the rule.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.spec.errors import EnvironmentFault, NotFinite

if TYPE_CHECKING:
    from ppo_hpo.envs.make import EnvInfo

_LARGEST = float(np.finfo(np.float32).max)
# A sum of squares below this is one of small numbers: no NaN, and nothing infinite in single precision.
SMALL_SQUARES = 1e38
# Types that need no conversion.
FLOATS, FLAGS = frozenset((float, np.float64)), frozenset((bool, np.bool_))
_RETURNED = {
    "reset": ("observation", "info"), "step": ("observation", "reward", "terminated", "truncated", "info"),
}  # fmt: skip


def is_finite(array: NDArray[Any]) -> bool:
    """Whether all numbers are finite in single precision, which is that of the networks."""
    if array.dtype.kind != "f":
        return True
    if array.dtype.itemsize < 4:
        array = array.astype(np.float32)
    # One pass of BLAS, quicker than isfinite: NaN and infinity survive squares and sums. Large numbers, whose
    # squares overflow, are looked at one by one.
    return bool(np.vdot(array, array) < SMALL_SQUARES or (np.abs(array) <= _LARGEST).all())


def check_form(name: str, method: str, returned: Any) -> None:
    """Raise `EnvironmentFault` unless ``reset`` or ``step`` returned a tuple of gymnasium's form."""
    parts = _RETURNED[method]
    whole = isinstance(returned, tuple | list) and len(returned) == len(parts)
    if whole and (returned[-1] is None or hasattr(returned[-1], "keys")):
        return
    raise EnvironmentFault(
        f"`env.id: {name}` must return ({', '.join(parts)}) from `{method}`, but returned "
        f"{_shown(returned)}. The interface of the old package gym is not supported. Fix the environment."
    )


class Intake:
    """Checks what environments of one kind return, and gives it the types that training needs.

    Only `check_finite` looks for NaN, which is cheaper for the observations of all environments, and for the
    rewards of a whole rollout, at once.
    """

    def __init__(self, info: EnvInfo) -> None:
        self._name, self._shape, self._dtype = info.id, info.obs_shape, info.obs_dtype

    def reset(self, result: Any) -> NDArray[Any]:
        """The observation of what ``reset`` returned."""
        if type(result) is not tuple or len(result) != 2 or type(result[1]) is not dict:
            check_form(self._name, "reset", result)
        return self.observation(result[0])

    def step(self, result: Any) -> tuple[NDArray[Any], float, bool, bool]:
        """Observation, reward, terminated and truncated of what ``step`` returned."""
        if type(result) is not tuple or len(result) != 5:
            check_form(self._name, "step", result)
        obs, reward, terminated, truncated, _ = result
        obs = self.observation(obs)
        if type(reward) not in FLOATS:
            reward = self.reward(reward)
        if type(terminated) not in FLAGS or type(truncated) not in FLAGS:
            terminated, truncated = self._flag("terminated", terminated), self._flag("truncated", truncated)
        return obs, reward, terminated, truncated

    def first_batch(self, obs: Any, n: int) -> NDArray[Any]:
        """Observations ``[N, D]`` of what the ``reset`` of a vector environment returned."""
        found = np.array(self.observation(obs, n), self._dtype)
        self.check_finite(found)
        return found

    def batch(
        self, n: int, obs: Any, reward: Any, terminated: Any, truncated: Any
    ) -> tuple[NDArray[Any], ...]:
        """The four arrays that the ``step`` of a vector environment returned, ``[N, D]`` and ``[N]``."""
        for name, array, kinds in (
            ("rewards", reward, "biuf"), ("terminated", terminated, "b"), ("truncated", truncated, "b")
        ):  # fmt: skip
            if getattr(array, "shape", None) != (n,) or array.dtype.kind not in kinds:
                raise self._malformed(f"{name} {_shown(array)}", f"one for each of {n} environments")
        found, rewards = self.observation(obs, n), np.array(reward, np.float64)
        self.check_finite(found)
        return found, rewards, terminated, truncated

    def observation(self, obs: Any, n: int | None = None) -> NDArray[Any]:
        """An observation, or those of ``n`` environments, as an array that fits the space's dtype.

        Only fractions may be rounded, to the precision of the space: many environments compute in double
        precision and promise single precision.
        """
        shape = self._shape if n is None else (n, *self._shape)
        if type(obs) is np.ndarray and obs.dtype == self._dtype and obs.shape == shape:
            return obs
        found: Any = None
        with contextlib.suppress(Exception):  # numpy's own, or that of another library's array
            found = np.asarray(obs)
        if found is None or found.dtype.kind not in "biuf" or found.shape != shape:
            numbers = found is not None and found.dtype.kind in "biuf"
            what = f"an observation of shape {found.shape}" if numbers else f"the observation {_shown(obs)}"
            raise self._malformed(what, f"{self._dtype} of shape {shape}")
        if self._dtype.kind == "f" or found.dtype == self._dtype:
            return np.asarray(found)
        with np.errstate(invalid="ignore"):
            cast: NDArray[Any] = found.astype(self._dtype)
        if not np.array_equal(cast, found):
            raise self._fault(
                f"returned an observation of {found.dtype} that its space's {self._dtype} cannot hold: "
                f"{_shown(found.tolist())}. Give the observation space the dtype of the observations"
            )
        return cast

    def reward(self, reward: Any) -> float:
        """A reward as a number: a number, or an array of one number."""
        if isinstance(reward, float | int):
            with contextlib.suppress(OverflowError):
                return float(reward)
        return float(self._one_number(reward, f"the reward {_shown(reward)}", "a number"))

    def _flag(self, name: str, flag: Any) -> bool:
        """A flag as true or false: a truth value, 0 or 1, or an array of one of them."""
        if type(flag) in FLAGS:
            return bool(flag)
        found, promised = f"{name}={_shown(flag)}", "true or false"
        number = self._one_number(flag, found, promised)
        if number not in (0, 1):
            raise self._malformed(found, promised)
        return bool(number)

    def _one_number(self, value: Any, found: str, promised: str) -> Any:
        array: Any = None
        with contextlib.suppress(Exception):
            array = np.asarray(value)
        if array is None or array.dtype.kind not in "biuf" or array.size != 1:
            raise self._malformed(found, promised)
        return array.item()

    def check_finite(self, obs: NDArray[Any] | None = None, reward: NDArray[Any] | None = None) -> None:
        """Raise `NotFinite` unless all observations ``[..., D]`` and rewards are finite numbers."""
        if obs is not None and not is_finite(obs):
            bad = next(row for row in obs.reshape(-1, *self._shape) if not is_finite(row))
            raise self._not_finite("observation", bad.tolist())
        if reward is not None and not is_finite(reward):
            raise self._not_finite(
                "reward", next(r for r in reward.reshape(-1).tolist() if not is_finite(np.array(r)))
            )

    def _not_finite(self, what: str, value: Any) -> NotFinite:
        return NotFinite(
            f"`env.id: {self._name}` returned the {what} {_shown(value)}, but it must be finite, and at most "
            f"{_LARGEST:.1e}. Fix the environment."
        )

    def _malformed(self, found: str, promised: str) -> EnvironmentFault:
        return self._fault(f"returned {found}, but it must be {promised}")

    def _fault(self, text: str) -> EnvironmentFault:
        return EnvironmentFault(f"`env.id: {self._name}` {text}. Fix the environment.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

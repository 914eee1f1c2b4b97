"""What `speed.py` trains: one record for each row of its table, the same for ours and for every peer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Rollouts, each with its update, that every contender does before the clock starts. The second one, because
# JAX compiles acting in the first rollout and the update at its end.
WARM_UP = 2


@dataclass(frozen=True)
class Preset:
    """One training task.

    Attributes:
        rollouts: how many are timed, each with its update.
        width: units in each of two hidden layers, of the actor and of the critic.
        native: whether gymnasium has a vector environment of its own for it.
        images: an Atari game through the usual wrappers, and the usual convolutions in place of an MLP.
    """

    env: str
    n_envs: int
    n_steps: int
    batch_size: int
    n_epochs: int
    rollouts: int
    width: int = 64
    activation: str = "tanh"
    native: bool = False
    images: bool = False
    lr: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5

    @property
    def rollout_steps(self) -> int:
        """Environment steps of one rollout."""
        return self.n_envs * self.n_steps

    @property
    def steps(self) -> int:
        """Environment steps that are timed."""
        return self.rollout_steps * self.rollouts

    @property
    def total_steps(self) -> int:
        """Environment steps of a run, those before the clock starts included."""
        return self.rollout_steps * (self.rollouts + WARM_UP)

    def words(self) -> str:
        """The task in one cell of a table."""
        network = "NatureCNN" if self.images else f"{self.width}-{self.width} {self.activation}"
        return (
            f"{self.env}, {self.n_envs} x {self.n_steps}, batch {self.batch_size}, "
            f"{self.n_epochs} passes, {network}"
        )

    def mapping(self) -> dict[str, Any]:
        """For the process that measures."""
        return asdict(self) | {"total_steps": self.total_steps, "warm_up": WARM_UP}


PRESETS = {
    "cartpole-20": Preset("CartPole-v1", 8, 32, 256, 20, 100, native=True),
    "cartpole-4": Preset("CartPole-v1", 8, 128, 256, 4, 60, native=True),
    "acrobot": Preset("Acrobot-v1", 16, 256, 64, 4, 6),
    "pendulum": Preset("Pendulum-v1", 4, 1024, 64, 10, 5),
    "lunarlander": Preset("LunarLander-v3", 16, 1024, 64, 4, 2),
    "halfcheetah": Preset("HalfCheetah-v5", 1, 512, 64, 20, 10, width=256, activation="relu"),
    "pong": Preset(
        "PongNoFrameskip-v4", 8, 128, 256, 4, 2, images=True, lr=2.5e-4, clip_range=0.1, ent_coef=0.01
    ),
}

"""Exported policies: the actions and the returns of the trial they come from, and files that are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import ppo_hpo
from ppo_hpo import PPO, CheckpointError, TrialConfig, UserError, export_policy, load_policy
from ppo_hpo.envs.make import make
from ppo_hpo.ppo.evaluate import Evaluation, Evaluator
from ppo_hpo.spec import randomness
from ppo_hpo.spec.results import evaluation_columns
from ppo_hpo.state.checkpoint import Checkpoint, arrays_digest, from_bytes, to_bytes
from tests.runs import run_quietly

# The last epoch of each is evaluated on four episodes, with the normaliser's statistics of training.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "discrete": {
        "env": {"id": "CartPole-v1", "n_envs": 2},
        "normalize": {"norm_obs": True},
        "model": {"width": 16, "depth": 2},
    },
    "continuous": {
        "env": {"id": "Pendulum-v1", "n_envs": 2},
        "normalize": {"norm_obs": True, "clip_obs": 2.0},
        "model": {"width": 16, "depth": 1, "activation": "relu", "log_std_init": -1.0},
    },
    "image": {
        "env": {"id": "tests.envs:Eyes-v0", "n_envs": 2, "kwargs": {"channels_first": True}},
        "model": {"features_dim": 32},
        "optimizer": {"lr": 5e-4},
        "task": {"epochs": 2, "max_epochs": 3, "steps_per_epoch": 1024, "eval_episodes": 4},
        "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 4},
    },
    "from five": {"env": {"id": "tests.envs:FromFive-v0", "n_envs": 2}, "model": {"width": 8, "depth": 1}},
}
REST = {
    "task": {"epochs": 2, "max_epochs": 3, "steps_per_epoch": 256, "eval_episodes": 4},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 2},
    "optimizer": {"lr": 3e-3},
}


class Trained:
    """A task that was trained for two epochs, and the directory of its checkpoints."""

    def __init__(self, case: str, directory: Path) -> None:
        self.directory = directory
        self.config = TrialConfig.from_mapping({**REST, **CASES[case]})
        self.task = PPO.from_config(self.config, "cpu", storage=directory)
        self.task.fit(2)

    def observations(self, n: int = 1000) -> Any:
        """Raw observations, some of them far beyond those of training."""
        info, stream = self.task.info, np.random.default_rng(0)
        shape = (n, *info.obs_shape)
        if info.images:
            env = make(self.config.env)
            images = [env.reset(seed=seed)[0] for seed in range(n - 10)]
            env.close()
            return np.concatenate([images, stream.integers(0, 256, (10, *info.obs_shape), np.uint8)])
        return (stream.normal(size=shape) * np.geomspace(0.1, 30.0, n)[:, None]).astype(np.float32)

    def actions(self, observations: Any) -> Any:
        """The actions of the task itself, as the environment gets them."""
        agent = self.task.agent
        return np.array(self.task.info.to_env(agent.learner.act(agent.normalizer(observations), None)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    found: dict[str, Trained] = {}

    def get(case: str) -> Trained:
        if case not in found:
            found[case] = Trained(case, tmp_path_factory.mktemp("trial"))
        return found[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_loaded_policy_acts_as_the_task(case: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    one = trained(case)
    path = tmp_path / "policy.safetensors"
    export_policy(one.directory, path)
    policy = load_policy(path)
    observations = one.observations()
    expected = one.actions(observations)
    found = policy.act(observations)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype
    # The outputs differ between observations: constants would be equal whatever was loaded.
    seen = torch.as_tensor(one.task.agent.normalizer(observations))
    outputs: Any = policy.network.policy(seen)
    assert torch.equal(outputs, one.task.model.policy(seen))
    assert len(torch.unique(outputs, dim=0)) > 100
    if case in ("discrete", "continuous"):
        assert len(np.unique(expected)) > 1
    space = one.task.info
    single = policy.act(observations[7])
    np.testing.assert_allclose(single, found[7], rtol=1e-5)
    assert np.shape(single) == space.action_shape
    # Torch's own arithmetic rounds otherwise than numpy's.
    tensors = policy(torch.from_numpy(observations)).detach().numpy()
    assert tensors.dtype == expected.dtype
    np.testing.assert_allclose(tensors, expected, atol=1e-5)
    assert policy.epoch == 2
    assert policy.config.identity_mapping() == one.config.identity_mapping()


class Player:
    """A policy that replaces the learner of a task."""

    def __init__(self, policy: ppo_hpo.Policy) -> None:
        self.act = lambda obs, noise: policy.act(obs)


@pytest.mark.parametrize("case", ["discrete", "continuous", "image"])
def test_a_loaded_policy_has_the_returns_of_the_trial(
    case: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    one = trained(case)
    path = tmp_path / "policy.safetensors"
    export_policy(one.directory, path)
    policy: Any = Player(load_policy(path))
    evaluator = Evaluator(
        one.config.env, one.task.info, randomness.evaluation_seeds(4), one.task.info.time_limit or 256
    )
    as_it_is: Any = lambda obs: obs  # noqa: E731 - the normaliser is inside the policy
    evaluation: Evaluation = evaluator(policy, as_it_is, None)
    evaluator.close()
    row = one.task.metrics.latest
    assert evaluation_columns(evaluation.returns, evaluation.lengths).items() <= row.items()
    assert row["epoch"] == 2


@pytest.mark.parametrize("case", ["continuous", "image"])
def test_onnx_acts_as_the_policy(case: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    one = trained(case)
    path = tmp_path / "policy.onnx"
    policy = export_policy(one.directory, path)
    session = onnxruntime.InferenceSession(path)
    observations = one.observations()
    expected = policy.act(observations)
    for n in (1000, 1, 7):
        (found,) = session.run(["actions"], {"observations": observations[:n]})
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected[:n], atol=1e-5)


def test_three_lines_of_the_documentation(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    import gymnasium

    path = tmp_path / "policy.safetensors"
    export_policy(trained("continuous").directory, path)
    env = gymnasium.make("Pendulum-v1")
    observation, _ = env.reset(seed=1)
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "best-trials.md").read_text(encoding="utf-8")
    begin = page.index("    from ppo_hpo import load_policy")
    lines = [line[4:] for line in page[begin:].splitlines()[:3]]
    names = {"observation": observation}
    exec("\n".join(lines).replace("policy.safetensors", str(path)), names)
    assert env.action_space.contains(names["action"])
    env.step(names["action"])
    env.close()


def test_a_network_takes_gradients_as_any_module(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    export_policy(trained("continuous").directory, tmp_path / "p")
    policy = load_policy(tmp_path / "p")
    policy(torch.zeros(3, 3)).sum().backward()
    assert all(p.grad is not None for name, p in policy.network.named_parameters() if "actor" in name)


def test_a_loaded_policy_saves_the_same_file(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    export_policy(trained("discrete").directory, tmp_path / "one")
    load_policy(tmp_path / "one").save(tmp_path / "other")
    one, other = (from_bytes((tmp_path / name).read_bytes(), name) for name in ("one", "other"))
    assert (one.epoch, one.meta) == (other.epoch, other.meta)
    assert arrays_digest(one.arrays) == arrays_digest(other.arrays)


@pytest.mark.parametrize("case", ["continuous", "image"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copied_policy_acts_by_its_own_weights(
    how: Callable[[Any], Any], case: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    one = trained(case)
    policy = export_policy(one.directory, tmp_path / "p")
    observations = one.observations(50)
    before = policy.act(observations)
    other = how(policy)
    np.testing.assert_array_equal(other.act(observations), before)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.zero_()
    assert len(np.unique(other.act(observations))) == 1
    np.testing.assert_array_equal(policy.act(observations), before)
    other.load_state_dict(policy.state_dict())
    np.testing.assert_array_equal(other.act(observations), before)
    for parameter in policy.network.parameters():  # as `Policy.to` does for another device
        parameter.data = torch.zeros_like(parameter)
    assert len(np.unique(policy.act(observations))) == 1


def test_unbounded_actions_are_kept(tmp_path: Path, trained: Callable[[str], Trained]) -> None:
    one = trained("continuous")
    export_policy(one.directory, tmp_path / "p")
    found = from_bytes((tmp_path / "p").read_bytes(), "p")
    found.meta["interface"] |= {"low": [None], "high": [0.0]}
    (tmp_path / "q").write_bytes(to_bytes(found))
    info = load_policy(tmp_path / "q").info
    assert (info.low.tolist(), info.high.tolist()) == ([-np.inf], [0.0])


# ---------------------------------------------------------------------- what is refused


def test_observations_of_another_shape(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    export_policy(trained("discrete").directory, tmp_path / "p")
    policy = load_policy(tmp_path / "p")
    for shape in ((3,), (2, 3), (2, 2, 4), ()):
        with pytest.raises(UserError, match=r"must have the shape \(4,\), or in a batch"):
            policy.act(np.zeros(shape))


def test_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint"):
        export_policy(tmp_path, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_checkpoint_of_another_epoch(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    one = trained("discrete")
    export_policy(one.directory, tmp_path / "p", epoch=1)
    assert load_policy(tmp_path / "p").epoch == 1
    with pytest.raises(CheckpointError, match="of epoch 2, not of 3"):
        export_policy(one.directory, tmp_path / "p", epoch=3)


def test_the_first_of_several_seeds(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    one = trained("discrete")
    config = one.config.replace(task={"seeds": 2})
    run_quietly(config, tmp_path)
    observations = one.observations()
    found = export_policy(tmp_path, tmp_path / "p").act(observations)
    np.testing.assert_array_equal(found, one.actions(observations))
    other = export_policy(tmp_path / "seed-2", tmp_path / "q").act(observations)
    assert (other != found).any()


def test_a_checkpoint_is_not_a_policy(trained: Callable[[str], Trained]) -> None:
    path = trained("discrete").task._storage.path_of(2)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"is a checkpoint, not a policy\. Use ppo_hpo\.export_policy"):
        load_policy(path)


def test_a_torn_file(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    path = tmp_path / "p"
    export_policy(trained("discrete").directory, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"abc")
    with pytest.raises(CheckpointError, match="torn"):
        load_policy(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_policy(path)


def _larger(checkpoint: Checkpoint) -> None:
    checkpoint.meta["hyperparameters"]["model"] |= {"width": 8192, "depth": 2}


def _missing(checkpoint: Checkpoint) -> None:
    del checkpoint.arrays["model.critic.0.bias"]


def _wrong_bounds(checkpoint: Checkpoint) -> None:
    checkpoint.meta["interface"]["kind"] = "continuous"


def _objects(checkpoint: Checkpoint) -> None:
    checkpoint.meta["interface"]["obs_dtype"] = "O"


def _huge(checkpoint: Checkpoint) -> None:
    checkpoint.meta["interface"]["obs_shape"] = [10**9, 10**9, 10**9]


def _statistics(checkpoint: Checkpoint) -> None:
    checkpoint.arrays["observation_normalizer.mean"] = np.zeros(5)


def _nothing(checkpoint: Checkpoint) -> None:
    checkpoint.meta["interface"] = None


@pytest.mark.parametrize(
    "damage",
    [_larger, _missing, _wrong_bounds, _objects, _huge, _statistics, _nothing],
    ids=lambda f: f.__name__,
)
def test_a_manipulated_file_is_refused(
    damage: Callable[[Checkpoint], None], trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    path = tmp_path / "p"
    export_policy(trained("discrete").directory, path)
    found = from_bytes(path.read_bytes(), "p")
    damage(found)
    path.write_bytes(to_bytes(found))
    with pytest.raises(CheckpointError, match="is not a policy that this ppo_hpo can read"):
        load_policy(path)


def test_a_hyperparameter_that_breaks_its_rule(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    path = tmp_path / "p"
    export_policy(trained("discrete").directory, path)
    found = from_bytes(path.read_bytes(), "p")
    found.meta["hyperparameters"]["model"]["width"] = 10**9
    path.write_bytes(to_bytes(found))
    with pytest.raises(UserError, match=r"`model\.width <= 16384` must hold"):
        load_policy(path)

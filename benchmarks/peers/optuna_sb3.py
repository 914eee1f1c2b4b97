"""A study of PPO by Optuna on Stable-Baselines3, with two jobs. Runs in the environment of rl_zoo3.

    python optuna_sb3.py ENV SEED FOLDER

After Optuna's own example for reinforcement learning (TPE and the median pruner, both after 5 trials at
random, two evaluations in a trial, a third of them before anything is pruned, jobs that are threads), with
what that leaves open taken from rl_zoo3: the space for PPO, the number of environments and the steps of a
trial. Writes the journal FOLDER/study.log, and FOLDER/models/trial_N/best_model.zip of each trial.
"""

from __future__ import annotations

import sys
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3.callbacks import TrialEvalCallback
from rl_zoo3.hyperparams_opt import sample_ppo_params
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

# Environments and steps of a trial, as in rl_zoo3's presets.
BUDGETS = {"Pendulum-v1": (4, 100_000), "LunarLander-v3": (16, 1_000_000)}
EVALUATIONS, STARTUP, JOBS = 2, 5, 2


def main() -> None:
    env_id, seed, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    n_envs, steps = BUDGETS[env_id]

    def objective(trial: optuna.Trial) -> float:
        params: dict[str, Any] = sample_ppo_params(trial, 1, n_envs, {})
        envs = make_vec_env(env_id, n_envs, seed=seed + trial.number)
        path = f"{folder}/models/trial_{trial.number}"
        callback = TrialEvalCallback(
            make_vec_env(env_id, 1, seed=seed + 10_000 + trial.number),
            trial,
            n_eval_episodes=5,
            eval_freq=steps // EVALUATIONS // n_envs,
            best_model_save_path=path,
            log_path=path,
        )
        model = PPO("MlpPolicy", envs, seed=seed + trial.number, device="cpu", **params)
        try:
            model.learn(steps, callback=callback)
        except (AssertionError, ValueError) as error:  # NaN, by hyperparameters that diverge
            raise optuna.TrialPruned(str(error)) from error
        if callback.is_pruned:
            raise optuna.TrialPruned
        return float(callback.last_mean_reward)

    study = optuna.create_study(
        study_name="study",
        storage=JournalStorage(JournalFileBackend(f"{folder}/study.log")),
        sampler=optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=EVALUATIONS // 3),
        direction="maximize",
    )
    study.optimize(objective, n_trials=100_000, n_jobs=JOBS)


if __name__ == "__main__":
    main()

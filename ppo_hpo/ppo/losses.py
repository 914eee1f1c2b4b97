"""The loss of PPO and the densities of its policies: pure functions over tensors of ``B`` samples.

`torch.distributions` is not used, because its objects cost more than the arithmetic of a small policy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class LossParts(NamedTuple):
    """The loss, its parts and two diagnostics, each a scalar tensor; see `ppo_loss`."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def categorical(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability ``[B]`` and entropy ``[B]`` of a categorical policy.

    Args:
        logits: ``[B, A]`` unnormalised log-probabilities.
        action: ``[B]`` integers in ``[0, A)``.
    """
    log_probs = torch.log_softmax(logits, dim=-1)
    log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_prob, entropy


def diagonal_gaussian(mean: Tensor, log_std: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density ``[B]`` and entropy ``[B]`` of independent normal action dimensions.

    Args:
        mean: ``[B, A]`` means.
        log_std: ``[A]`` log standard deviations, the same in every state.
        action: ``[B, A]`` actions as sampled: not clipped to the action space.
    """
    scaled = (action - mean) * torch.exp(-log_std)
    log_prob = (-0.5 * scaled * scaled - log_std - _HALF_LOG_TWO_PI).sum(-1)
    entropy = (0.5 + _HALF_LOG_TWO_PI + log_std).sum().expand(len(mean))
    return log_prob, entropy


def normalize_advantage(advantage: Tensor) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 (with Bessel's correction, as in Stable-Baselines3)."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip_range_vf: float | None) -> Tensor:
    """Mean squared error of the critic, a scalar, without a factor of a half.

    With ``clip_range_vf`` each sample counts the larger of its plain and its clipped error, as in the
    authors' code. Stable-Baselines3 counts the clipped error alone.

    Args:
        value: ``[B]`` values under the current critic.
        old_value: ``[B]`` values under the critic of the rollout.
        returns: ``[B]`` returns.
        clip_range_vf: bound on the change of a value; None is unlimited.
    """
    error = (value - returns) ** 2
    if clip_range_vf is not None:
        clipped = old_value + (value - old_value).clamp(-clip_range_vf, clip_range_vf)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return error.mean()


def ppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    critic_loss: Tensor,
    entropy: Tensor,
    *,
    clip_range: float,
    ent_coef: float,
    vf_coef: float,
) -> LossParts:
    """The clipped surrogate (Schulman et al. 2017, equations 7 and 9), to be minimised.

        ratio = exp(log_prob - old_log_prob)
        L = -mean(min(ratio * A, clip(ratio, 1 - c, 1 + c) * A)) - ent_coef * mean(H) + vf_coef * L_V

    Args:
        log_prob: ``[B]`` log-probabilities of the stored actions under the current policy.
        old_log_prob: ``[B]`` log-probabilities of the same actions under the policy that took them.
        advantage: ``[B]`` advantages.
        critic_loss: loss of the critic, a scalar; see `value_loss`.
        entropy: ``[B]`` entropies of the current policy.
        clip_range: bound c on the ratio.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the critic's loss.

    Returns:
        The loss, its parts and two diagnostics. ``approx_kl`` is mean(ratio - 1 - log ratio), an unbiased
        estimate that is never negative (http://joschu.net/blog/kl-approx.html). ``clip_fraction`` is the
        share of samples whose ratio was clipped.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantage)
    policy_loss = -surrogate.mean()
    mean_entropy = entropy.mean()
    loss = policy_loss - ent_coef * mean_entropy + vf_coef * critic_loss
    with torch.no_grad():
        approx_kl = (ratio - 1.0 - log_ratio).mean()
        clip_fraction = ((ratio - 1.0).abs() > clip_range).float().mean()
    return LossParts(loss, policy_loss, critic_loss, mean_entropy, approx_kl, clip_fraction)

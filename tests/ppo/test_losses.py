"""Losses, densities and sampling noise: hand-worked numbers, and torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

from ppo_hpo.ppo import losses
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.networks import MLPActorCritic
from ppo_hpo.ppo.rollout import sampling_noise
from ppo_hpo.spec.config import ModelConfig, OptimizerConfig, PPOConfig

# ------------------------------------------------------------------------- densities


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_categorical_equals_torchs() -> None:
    logits = 3.0 * normal(50, 4)
    action = torch.arange(50) % 4
    log_prob, entropy = losses.categorical(logits, action)
    reference = distributions.Categorical(logits=logits)
    torch.testing.assert_close(log_prob, reference.log_prob(action))
    torch.testing.assert_close(entropy, reference.entropy())


def test_categorical_known_answers() -> None:
    # Uniform over 4: log 1/4, entropy log 4. Odds 3 to 1: 3/4, entropy log 4 - 3/4 log 3.
    log_prob, entropy = losses.categorical(torch.zeros(1, 4), torch.tensor([2]))
    assert log_prob.item() == pytest.approx(-math.log(4.0))
    assert entropy.item() == pytest.approx(math.log(4.0))
    log_prob, entropy = losses.categorical(torch.tensor([[math.log(3.0) + 5.0, 5.0]]), torch.tensor([0]))
    assert log_prob.item() == pytest.approx(math.log(0.75), rel=1e-5)
    assert entropy.item() == pytest.approx(math.log(4.0) - 0.75 * math.log(3.0), rel=1e-5)


def test_categorical_of_a_certain_action_is_finite() -> None:
    logits = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    log_prob, entropy = losses.categorical(logits, torch.tensor([1]))
    assert log_prob.item() == -1000.0
    assert entropy.item() == 0.0
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0]]  # onehot - probabilities


def test_diagonal_gaussian_equals_torchs() -> None:
    mean, log_std, action = normal(50, 3), normal(3, seed=1), normal(50, 3, seed=2)
    log_prob, entropy = losses.diagonal_gaussian(mean, log_std, action)
    reference = distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(log_prob, reference.log_prob(action).sum(-1))
    torch.testing.assert_close(entropy, reference.entropy().sum(-1))


def test_diagonal_gaussian_known_answers() -> None:
    # Two dimensions, standard deviations 1 and 2, two deviations off in the second:
    # log p = -2 log sqrt(2 pi) - log 2 - 2^2 / 2;   H = 2 (1/2 + log sqrt(2 pi)) + log 2
    log_std = torch.tensor([0.0, math.log(2.0)])
    log_prob, entropy = losses.diagonal_gaussian(
        torch.tensor([[1.0, 1.0]]), log_std, torch.tensor([[1.0, 5.0]])
    )
    assert log_prob.item() == pytest.approx(-math.log(2.0 * math.pi) - math.log(2.0) - 2.0)
    assert entropy.item() == pytest.approx(1.0 + math.log(2.0 * math.pi) + math.log(2.0))


# --------------------------------------------------------------------------- sampling


def constant_policy(output: list[float], *, continuous: bool, engine: str, std: float = 1.0) -> Learner:
    """A policy with the same logits or means everywhere."""
    module = MLPActorCritic(
        1, len(output), ModelConfig(width=4, depth=1, log_std_init=math.log(std)), continuous=continuous
    )
    with torch.no_grad():
        module.actor[-1].weight.zero_()
        module.actor[-1].bias.copy_(torch.tensor(output))
    return Learner(
        module, OptimizerConfig(), PPOConfig(), torch.device("cpu"), continuous=continuous, engine=engine
    )


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_discrete_samples_follow_the_softmax(engine: str) -> None:
    logits = [0.0, 1.0, -2.0, 2.5]
    n = 40_000
    noise = sampling_noise(np.random.default_rng(0), (n, 4), continuous=False)
    learner = constant_policy(logits, continuous=False, engine=engine)
    action = learner.act(np.zeros((n, 1), np.float32), noise)
    expected = n * torch.softmax(torch.tensor(logits), 0).numpy()
    chi_square = float(((np.bincount(action, minlength=4) - expected) ** 2 / expected).sum())
    assert chi_square < 16.27  # 99.9 % of chi-square with 3 degrees of freedom
    assert (learner.act(np.zeros((5, 1), np.float32), None) == 3).all()  # the mode


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_continuous_samples_follow_the_normal(engine: str) -> None:
    n, std = 40_000, 0.5
    noise = sampling_noise(np.random.default_rng(0), (n, 2), continuous=True)
    learner = constant_policy([3.0, -1.0], continuous=True, engine=engine, std=std)
    action = learner.act(np.zeros((n, 1), np.float32), noise).astype(np.float64)
    # Four standard errors: of the mean std / sqrt(n), of the deviation std / sqrt(2 n), of the
    # correlation 1 / sqrt(n), of the fourth standardised moment sqrt(96 / n).
    np.testing.assert_allclose(action.mean(0), [3.0, -1.0], atol=4 * std / math.sqrt(n))
    np.testing.assert_allclose(action.std(0), std, atol=4 * std / math.sqrt(2 * n))
    assert abs(np.corrcoef(action.T)[0, 1]) < 4 / math.sqrt(n)
    fourth = (((action - action.mean(0)) / action.std(0)) ** 4).mean(0)
    np.testing.assert_allclose(fourth, 3.0, atol=4 * math.sqrt(96 / n))
    np.testing.assert_allclose(learner.act(np.zeros((1, 1), np.float32), None), [[3.0, -1.0]])  # the mode


def test_gumbel_noise_has_the_moments_of_gumbels_distribution() -> None:
    noise = sampling_noise(np.random.default_rng(0), (100_000,), continuous=False).astype(np.float64)
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=4 * math.sqrt(math.pi**2 / 6 / 100_000))
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.03)


def test_gumbel_noise_is_finite_where_the_exponential_is_zero() -> None:
    class Zero:
        def standard_exponential(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
            return np.zeros(shape, dtype)

    noise = sampling_noise(Zero(), (3,), continuous=False)
    assert np.isfinite(noise).all()
    assert (noise > 80.0).all()  # -log of the smallest normal number, 2^-126


# ----------------------------------------------------------------------------- losses


def surrogate(log_ratio: Tensor, advantage: Tensor, **coefficients: float) -> losses.LossParts:
    old = torch.full_like(log_ratio, -1.0)
    coefficients = {"clip_range": 0.2, "ent_coef": 0.0, "vf_coef": 0.0, **coefficients}
    return losses.ppo_loss(
        old + log_ratio, old, advantage, torch.tensor(3.0), torch.tensor([1.0, 2.0, 3.0, 4.0]), **coefficients
    )


def test_clipped_surrogate_by_hand() -> None:
    # Ratio 1.5 and 0.5, advantage 1 and -1, clip range 0.2:
    #   A =  1, r = 1.5: min( 1.5,  1.2) =  1.2, clipped        gradient 0
    #   A =  1, r = 0.5: min( 0.5,  0.8) =  0.5                 -r A / 4 = -0.125
    #   A = -1, r = 1.5: min(-1.5, -1.2) = -1.5                 -r A / 4 =  0.375
    #   A = -1, r = 0.5: min(-0.5, -0.8) = -0.8, clipped        gradient 0
    # The loss is -(1.2 + 0.5 - 1.5 - 0.8) / 4 = 0.15.
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    parts = surrogate(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64))
    assert parts.policy_loss.item() == pytest.approx(0.15)
    (gradient,) = torch.autograd.grad(parts.loss, log_ratio)
    assert gradient.tolist() == pytest.approx([0.0, -0.125, 0.375, 0.0])
    assert parts.clip_fraction.item() == 1.0
    # mean(r - 1 - log r) = ((0.5 - log 1.5) + (-0.5 + log 2)) / 2
    assert parts.approx_kl.item() == pytest.approx((math.log(2.0) - math.log(1.5)) / 2)


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    # Ratio 1: the policy's loss is -mean(A) = -2.5. The mean entropy is 2.5, the critic's loss 3.
    parts = surrogate(torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0]), ent_coef=0.1, vf_coef=0.5)
    assert parts.loss.item() == pytest.approx(-2.5 - 0.1 * 2.5 + 0.5 * 3.0)
    assert (parts.value_loss.item(), parts.entropy.item()) == (3.0, 2.5)
    assert (parts.approx_kl.item(), parts.clip_fraction.item()) == (0.0, 0.0)


def test_ratio_1_gives_the_plain_policy_gradient() -> None:
    """Before the first step the clipping has no effect: the gradient is REINFORCE's."""
    log_ratio = torch.zeros(4, requires_grad=True)
    advantage = torch.tensor([2.0, -1.0, 0.5, -4.0])
    (gradient,) = torch.autograd.grad(surrogate(log_ratio, advantage).loss, log_ratio)
    torch.testing.assert_close(gradient, -advantage / 4)


def test_clip_fraction_counts_either_side() -> None:
    ratio = torch.tensor([1.19, 0.81, 1.21, 0.79])
    assert surrogate(ratio.log(), torch.ones(4)).clip_fraction.item() == 0.5


def test_approx_kl_is_never_negative() -> None:
    # r - 1 - log r: 1 - log 2 where the ratio is 2, and -1/2 + log 2 where it is 1/2; -log r alone would be
    # -log 2 and log 2.
    for ratio, expected in ((2.0, 1.0 - math.log(2.0)), (0.5, math.log(2.0) - 0.5), (1.0, 0.0)):
        parts = surrogate(torch.full((4,), ratio).log(), torch.ones(4))
        assert parts.approx_kl.item() == pytest.approx(expected, abs=1e-6)


def test_advantages_are_standardised_with_bessels_correction() -> None:
    # Mean 5/2, squared deviations 9/4 + 1/4 + 1/4 + 9/4 = 5, over 3.
    normalized = losses.normalize_advantage(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(5.0 / 3.0)
    np.testing.assert_allclose(normalized.numpy(), expected, rtol=1e-6)
    assert losses.normalize_advantage(torch.full((4,), 7.0)).tolist() == [0.0] * 4


def test_advantages_as_small_as_the_guard_against_zero() -> None:
    # Deviation sqrt(5/3) 1e-8, to which 1e-8 is added.
    normalized = losses.normalize_advantage(1e-8 * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / (math.sqrt(5.0 / 3.0) + 1.0)
    np.testing.assert_allclose(normalized.numpy(), expected, rtol=1e-6)


def test_a_ratio_at_the_bound_is_not_clipped() -> None:
    parts = surrogate(torch.zeros(4), torch.ones(4), clip_range=0.0)
    assert parts.clip_fraction.item() == 0.0


def test_value_loss_without_clipping_has_no_half() -> None:
    value = torch.tensor([1.0, 2.0])
    # (1 + 9) / 2
    assert losses.value_loss(value, value, torch.tensor([2.0, 5.0]), None).item() == 5.0


def test_value_loss_takes_the_larger_error() -> None:
    # Bound 1/2 around the old value 1:
    #   value 3, returns 2: plain (3-2)^2 = 1, clipped (1.5-2)^2 = 0.25: 1 (the clipped one alone would let
    #     the critic run away from its target without a gradient); gradient 2 (3-2) / 3
    #   value 3, returns 5: plain 4, clipped (1.5-5)^2 = 12.25: 12.25; gradient 0
    #   value 1.25, returns 0: both 1.5625; gradient 2 * 1.25 / 3
    value = torch.tensor([3.0, 3.0, 1.25], requires_grad=True)
    loss = losses.value_loss(value, torch.ones(3), torch.tensor([2.0, 5.0, 0.0]), 0.5)
    assert loss.item() == pytest.approx((1.0 + 12.25 + 1.5625) / 3)
    (gradient,) = torch.autograd.grad(loss, value)
    assert gradient.tolist() == pytest.approx([2.0 / 3, 0.0, 2.5 / 3])

"""Whether the values that a space can draw are legal together, and not only one by one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ppo_hpo.spec.config import (
    NEEDS,
    EnvConfig,
    PPOConfig,
    TaskConfig,
    TrialConfig,
    broken_size_rule,
    without_effectless,
)
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.prior import parse_prior
from ppo_hpo.spec.settings import put

Groups = Mapping[str, Mapping[str, Any]]

# Draws of the whole space, and combinations of sizes that are looked at. The sizes have most of the rules.
_DRAWS, _MOST_SIZES = 100, 20_000
_MOST_NAMED = 20  # legal values that a message lists
_SIZES = (
    ("env", "n_envs"), ("ppo", "n_steps"), ("ppo", "batch_size"), ("ppo", "n_minibatches"),
    ("ppo", "normalize_advantage"),
)  # fmt: skip


def check_combinations(fixed: Groups, priors: Groups) -> None:
    """Refuse a space that can draw values that are illegal together, or that search for no effect.

    ``fixed`` and ``priors`` are as in a `Space`, each of them checked one by one.
    """
    _check_effects(fixed, priors)
    _check_sizes(fixed, priors)
    rng = random.Random(0)  # of its own, and always the same, so that a space is legal or not
    for _ in range(_DRAWS if any(priors.values()) else 1):
        drawn = {group: dict(values) for group, values in fixed.items()}
        for group, texts in priors.items():
            for key, text in texts.items():
                put(drawn, group, key, _draw(text, rng))
        TrialConfig.from_mapping(without_effectless(drawn, priors))


def _check_effects(fixed: Groups, priors: Groups) -> None:
    for (group, key), (other, needed) in NEEDS.items():
        searched, given = priors.get(group, {}), fixed.get(group, {})
        if key in searched and other not in searched and given.get(other) != needed:
            raise UserError(
                f"`{group}.{key}` is searched, but has no effect unless `{group}.{other}` is {needed}. "
                f"Leave it out, or set or search {group}.{other}."
            )


def _check_sizes(fixed: Groups, priors: Groups) -> None:
    """Look at every combination of sizes, or at a sample where there are too many."""
    searched = [name for name in _SIZES if name[1] in priors.get(name[0], {})]
    if not searched:
        return
    values = [_values(priors[group][key]) for group, key in searched]
    total = math.prod(map(len, values))
    combinations: Iterator[Sequence[Any]] = itertools.product(*values)
    if total > _MOST_SIZES:
        rng = random.Random(0)
        combinations = (tuple(rng.choice(some) for some in values) for _ in range(_MOST_SIZES))
    legal: list[Sequence[Any]] = []
    looked_at, example = 0, ""
    for combination in combinations:
        looked_at += 1
        broken = _broken({**_given(fixed), **dict(zip(searched, combination, strict=True))}, fixed)
        if broken is None:
            legal.append(combination)
        elif not example:
            example = f"{_named(searched, combination)}: {broken}"
    if example:
        texts = ", ".join(f"{group}.{key}: {priors[group][key]}" for group, key in searched)
        advice = "Choose priors whose every combination is legal, such as a list of choices."
        if len(searched) == 1 and 0 < len(legal) <= _MOST_NAMED:
            advice = f"Write choices({[value for (value,) in legal]})."
        raise UserError(
            f"The space can draw sizes that are illegal together: of {looked_at} combinations of {texts}, "
            f"{looked_at - len(legal)} break a rule, such as {example} {advice}"
        )


def _given(fixed: Groups) -> dict[tuple[str, str], Any]:
    return {(group, key): fixed[group][key] for group, key in _SIZES if key in fixed.get(group, {})}


def _named(searched: Sequence[tuple[str, str]], combination: Sequence[Any]) -> str:
    pairs = zip(searched, combination, strict=True)
    return ", ".join(f"{group}.{key}={value}" for (group, key), value in pairs)


def _broken(sizes: Mapping[tuple[str, str], Any], fixed: Groups) -> str | None:
    """The rule that sizes break together, if any."""
    n_envs = int(sizes.get(("env", "n_envs"), EnvConfig.n_envs))
    n_steps = int(sizes.get(("ppo", "n_steps"), PPOConfig.n_steps))
    n_minibatches = sizes.get(("ppo", "n_minibatches"))
    if n_minibatches is None:
        batch_size = int(sizes.get(("ppo", "batch_size"), PPOConfig.batch_size))
    elif n_envs * n_steps % int(n_minibatches):
        return (
            f"Minibatches must fill a rollout: ppo.n_minibatches must divide env.n_envs * ppo.n_steps = "
            f"{n_envs * n_steps}, but got {n_minibatches}."
        )
    else:
        batch_size = n_envs * n_steps // int(n_minibatches)
    steps = int(fixed.get("task", {}).get("steps_per_epoch", TaskConfig.steps_per_epoch))
    normalizes = sizes.get(("ppo", "normalize_advantage"), PPOConfig.normalize_advantage)
    return broken_size_rule(n_envs, n_steps, steps, batch_size, normalize_advantage=bool(normalizes))


def _values(text: str) -> Sequence[Any]:
    """All values that a prior of a whole number or of choices can draw."""
    prior = parse_prior("", text)
    if prior.name == "choices":
        return list(prior.arguments[0])
    low, high = prior.arguments
    return range(int(low), int(high) + 1)


def _draw(text: str, rng: random.Random) -> Any:
    """One value of a prior; bounds are drawn as often as what lies between."""
    prior = parse_prior("", text)
    if prior.name == "choices":
        return rng.choice(list(prior.arguments[0]))
    low, high = prior.arguments[:2]
    if prior.name == "fidelity":
        return rng.choice([low, high])
    between = rng.uniform(low, high)
    if prior.name == "loguniform":
        between = math.exp(rng.uniform(math.log(low), math.log(high)))
    value = rng.choice([low, high, between])
    return int(value) if prior.options.get("discrete") else float(value)

"""Taking out of times what a round did to all of its configs."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest

from tilecast.autotune.levels import drift, levelled
from tilecast.autotune.timing import centre
from tilecast.evidence import percentile


def drawn(
    configs: int, rounds: int, *, drift: float, noise: float, seed: int = 0
) -> dict[int, dict[tuple[int, int], float]]:
    """Times of config c around 100 + 10·c µs, under a drift that all configs of a round share."""
    rng = random.Random(seed)
    levels = [math.exp(drift * rng.gauss(0, 1)) for _ in range(rounds)]
    return {
        c: {(r, 0): (100 + 10 * c) * levels[r] * math.exp(noise * rng.gauss(0, 1)) for r in range(rounds)}
        for c in range(configs)
    }


def spread(values: list[float]) -> float:
    middle = median(values)
    return median(abs(value / middle - 1) for value in values)


def test_a_common_drift_vanishes() -> None:
    found = levelled(drawn(6, 9, drift=0.3, noise=0.0))
    for config, values in found.items():
        assert spread(values) < 1e-3
        assert median(values) / median(found[0]) == pytest.approx((100 + 10 * config) / 100, rel=1e-3)


def test_drift_is_how_far_the_moments_levels_are_apart() -> None:
    samples = drawn(6, 20, drift=0.1, noise=0.0)
    # Without noise any config's times are the levels.
    times = list(samples[0].values())
    assert drift(samples) == pytest.approx(percentile(times, 90) / percentile(times, 10) - 1, rel=1e-3)
    assert drift(drawn(6, 20, drift=0.0, noise=0.0)) == pytest.approx(0, abs=1e-3)
    assert drift({0: {(0, 0): 3.0}, 1: {(1, 0): 9.0}}) == 0, "nothing ran at the same moment"


def test_of_noise_that_is_not_common_only_what_was_fitted_is_gone() -> None:
    raw, rest = [], []
    for seed in range(30):
        samples = drawn(6, 12, drift=0.0, noise=0.05, seed=seed)
        raw += [spread(list(of_config.values())) for of_config in samples.values()]
        rest += [spread(values) for values in levelled(samples).values()]
    assert 0.75 < sum(rest) / sum(raw) < 1.0


@pytest.mark.parametrize("configs", [2, 4])
def test_two_configs_are_compared_as_sharply_as_by_the_pairs_of_their_samples(configs: int) -> None:
    """A level that took over a part of the noise must not put it back twice: that moved the centres."""
    levelled_errors, paired_errors = [], []
    for seed in range(60):
        rng = random.Random(seed)
        samples = drawn(configs, 16, drift=0.3, noise=0.05, seed=seed)
        # Times have long tails.
        samples = {
            c: {m: us * (1.3 if rng.random() < 0.15 else 1.0) for m, us in of.items()} for c, of in samples.items()
        }
        found = levelled(samples)
        levelled_errors.append(math.log(centre(found[1]) / centre(found[0]) / 1.1))
        paired_errors.append(math.log(centre([samples[1][m] / samples[0][m] for m in samples[0]]) / 1.1))
    size, least = (sum(e * e for e in errors) for errors in (levelled_errors, paired_errors))
    assert size < 1.2 * least


def test_configs_of_different_rounds_become_comparable() -> None:
    """A slow round in which only some ran must not make them look slow."""
    samples = drawn(8, 2, drift=0.0, noise=0.001)
    for config in range(4):
        samples[config] |= {(2, 0): 3.0 * (100 + 10 * config), (3, 0): 3.0 * (100 + 10 * config)}
    found = levelled(samples)
    for config in range(8):
        assert median(found[config]) == pytest.approx(median(found[7]) * (100 + 10 * config) / 170, rel=0.02)


def test_a_config_alone_keeps_its_times_exactly() -> None:
    assert levelled({0: {(0, 0): 10.0, (0, 1): 12.7}}) == {0: [10.0, 12.7]}
    assert levelled({c: {(c, 0): 10.0 + c, (c, 1): 12.7 + c} for c in range(3)}) == {
        c: [10.0 + c, 12.7 + c] for c in range(3)
    }
    assert levelled({}) == {}


def test_two_configs_side_by_side_are_told_apart_by_their_pairs() -> None:
    found = levelled({0: {(r, 0): 10.0 * (1 + r) for r in range(5)}, 1: {(r, 0): 11.0 * (1 + r) for r in range(5)}})
    assert median(found[1]) / median(found[0]) == pytest.approx(1.1)
    assert max(spread(values) for values in found.values()) < 1e-6


def test_one_outlier_moves_nobody_else() -> None:
    samples = drawn(6, 8, drift=0.1, noise=0.0)
    samples[2][3, 0] *= 50
    found = levelled(samples)
    assert all(spread(found[c]) < 1e-3 for c in range(6))
    assert median(found[2]) / median(found[0]) == pytest.approx(1.2, rel=1e-3)

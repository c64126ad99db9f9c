"""What samples say: times, and errors that are as large as they claim."""

from __future__ import annotations

import math
import random
from itertools import combinations_with_replacement
from statistics import median

import pytest

from tests.autotune.shared import HERE, LAYER
from tilecast.autotune.levels import Moment, levelled
from tilecast.autotune.timing import MANY, _centred, centre, pool, pooled
from tilecast.evidence import Measurement
from tilecast.problem import TileConfig


def measured(configs: int, rounds: int, rng: random.Random, *, noise: float, bursts: float) -> list[Measurement]:
    """Equally fast configs, some of whose samples were hit by a burst."""
    return [
        Measurement(
            environment=HERE.digest, gemm=LAYER.up, tokens=4, config=TileConfig("fake.kernel", {"block": c}),
            samples_us=(100 * math.exp(noise * rng.gauss(0, 1) + (0.3 if rng.random() < bursts else 0.0)),), round=r,
        )
        for r in range(rounds)
        for c in range(configs)
    ]  # fmt: skip


@pytest.mark.parametrize("bursts", [0.0, 0.15])
@pytest.mark.parametrize(("configs", "rounds"), [(2, 16), (8, 4), (8, 2), (4, 10)])
def test_errors_are_as_large_as_they_claim(configs: int, rounds: int, bursts: float) -> None:
    rng = random.Random(configs * 100 + rounds)
    off = []
    for _ in range(300):
        timings = list(pool(measured(configs, rounds, rng, noise=0.05, bursts=bursts))[0].values())
        a, b = timings[:2]
        off.append(abs(math.log(a.p50_us / b.p50_us)) / math.hypot(a.error, b.error))
    # Of normal errors 90% lie within 1.645 standard deviations.
    assert 0.82 < sum(z < 1.645 for z in off) / len(off) < 0.97


def test_an_error_is_never_zero_however_equal_a_few_samples_are() -> None:
    made = [
        Measurement(
            environment=HERE.digest, gemm=LAYER.up, tokens=4, config=TileConfig("fake.kernel", {"block": c}),
            samples_us=(100.0 + c,), round=r,
        )
        for r in range(2)
        for c in range(3)
    ]  # fmt: skip
    assert all(timing.error > 0.01 for timing in pool(made)[0].values())


@pytest.mark.parametrize("count", [1, 2, 3, 11, 12, 13, 40, 64])
def test_a_centre_is_the_median_of_the_means_of_all_pairs(count: int) -> None:
    rng = random.Random(count)
    samples = [rng.choice([5.0, rng.random()]) for _ in range(count)]
    assert centre(samples) == median((a + b) / 2 for a, b in combinations_with_replacement(samples, 2))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 11, 12, 13, 64, 65])
def test_many_configs_at_once_have_the_times_of_each_alone(count: int) -> None:
    generator = random.Random(count)
    samples = [[generator.lognormvariate(3.0, 0.2) for _ in range(count)] for _ in range(2 * MANY)]
    # Some have fewer, too few to be looked at together.
    together, mixed = _centred(samples), _centred([*samples, samples[0][:1], *samples])
    for place, values in enumerate(samples):
        alone = _centred([values])
        assert alone.centres == [centre(values)]
        for found, at in ((together, place), (mixed, place), (mixed, len(samples) + 1 + place)):
            assert ([found.samples[at]], [found.centres[at]], [found.widths[at]]) == (
                alone.samples, alone.centres, alone.widths,
            )  # fmt: skip


@pytest.mark.parametrize("anywhere", [False, True])
def test_samples_by_round_are_levelled_as_by_moment(anywhere: bool) -> None:
    """Of rounds that differ in their configs and in how many samples each has, on two ranks."""
    generator = random.Random(anywhere)

    def samples_us(count: int) -> tuple[float, ...]:
        return tuple(generator.lognormvariate(3.0, 0.2) for _ in range(count))

    made = [
        Measurement(
            environment=HERE.digest, gemm=LAYER.up, tokens=4, config=TileConfig("fake.kernel", {"block": c}), round=r,
            rank=rank, world_size=2, samples_us=samples_us(1 + (c + r) % 4),
        )
        for r in (3, 0, 11, 2)
        for c in range(20 - r)
        for rank in range(2)
    ]  # fmt: skip
    by_moment: dict[int, dict[TileConfig, dict[Moment, float]]] = {}
    for m in made:
        of = by_moment.setdefault(0 if anywhere else m.rank, {}).setdefault(m.config, {})
        of.update({(m.rank, m.round, number): us for number, us in enumerate(m.samples_us)})
    found = pooled(made, anywhere=anywhere)
    every = found.by_config()
    assert {config: set(by_rank) for config, by_rank in every.items()} == {
        config: set(by_moment) for config in by_moment[0]
    }
    for rank, of_rank in by_moment.items():
        assert levelled(of_rank) == {config: by_rank[rank] for config, by_rank in every.items()}
    assert found.timings.keys() == by_moment[0].keys()

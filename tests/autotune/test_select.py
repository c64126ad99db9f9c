from __future__ import annotations

import random

import pytest

from tests.autotune.shared import HERE, LAYER, measured
from tests.torch_kernel import SortedTorchKernel, TorchKernel
from tilecast.autotune.prescreen import describe
from tilecast.autotune.select import Evidence, choose, choose_pair, pair_timing, pick
from tilecast.autotune.timing import fastest, noise, pool, within_noise
from tilecast.errors import CoverageError, DeviceError
from tilecast.evidence import Measurement
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, TileConfig

KERNEL = TorchKernel("matmul")
REGISTRY = Registry((KERNEL,))
DEFAULT = KERNEL.config()
BLOCK16 = KERNEL.config(row_block=16)
BLOCK64 = KERNEL.config(row_block=64)
CHUNKED = KERNEL.config(chunk_k=64)
TRANSPOSED = KERNEL.config(layout="transposed")
MATMUL = KERNEL.config(variant="matmul")


def steady(config: TileConfig, us: float, *, spread: float = 0.001, n: int = 18, **fields: object) -> Measurement:
    samples = [us * (1 + spread * (2 * i / (n - 1) - 1)) for i in range(n)] if n > 1 else [us]
    return measured(config, *samples, **fields)


def evidence(*measurements: Measurement, tokens: int = 4, default: TileConfig = DEFAULT) -> Evidence:
    timings, failures = pool(measurements)
    configs = {m.config for m in measurements} | {default}
    return Evidence(
        gemm=LAYER.up,
        bucket=Bucket(above=0, tokens=tokens),
        default=default,
        candidates={c: describe(LAYER.up, c, HERE, REGISTRY, is_default=c == default) for c in configs},
        timings=timings,
        failures=failures,
    )


def chosen(*buckets: Evidence, policy: str = "reproducible", **options: object) -> list[TileConfig]:
    return [choice.config for choice in choose(buckets, policy, **options)[1]]  # type: ignore[arg-type]


# Pooling


def test_rounds_are_pooled_and_the_slowest_rank_counts() -> None:
    timings, _ = pool(
        [
            measured(DEFAULT, 10, rank=0, world_size=2),
            measured(DEFAULT, 12, 14, rank=0, world_size=2, round=1),
            measured(DEFAULT, 20, 22, 24, rank=1, world_size=2),
        ]
    )
    assert (timings[DEFAULT].p50_us, timings[DEFAULT].samples) == (22, 3)


def test_a_lucky_rank_does_not_decide() -> None:
    both = {"world_size": 2}
    lucky = [measured(BLOCK16, *[1] * 18, rank=0, **both), measured(BLOCK16, *[100] * 18, rank=1, **both)]
    default = [measured(DEFAULT, *[50] * 18, rank=rank, **both) for rank in (0, 1)]
    assert chosen(evidence(*lucky, *default)) == [DEFAULT]


def test_a_config_that_fails_anywhere_or_is_missing_somewhere_is_out() -> None:
    both = {"world_size": 2}
    timings, failures = pool(
        [
            measured(DEFAULT, 10, rank=0, **both),
            measured(DEFAULT, 10, rank=1, **both),
            measured(BLOCK16, 5, rank=0, **both),
            measured(BLOCK16, status="runtime_error", detail="boom", rank=1, **both),
            measured(BLOCK64, 5, rank=0, **both),
            measured(CHUNKED, 5, rank=0, **both),
            measured(CHUNKED, status="timeout", rank=0, round=1, **both),
        ]
    )
    assert set(timings) == {DEFAULT}
    assert failures[BLOCK16] == "runtime_error on rank 1: boom"
    assert CHUNKED in failures


def test_a_broken_class_is_no_failure_to_run() -> None:
    timings, failures = pool([measured(BLOCK16, 5), measured(BLOCK16, status="unstable", round=9)])
    assert set(timings) == {BLOCK16} and not failures


# Noise


def test_noise_falls_with_samples_and_never_below_the_floor() -> None:
    rng = random.Random(1)

    def timing(n: int, sigma: float):
        return pool([measured(DEFAULT, *[100 * (1 + sigma * rng.gauss(0, 1)) for _ in range(n)])])[0][DEFAULT]

    assert noise(timing(2000, 0.05), timing(2000, 0.05)) == 0.01
    # 1.645 · √2 · 1.05 · 5% / √18
    assert noise(timing(18, 0.05), timing(18, 0.05)) == pytest.approx(0.042, rel=0.6)
    few = pool([measured(DEFAULT, 100)])[0][DEFAULT]
    assert noise(few, few) > 0.1


def test_a_single_sample_wins_nothing() -> None:
    assert chosen(evidence(steady(DEFAULT, 100, n=1), steady(BLOCK16, 90, n=1))) == [DEFAULT]


# One bucket


def test_a_clear_win_is_chosen_with_its_evidence() -> None:
    _, (choice,) = choose([evidence(steady(DEFAULT, 100), steady(BLOCK16, 80), steady(BLOCK64, 90))], "reproducible")
    assert (choice.config, choice.default, choice.runner_up) == (BLOCK16, DEFAULT, BLOCK64)
    assert choice.p50_us == pytest.approx(80, rel=0.01)
    assert choice.default_us == pytest.approx(100, rel=0.01)
    assert choice.margin == pytest.approx(0.125, rel=0.01)
    assert 0.01 <= choice.noise < 0.05
    assert choice.numerics == describe(LAYER.up, BLOCK16, HERE, REGISTRY).numerics


def test_the_default_stays_when_it_is_as_fast() -> None:
    assert chosen(evidence(steady(DEFAULT, 100.5), steady(BLOCK16, 100))) == [DEFAULT]
    assert chosen(evidence(steady(DEFAULT, 110, spread=0.6), steady(BLOCK16, 100, spread=-0.6))) == [DEFAULT]


def test_what_slowed_a_round_down_slowed_all_of_it_down() -> None:
    """The same drift in both: 10% in every round is a win, however far apart the rounds are."""
    pairs = evidence(steady(DEFAULT, 110, spread=0.6), steady(BLOCK16, 100, spread=0.6))
    assert chosen(pairs) == [BLOCK16]


def test_ties_go_to_the_order_on_configs_and_never_to_one_measurably_slower() -> None:
    first, second = sorted([BLOCK16, BLOCK64], key=lambda c: c.sort_key)
    assert chosen(evidence(steady(DEFAULT, 200), steady(first, 100.5), steady(second, 100))) == [first]
    assert chosen(evidence(steady(DEFAULT, 200), steady(first, 103), steady(second, 100))) == [second]


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_does_not_depend_on_the_order_of_measurements(seed: int) -> None:
    records = [steady(DEFAULT, 100), steady(BLOCK16, 80), steady(BLOCK64, 80), steady(CHUNKED, 80.2)]
    random.Random(seed).shuffle(records)
    assert chosen(evidence(*records)) == chosen(evidence(*sorted(records, key=lambda m: m.key)))


def test_a_config_dropped_early_does_not_win_by_few_samples() -> None:
    assert chosen(evidence(steady(DEFAULT, 100), steady(BLOCK16, 80), steady(BLOCK64, 60, n=1))) == [BLOCK16]


def test_a_choice_without_rivals_has_no_runner_up() -> None:
    _, (choice,) = choose([evidence(steady(DEFAULT, 100))], "reproducible")
    assert choice.config == DEFAULT and choice.runner_up is None


# Groups over buckets


def test_a_single_sample_without_rivals_is_as_noisy_as_any_single_sample() -> None:
    one = evidence(measured(DEFAULT, 10))
    (choice,) = choose([one], "reproducible")[1]
    assert choice.runner_up is None and choice.noise == noise(one.timings[DEFAULT], one.timings[DEFAULT]) > 0.05
    many = evidence(steady(DEFAULT, 100))
    assert choose([many], "reproducible")[1][0].noise < choice.noise


def test_one_class_and_layout_serve_all_buckets() -> None:
    buckets = (
        evidence(steady(DEFAULT, 100), steady(CHUNKED, 50), steady(TRANSPOSED, 95), tokens=1),
        evidence(steady(DEFAULT, 100), steady(CHUNKED, 300), steady(TRANSPOSED, 70), tokens=16),
    )
    assert chosen(*buckets) == [TRANSPOSED, TRANSPOSED]
    # `fastest` may mix classes, but weights are stored once.
    assert chosen(*buckets, policy="fastest") == [CHUNKED, DEFAULT]


def test_a_group_must_exist_in_every_bucket() -> None:
    buckets = (
        evidence(steady(DEFAULT, 100), steady(TRANSPOSED, 10), tokens=1),
        evidence(steady(DEFAULT, 100), tokens=16),
    )
    for policy in ("reproducible", "fastest"):
        assert chosen(*buckets, policy=policy) == [DEFAULT, DEFAULT]


def test_the_defaults_group_stays_when_no_other_is_measurably_faster() -> None:
    assert chosen(evidence(steady(DEFAULT, 100.4), steady(TRANSPOSED, 100))) == [DEFAULT]


def test_the_default_is_reported_even_where_its_group_is_not_chosen() -> None:
    group, (choice,) = choose([evidence(steady(DEFAULT, 100), steady(TRANSPOSED, 50))], "reproducible")
    assert choice.config == TRANSPOSED and choice.default == DEFAULT
    assert choice.default_us == pytest.approx(100, rel=0.01)
    assert group[0] == "torch.moe_gemm:transposed"


def test_only_fastest_takes_a_config_that_is_not_batch_invariant() -> None:
    bucket = evidence(steady(DEFAULT, 100), steady(MATMUL, 20), steady(BLOCK16, 80))
    assert chosen(bucket) == [BLOCK16]
    assert chosen(bucket, policy="fastest") == [MATMUL]


def test_excluded_configs_are_out_under_reproducible_alone() -> None:
    bucket = evidence(steady(DEFAULT, 100), steady(BLOCK16, 80))
    assert chosen(bucket, excluded={BLOCK16}) == [DEFAULT]
    assert chosen(bucket, policy="fastest", excluded={BLOCK16}) == [BLOCK16]


def test_no_group_for_all_buckets_is_a_device_error() -> None:
    bucket = evidence(steady(MATMUL, 20), default=MATMUL)
    with pytest.raises(DeviceError, match="no batch-invariant numerics class"):
        chosen(bucket)
    assert chosen(bucket, policy="fastest") == [MATMUL]


def test_a_default_that_was_not_measured_or_does_not_run_is_an_error() -> None:
    with pytest.raises(CoverageError, match="was not measured"):
        chosen(evidence(steady(BLOCK16, 80)))
    broken = measured(DEFAULT, status="wrong_result", detail="off by 7")
    with pytest.raises(DeviceError, match="wrong_result on rank 0: off by 7"):
        chosen(evidence(steady(BLOCK16, 80), broken))


# The rules themselves, on noise


def test_equal_configs_under_noise_keep_the_default_nearly_always() -> None:
    rng = random.Random(7)
    kept = 0
    for _ in range(200):
        records = [
            measured(c, *[100 * (1 + 0.03 * rng.gauss(0, 1)) for _ in range(18)]) for c in (DEFAULT, BLOCK16, BLOCK64)
        ]
        kept += chosen(evidence(*records)) == [DEFAULT]
    # Each of the two others wins by chance in 5 of 100.
    assert kept >= 170


def test_pick_never_returns_what_is_measurably_slower_than_the_best() -> None:
    rng = random.Random(8)
    configs = [KERNEL.config(row_block=b, chunk_k=c) for b in (0, 16, 64) for c in (0, 64)]
    for _ in range(200):
        timings = list(
            pool(
                measured(c, *[rng.uniform(80, 120) * (1 + 0.02 * rng.gauss(0, 1)) for _ in range(6)]) for c in configs
            )[0].values()
        )
        assert within_noise(pick(timings, DEFAULT), fastest(timings))


# Two GEMMs with one order of the intermediate

ORDERED = SortedTorchKernel("matmul")
SLOT, SORTED = ORDERED.config(), ORDERED.config(order="sorted")
SLOT16, SORTED16 = ORDERED.config(row_block=16), ORDERED.config(order="sorted", row_block=16)


def side(name: str, *measurements: Measurement, tokens: int = 4, default: TileConfig = SLOT) -> Evidence:
    gemm, registry = (LAYER.up if name == "up" else LAYER.down), Registry((ORDERED,))
    timings, failures = pool(measurements)
    configs = {m.config for m in measurements} | {default}
    return Evidence(
        gemm=gemm,
        bucket=Bucket(above=0, tokens=tokens),
        default=default,
        candidates={c: describe(gemm, c, HERE, registry, is_default=c == default) for c in configs},
        timings=timings,
        failures=failures,
    )


def pairs(up: list[Evidence], down: list[Evidence], **options: object) -> list[tuple[TileConfig, TileConfig]]:
    chosen_up, chosen_down = choose_pair(up, down, "reproducible", **options)  # type: ignore[arg-type]
    return [(a.config, b.config) for a, b in zip(chosen_up, chosen_down, strict=True)]


def test_the_best_pair_may_hold_neither_gemms_best() -> None:
    up = side("up", steady(SLOT, 200), steady(SLOT16, 110), steady(SORTED, 100))
    down = side("down", steady(SLOT, 200), steady(SLOT16, 50), steady(SORTED, 90))
    assert pairs([up], [down]) == [(SLOT16, SLOT16)]
    # What is fastest alone is sorted for up and slot for down.
    assert (chosen(up), chosen(down)) == ([SORTED], [SLOT16])
    (choice,), _ = choose_pair([up], [down], "reproducible")
    assert choice.runner_up == SLOT and choice.default == SLOT
    down = side("down", steady(SLOT, 200), steady(SLOT16, 85), steady(SORTED, 88), steady(SORTED16, 90))
    assert pairs([up], [down]) == [(SORTED, SORTED)]


def test_the_defaults_order_stays_unless_another_is_measurably_faster_together() -> None:
    def at(sorted_us: float) -> list[tuple[TileConfig, TileConfig]]:
        up = side("up", steady(SLOT, 100), steady(SORTED, sorted_us))
        return pairs([up], [side("down", steady(SLOT, 100), steady(SORTED, 100))])

    assert at(99) == [(SLOT, SLOT)]
    assert at(90) == [(SORTED, SORTED)]


def test_each_bucket_has_its_own_order() -> None:
    up = [side("up", steady(SLOT, 100), steady(SORTED, us), tokens=t) for t, us in ((1, 150), (4, 50))]
    down = [side("down", steady(SLOT, 100), steady(SORTED, 100), tokens=t) for t in (1, 4)]
    assert pairs(up, down) == [(SLOT, SLOT), (SORTED, SORTED)]


def test_an_excluded_config_takes_its_order_along() -> None:
    up = side("up", steady(SLOT, 100), steady(SORTED, 50))
    down = side("down", steady(SLOT, 100), steady(SORTED, 100))
    assert pairs([up], [down]) == [(SORTED, SORTED)]
    assert pairs([up], [down], excluded_up={SORTED}) == [(SLOT, SLOT)]
    assert pairs([up], [down], excluded_down={SORTED}) == [(SLOT, SLOT)]


def test_groups_that_share_no_order_or_are_slow_in_it_give_way_to_a_pair_that_fits() -> None:
    fast = ORDERED.config(order="sorted", chunk_k=64)
    slow_in_slot = ORDERED.config(chunk_k=64)
    down = side("down", steady(SLOT, 50))
    assert pairs([side("up", steady(SLOT, 100), steady(fast, 20))], [down]) == [(SLOT, SLOT)]
    # Its group has a config in the right order, but the group's speed is in the other.
    up = side("up", steady(SLOT, 100), steady(fast, 20), steady(slow_in_slot, 300))
    assert pairs([up], [down]) == [(SLOT, SLOT)]


def test_no_order_in_common_is_a_device_error() -> None:
    up = side("up", steady(SORTED, 100), default=SORTED)
    with pytest.raises(DeviceError, match="same order of the intermediate"):
        pairs([up], [side("down", steady(SLOT, 100))])


def test_with_one_order_a_pair_is_what_each_gemm_chooses() -> None:
    rng = random.Random(9)
    configs = [KERNEL.config(row_block=b, chunk_k=c) for b in (0, 16, 64) for c in (0, 64)]
    for _ in range(20):
        buckets = [evidence(*[steady(c, rng.uniform(90, 110)) for c in configs], tokens=t) for t in (1, 4)]
        up, down = choose_pair(buckets, buckets, "reproducible")
        alone = choose(buckets, "reproducible")[1]
        assert up == alone and down == alone


def test_the_noise_of_a_sum_is_that_of_its_parts() -> None:
    a, b = (pool([steady(SLOT, us, spread=0.1)])[0][SLOT] for us in (300, 100))
    pair = pair_timing(a, b)
    assert pair.p50_us == pytest.approx(400)
    assert pair.error == pytest.approx(a.error * (300**2 + 100**2) ** 0.5 / 400)

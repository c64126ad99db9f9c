from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.autotune.shared import HERE, LAYER, measured
from tests.torch_kernel import SortedTorchKernel, TorchKernel
from tilecast.autotune.decide import decide
from tilecast.autotune.explain import Explanation, deciding_measurements, deciding_run, explain, series_of, table_costs
from tilecast.autotune.fates import Entrant
from tilecast.autotune.levels import levelled
from tilecast.autotune.plan import make_plan
from tilecast.autotune.prescreen import describe
from tilecast.autotune.timing import centre
from tilecast.cache_store.bundle import export_table, read_bundle
from tilecast.cache_store.memory import MemoryStore
from tilecast.errors import InputError
from tilecast.evidence import Measurement, TuningTable, percentile
from tilecast.kernels.spec import Registry
from tilecast.problem import TileConfig

KERNEL = TorchKernel("matmul")
REGISTRY = Registry((KERNEL,))
DEFAULT = KERNEL.config()
BLOCK16, BLOCK64 = KERNEL.config(row_block=16), KERNEL.config(row_block=64)
CHUNKED, CHUNKED16 = KERNEL.config(chunk_k=64), KERNEL.config(chunk_k=64, row_block=16)
TRANSPOSED = KERNEL.config(layout="transposed")
MATMUL = KERNEL.config(variant="matmul")
TOKENS = (1, 4)
PLAN = make_plan([LAYER], TOKENS, HERE)


def rounds_of(
    config: TileConfig, us: float, *, rounds: int = 3, kernels: Registry = REGISTRY, **fields: object
) -> list[Measurement]:
    """Return six samples around `us` for each round, 1% apart at most."""
    return [
        measured(
            config, *[us * (1 + 0.001 * (i - 2.5)) for i in range(6)], round=r,
            numerics=describe(LAYER.up, config, HERE, kernels).numerics, **fields,
        )
        for r in range(rounds)
    ]  # fmt: skip


def stored(*measurements: list[Measurement]) -> MemoryStore:
    store = MemoryStore()
    store.add_environment(HERE)
    store.add_measurements([m for of in measurements for m in of])
    return store


def everywhere(config: TileConfig, *us: float, rounds: int = 3) -> list[Measurement]:
    """Return measurements of a config for both GEMMs at each of `TOKENS`."""
    return [
        m
        for gemm in LAYER.gemms
        for tokens, value in zip(TOKENS, us, strict=True)
        for m in rounds_of(config, value, rounds=rounds, gemm=gemm, tokens=tokens)
    ]


def explained(store: MemoryStore, tokens: int = 4, table: TuningTable | None = None, **options: object) -> Explanation:
    table = table or decide(PLAN, store, REGISTRY, verify=False)
    decision = next(d for d in table.decisions if d.bucket.tokens == tokens)
    return explain(decision, series_of(decision, table), store.measurements(), HERE, REGISTRY, **options)  # type: ignore[arg-type]


def fates(explanation: Explanation) -> dict[TileConfig, Entrant]:
    return {e.config: e for e in explanation.races[0].entrants}


# What became of each


def test_a_duplicate_is_told_from_what_failed() -> None:
    twin = measured(BLOCK16, status="duplicate", detail="its launches are those of another")
    found = fates(explained(stored(everywhere(DEFAULT, 100, 100), [twin])))
    assert (found[BLOCK16].fate, found[BLOCK16].reason) == ("duplicate", "its launches are those of another")
    assert next(iter(found)) == DEFAULT, "without times it comes last"


def test_every_config_has_one_fate_and_a_reason() -> None:
    store = stored(
        everywhere(DEFAULT, 100, 100),
        everywhere(BLOCK16, 80, 80),
        everywhere(BLOCK64, 80.2, 80.2),
        everywhere(CHUNKED, 70, 300),
        everywhere(TRANSPOSED, 95, 95),
        everywhere(MATMUL, 60, 60),
        everywhere(CHUNKED16, 400, 400, rounds=1),
        [measured(KERNEL.config(row_block=3), status="wrong_result", detail="off by 7", error_ratio=12.0)],
    )
    found = fates(explained(store))
    chosen = min((BLOCK16, BLOCK64), key=lambda c: c.sort_key)
    other = BLOCK64 if chosen == BLOCK16 else BLOCK16
    assert {c: e.fate for c, e in found.items()} == {
        chosen: "chosen", other: "tie", DEFAULT: "slower", CHUNKED: "other group", TRANSPOSED: "other group",
        MATMUL: "not batch-invariant", CHUNKED16: "cut", KERNEL.config(row_block=3): "failed",
    }  # fmt: skip
    assert "weight layout" in found[TRANSPOSED].reason and "class " in found[CHUNKED].reason
    failed = found[KERNEL.config(row_block=3)]
    assert failed.reason == "wrong_result on rank 0: off by 7; error 12× torch's" and failed.error_ratio == 12
    assert found[CHUNKED16].cut_after == 0 and "after round 1: 6.667× the best" in found[CHUNKED16].reason


def test_a_tie_says_what_broke_it() -> None:
    def noisy(config: TileConfig, us: float) -> list[Measurement]:
        # Each config in an order of its own: what all share in a sample is the round's.
        turn = [DEFAULT, BLOCK16, BLOCK64].index(config)
        spread = [us * (1 + 0.05 * ((5 * turn + (1, 3, 5)[turn] * i) % 7 - 3)) for i in range(7)]
        numerics = describe(LAYER.up, config, HERE, REGISTRY).numerics
        return [
            measured(config, *spread, gemm=gemm, tokens=tokens, numerics=numerics)
            for gemm in LAYER.gemms for tokens in TOKENS
        ]  # fmt: skip

    first, second = sorted((BLOCK16, BLOCK64), key=lambda config: config.sort_key)
    for (first_us, second_us), chosen, other, reason in (
        ((80.4, 80.0), first, second, "first in order"),
        ((82.0, 80.0), second, first, "the faster one"),
        ((80.0, 82.0), first, second, "the faster one"),
    ):
        store = stored(noisy(DEFAULT, 200.0), noisy(first, first_us), noisy(second, second_us))
        found = fates(explained(store))
        assert (found[chosen].fate, found[other].fate) == ("chosen", "tie")
        assert found[other].reason.endswith(reason)


def test_a_config_that_was_dropped_though_slower_ones_ran_on_is_left_out_not_cut() -> None:
    store = stored(
        everywhere(DEFAULT, 100, 100),
        everywhere(BLOCK16, 80, 80, rounds=1),
        everywhere(BLOCK64, 50, 50),
        everywhere(CHUNKED, 85, 85),
        everywhere(CHUNKED16, 90, 90),
    )
    entrant = fates(explained(store))[BLOCK16]
    assert entrant.fate == "left out" and "1 slower ran on" in entrant.reason
    # Only the default ran on slower: that one always does.
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 80, 80, rounds=1), everywhere(BLOCK64, 50, 50))
    assert fates(explained(store))[BLOCK16].fate == "cut"


def test_a_broken_class_is_named() -> None:
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 50, 50))
    store.add_measurements([measured(BLOCK16, status="unstable", round=1 << 30, tokens=1)])
    explanation = explained(store)
    assert fates(explanation)[BLOCK16].fate == "class check"
    assert explanation.decision.up.config == DEFAULT and explanation.repeated


def test_who_came_late_has_too_few_samples_to_win() -> None:
    late = [m for g in LAYER.gemms for t in TOKENS for m in rounds_of(BLOCK16, 50, gemm=g, tokens=t) if m.round == 2]
    entrant = fates(explained(stored(everywhere(DEFAULT, 100, 100), late)))[BLOCK16]
    assert (entrant.fate, entrant.reason) == ("few samples", "6 of up to 18 samples: fewer than half")


def test_the_faster_order_of_one_gemm_gives_way_to_both_together() -> None:
    kernel = SortedTorchKernel("matmul")
    registry, plan = Registry((kernel,)), make_plan([LAYER], [4], HERE)
    slot, ordered = kernel.config(), kernel.config(order="sorted")
    up = rounds_of(slot, 100, kernels=registry) + rounds_of(ordered, 80, kernels=registry)
    down = [
        m
        for config, us in ((slot, 100), (ordered, 150))
        for m in rounds_of(config, us, gemm=LAYER.down, kernels=registry)
    ]
    store = stored(up, down)
    table = decide(plan, store, registry, verify=False)
    found = explain(table.decisions[0], table.decisions, store.measurements(), HERE, registry)
    assert {e.config: e.fate for e in found.races[0].entrants} == {ordered: "other order", slot: "chosen"}
    assert found.repeated and "chosen in slot" in found.races[0].entrants[0].reason
    assert found.cost is not None and found.cost.overall.class_us == pytest.approx(200)


def test_the_slowest_rank_is_the_one_shown() -> None:
    both = {"world_size": 2}
    slow = [m for us, rank in ((80, 0), (90, 1)) for m in rounds_of(BLOCK16, us, rank=rank, **both)]
    default = [m for rank in (0, 1) for m in rounds_of(DEFAULT, 100, rank=rank, **both)]
    one_rank = rounds_of(BLOCK64, 10, **both)
    plan = make_plan([LAYER], [4], HERE)
    down = [m for rank in (0, 1) for m in rounds_of(DEFAULT, 100, rank=rank, gemm=LAYER.down, **both)]
    store = stored(slow, default, one_rank, down)
    explanation = explained(store, table=decide(plan, store, REGISTRY, verify=False))
    found = fates(explanation)
    assert explanation.races[0].ranks == 2
    assert (found[BLOCK16].rank, found[BLOCK16].samples, found[BLOCK16].fate) == (1, 18, "chosen")
    assert found[BLOCK64].fate == "partial"


# Numbers that can be computed again


def test_every_number_is_that_of_the_exported_measurements(tmp_path: Path) -> None:
    store = stored(
        everywhere(DEFAULT, 100, 110), everywhere(BLOCK16, 80, 70), everywhere(CHUNKED, 60, 90),
        everywhere(BLOCK64, 200, 200, rounds=1),
    )  # fmt: skip
    table = decide(PLAN, store, REGISTRY, verify=False)
    store.add_measurements(rounds_of(DEFAULT, 5, run=1, tokens=99))
    file = tmp_path / "table.db"
    export_table(table, file, deciding_measurements(table, store))
    bundle = read_bundle(file, measurements=True)
    assert bundle.table.digest == table.digest and not any(m.tokens == 99 for m in bundle.measurements)
    for decision in bundle.table.decisions:
        found = explain(decision, series_of(decision, bundle.table), bundle.measurements, HERE, REGISTRY)
        assert found.repeated is True and found.notes == ()
        for race in found.races:
            choice = decision.choice(race.gemm.name)
            timed: dict[TileConfig, dict[tuple[int, int], float]] = {}
            for m in bundle.measurements:
                if (m.gemm, m.tokens) == (race.gemm, decision.bucket.tokens):
                    of_config = timed.setdefault(m.config, {})
                    of_config.update({(m.round, i): us for i, us in enumerate(m.samples_us)})
            assert {e.config for e in race.entrants} == set(timed) and race.as_stored
            for entrant in race.entrants:
                samples = levelled(timed)[entrant.config]
                assert entrant.p50_us == pytest.approx(centre(samples), rel=1e-12)
                assert (entrant.p20_us, entrant.p80_us) == (percentile(samples, 20), percentile(samples, 80))
                assert entrant.samples == len(samples)
                assert entrant.ratio == pytest.approx(centre(samples) / choice.p50_us, rel=1e-12)


def test_a_later_run_does_not_pass_for_the_one_that_decided() -> None:
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 80, 80))
    table = decide(PLAN, store, REGISTRY, verify=False)
    store.add_measurements(
        [m for us, c in ((100, DEFAULT), (150, BLOCK16)) for g in LAYER.gemms for t in TOKENS
         for m in rounds_of(c, us, gemm=g, tokens=t, run=1)]
    )  # fmt: skip
    found = explained(store, table=table)
    assert {race.run for race in found.races} == {0} and found.repeated and found.races[0].as_stored
    assert {m.run for m in deciding_measurements(table, store)} == {0}


def test_times_that_do_not_fit_the_decision_are_told() -> None:
    table = decide(PLAN, stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 80, 80)), REGISTRY, verify=False)
    other = stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 95, 95))
    found = explained(other, table=table)
    assert found.repeated is False and not found.races[0].as_stored


def test_without_measurements_the_decision_itself_is_left() -> None:
    table = decide(PLAN, stored(everywhere(DEFAULT, 100, 100)), REGISTRY, verify=False)
    found = explained(stored(), table=table)
    assert found.races == () and found.cost is None and found.repeated is None
    assert "no measurements" in found.notes[0]


def test_other_kernel_sources_leave_times_and_say_so() -> None:
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 80, 80), everywhere(CHUNKED, 70, 90))
    table = decide(PLAN, store, REGISTRY, verify=False)
    decision = table.decisions[1]
    found = explain(decision, table.decisions, store.measurements(), HERE, None)
    assert found.cost is None and "other kernel sources" in found.notes[0]
    assert {e.config for e in found.races[0].entrants} == {DEFAULT, BLOCK16, CHUNKED}
    assert found.races[0].entrants[0].layout is None


@pytest.mark.parametrize("strange", [TileConfig("no.such_kernel"), TileConfig("torch.moe_gemm", {"chunk_k": -5})])
def test_a_config_that_no_kernel_here_knows_keeps_its_times(strange: TileConfig) -> None:
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 80, 80))
    table = decide(PLAN, store, REGISTRY, verify=False)
    store.add_measurements(
        [measured(strange, *[50 + i for i in range(18)], gemm=g, tokens=t) for g in LAYER.gemms for t in TOKENS]
    )
    entrant = fates(explained(store, table=table))[strange]
    assert entrant.p50_us == 58.5 and entrant.layout is None
    unknown = [
        replace(m, config=strange) if (m.config, m.gemm) == (DEFAULT, LAYER.up) else m for m in store.measurements()
    ]
    odd = [replace(d, up=replace(d.up, default=strange)) for d in table.decisions]
    found = explain(odd[0], odd, unknown, HERE, REGISTRY)
    assert found.cost is None and found.repeated is None and "no kernel here knows" in found.notes[0]


def test_a_table_that_lacks_a_bucket_compares_no_classes() -> None:
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 80, 80))
    table = decide(PLAN, store, REGISTRY, verify=False)
    part = [m for m in store.measurements() if m.tokens == 4]
    found = explain(table.decisions[1], table.decisions, part, HERE, REGISTRY)
    assert len(found.races) == 2 and found.cost is None and found.repeated is None
    assert "other buckets" in found.notes[0]


def test_the_deciding_run_is_none_where_the_default_never_ran() -> None:
    table = decide(PLAN, stored(everywhere(DEFAULT, 100, 100)), REGISTRY, verify=False)
    assert deciding_run(rounds_of(BLOCK16, 80), table.decisions[0].up) is None


# Weights


def flips() -> MemoryStore:
    """Return a store where one class is best at 1 token and another at 4."""
    return stored(everywhere(DEFAULT, 100, 1000), everywhere(CHUNKED, 50, 1500), everywhere(TRANSPOSED, 90, 900))


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (None, CHUNKED),  # √(50·1500) < √(90·900) < √(100·1000)
        ({1: 0.99, 4: 0.01}, CHUNKED),  # 64.5 against 98.1
        ({1: 0.9, 4: 0.1}, TRANSPOSED),  # 171 against 195
        ({1: 9, 4: 1}, TRANSPOSED),  # counts are as good as shares
        ({1: 1.0}, CHUNKED),
        ({2: 1.0}, TRANSPOSED),  # 2 tokens are of the bucket that ends at 4
    ],
)
def test_the_class_follows_the_workload(weights: dict[int, float] | None, wanted: TileConfig) -> None:
    store = flips()
    table = decide(PLAN, store, REGISTRY, verify=False, weights=weights)
    assert {(d.up.config, d.down.config) for d in table.decisions} == {(wanted, wanted)}
    found = explained(store, table=table, weights=weights)
    assert found.repeated is True
    groups = found.races[0].groups
    assert min(groups, key=lambda g: groups[g]) == found.races[0].group


def test_the_default_class_stays_unless_beaten_beyond_noise_under_weights_too() -> None:
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(TRANSPOSED, 99.5, 50))

    def of(weights: dict[int, float]) -> set[TileConfig]:
        return {d.up.config for d in decide(PLAN, store, REGISTRY, verify=False, weights=weights).decisions}

    assert of({1: 1}) == {DEFAULT}
    assert of({1: 1, 4: 1}) == {TRANSPOSED}


@pytest.mark.parametrize("weights", [{1: -1.0}, {1: float("nan")}, {64: 1.0}, {}])
def test_weights_that_say_nothing_are_refused(weights: dict[int, float]) -> None:
    with pytest.raises(InputError, match="weight"):
        decide(PLAN, flips(), REGISTRY, verify=False, weights=weights)


# The cost of reproducibility


def test_costs_are_those_computed_by_hand() -> None:
    # Class DEFAULT's in the plain layout, CHUNKED in plain too, TRANSPOSED in its own layout.
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(CHUNKED, 50, 300), everywhere(TRANSPOSED, 120, 80))
    table = decide(PLAN, store, REGISTRY, verify=False)
    assert {d.up.config for d in table.decisions} == {TRANSPOSED}  # √(120·80) < √(100·100)
    cost = explained(store, table=table).cost
    assert cost is not None
    one, four = cost.buckets
    # Plain is the best single layout: √(50·100) < √(120·80).
    assert (one.class_us, one.layout_us, one.free_us) == pytest.approx((240, 100, 100))
    assert (four.class_us, four.layout_us, four.free_us) == pytest.approx((160, 200, 160))
    assert (four.bits, four.layout, four.total) == pytest.approx((0.8, 1.25, 1.0))
    assert cost.overall.total == pytest.approx(2.4**0.5) and cost.overall.bits == pytest.approx((2.4 * 0.8) ** 0.5)
    assert cost.overall.layout == pytest.approx(1.25**0.5) and 0 < cost.overall.noise < 0.05
    ((key, same),) = table_costs(table, store.measurements(), REGISTRY).items()
    assert same == cost and key == table.decisions[0].sort_key[:4]


def test_the_overall_cost_is_weighted() -> None:
    store = flips()
    weights = {1: 0.9, 4: 0.1}
    table = decide(PLAN, store, REGISTRY, verify=False, weights=weights)
    cost = explained(store, table=table, weights=weights).cost
    assert cost is not None
    assert cost.overall.class_us == pytest.approx(2 * (0.9 * 90 + 0.1 * 900))
    assert cost.overall.free_us == pytest.approx(2 * (0.9 * 50 + 0.1 * 900))


def test_a_lucky_few_samples_are_no_cost() -> None:
    lucky = [
        measured(MATMUL, 10, gemm=gemm, tokens=tokens) for gemm in LAYER.gemms for tokens in TOKENS
    ]  # fmt: skip
    cost = explained(stored(everywhere(DEFAULT, 100, 100), lucky)).cost
    assert cost is not None and cost.overall.total == 1
    cost = explained(stored(everywhere(DEFAULT, 100, 100), everywhere(MATMUL, 80, 80))).cost
    assert cost is not None and cost.overall.total == pytest.approx(1.25)


def test_a_config_of_a_broken_class_counts_as_other_bits() -> None:
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(BLOCK16, 50, 50))
    for gemm in LAYER.gemms:
        store.add_measurements([measured(BLOCK16, status="unstable", round=1 << 30, tokens=1, gemm=gemm)])
    cost = explained(store).cost
    assert cost is not None and cost.overall.bits == pytest.approx(2) and cost.overall.layout == 1


def test_fastest_pays_nothing_for_bits() -> None:
    store = stored(everywhere(DEFAULT, 100, 100), everywhere(MATMUL, 50, 50))
    plan = make_plan([LAYER], TOKENS, HERE, policy="fastest")
    table = decide(plan, store, REGISTRY)
    found = explained(store, table=table)
    assert found.cost is None and found.repeated is True and table_costs(table, store.measurements(), REGISTRY) == {}

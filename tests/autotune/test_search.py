"""Search strategies: what they start with, whom they drop, and that they find the best over given times."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest

from tests.autotune.shared import HERE, LAYER
from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.search import EFFORTS, STRATEGIES, Halving, Strategy, View, strategy_for
from tilecast.autotune.search.elimination import survivors
from tilecast.autotune.search.ranked import Ranked, expected_loss
from tilecast.autotune.timing import Timing, fastest, pool
from tilecast.errors import UsageError
from tilecast.evidence import Measurement
from tilecast.problem import TileConfig


def config(number: int) -> TileConfig:
    return TileConfig("fake.kernel", {"block": number})


CANDIDATES = tuple(
    Candidate(config=config(i), numerics="a", layout="plain", batch_invariant=True, is_default=i == 0)
    for i in range(40)
)


def true_us(c: TileConfig) -> float:
    """The best is 27, the neighbours are near it."""
    return 100.0 * (1 + 0.02 * abs(c.integer("block") - 27))


def view(round: int, **fields: object) -> View:
    configs = [c.config for c in CANDIDATES]
    given: dict[str, object] = {
        "gemm": LAYER.up, "tokens": 4, "policy": "reproducible", "round": round, "candidates": CANDIDATES,
        "must": (config(0),), "hints": (), "expected": dict.fromkeys(configs, 0.0), "doubt": 0.25, "ran": (),
        "timings": {}, "failed": frozenset(), "drawn": tuple(random.Random(3).sample(configs, len(configs))),
    }  # fmt: skip
    return View(**{**given, **fields})  # type: ignore[arg-type]


def search(
    strategy: Strategy, *, noise: float = 0.01, expected: dict[TileConfig, float] | None = None, seed: int = 0
) -> tuple[TileConfig, int, list[tuple[TileConfig, ...]]]:
    """Run a strategy over `true_us`; return the best config, the samples taken and the rounds' configs."""
    rng = random.Random(seed)
    made: list[Measurement] = []
    rounds: list[tuple[TileConfig, ...]] = []
    for number in range(strategy.rounds):
        turn = strategy.turn(
            view(
                number, timings=pool(made)[0], ran=tuple(frozenset(r) for r in rounds),
                **({} if expected is None else {"expected": expected, "doubt": 0.05}),
            )
        )  # fmt: skip
        if turn is None:
            break
        assert len(set(turn.configs)) == len(turn.configs) and turn.samples >= 1
        rounds.append(turn.configs)
        for c in turn.configs:
            samples = tuple(true_us(c) * math.exp(noise * rng.gauss(0, 1)) for _ in range(turn.samples))
            made.append(
                Measurement(
                    environment=HERE.digest, gemm=LAYER.up, tokens=4, config=c, samples_us=samples, round=number
                )
            )
    return fastest(pool(made)[0].values()).config, sum(len(m.samples_us) for m in made), rounds


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_starts_with_what_must_run_and_ends(name: str) -> None:
    must = (config(0), config(31))
    turn = strategy_for(name).turn(view(0, must=must))
    assert turn is not None and set(must) <= set(turn.configs)
    assert strategy_for(name).turn(view(strategy_for(name).rounds, ran=((config(0),),))) is None


@pytest.mark.parametrize("name", ["halving", "exhaustive"])
def test_who_sees_all_finds_the_best(name: str) -> None:
    assert search(strategy_for(name), noise=0.003)[0] == config(27)


def test_a_good_ranking_saves_nearly_everything() -> None:
    expected = {c.config: math.log(true_us(c.config)) for c in CANDIDATES}
    found, samples, rounds = search(Ranked(), expected=expected)
    assert abs(found.integer("block") - 27) <= 1
    assert samples < 0.1 * 20 * len(CANDIDATES)
    assert config(0) in rounds[-1]


def test_a_useless_ranking_costs_more_and_is_noticed() -> None:
    """All expected alike: the start is a sample, and what joins follows what was measured."""
    _, few, rounds = search(Ranked(), expected=dict.fromkeys((c.config for c in CANDIDATES), 0.0))
    assert len({c for configs in rounds for c in configs}) > len(rounds[0])
    assert few < 20 * len(CANDIDATES)


def test_hints_start_whatever_is_expected_of_them() -> None:
    expected = {c.config: float(c.config.integer("block")) for c in CANDIDATES}
    turn = Ranked().turn(view(0, expected=expected, hints=(config(39),), doubt=0.05))
    assert turn is not None and config(39) in turn.configs and config(1) in turn.configs
    assert config(38) not in turn.configs


def test_what_failed_never_joins() -> None:
    timings = {config(i): Timing(config=config(i), p50_us=100.0 + i, error=0.01, samples=2) for i in range(4)}
    ran = (frozenset(config(i) for i in range(5)),)
    expected = {c.config: -float(c.config.integer("block") in (4, 5)) for c in CANDIDATES}
    turn = Ranked().turn(view(1, timings=timings, ran=ran, failed=frozenset([config(4)]), expected=expected))
    assert turn is not None and config(4) not in turn.configs and config(5) in turn.configs


def test_equal_views_give_equal_turns() -> None:
    for name in STRATEGIES:
        assert strategy_for(name).turn(view(0)) == strategy_for(name).turn(view(0))


def test_survivors_keep_who_may_be_the_best_and_the_default() -> None:
    def timing(number: int, us: float, error: float = 0.01) -> Timing:
        return Timing(config=config(number), p50_us=us, error=error, samples=3)

    timings = {t.config: t for t in (timing(0, 500.0), timing(1, 100.0), timing(2, 102.0), timing(3, 110.0))}
    kept = survivors(CANDIDATES[:4], timings, policy="reproducible")
    assert [c.config for c in kept] == [config(0), config(1), config(2)]
    unsure = {**timings, config(3): timing(3, 110.0, error=0.2)}
    assert config(3) in {c.config for c in survivors(CANDIDATES[:4], unsure, policy="reproducible")}
    assert len(survivors(CANDIDATES[:4], unsure, policy="reproducible", at_most=1)) == 2
    assert survivors(CANDIDATES[:4], {}, policy="reproducible") == []


def test_efforts_are_strategies_and_a_wrong_one_is_one_line() -> None:
    assert set(EFFORTS) == {"quick", "standard", "exhaustive"} and set(EFFORTS.values()) <= set(STRATEGIES)
    assert isinstance(strategy_for("halving"), Halving)
    with pytest.raises(UsageError, match="quick, standard, exhaustive"):
        strategy_for("thorough")


def test_more_effort_finds_no_worse_ones() -> None:
    """Over seeds, with a ranking that is right but for noise."""

    def regret(name: str, seed: int) -> float:
        rng = random.Random(seed)
        expected = {c.config: math.log(true_us(c.config)) + 0.1 * rng.gauss(0, 1) for c in CANDIDATES}
        return true_us(search(strategy_for(name), noise=0.03, expected=expected, seed=seed)[0]) / 100.0 - 1

    quick, standard = ([regret(name, seed) for seed in range(20)] for name in ("quick", "standard"))
    assert median(standard) <= median(quick) + 0.021
    assert median(quick) < 0.1


def timing(us: float, error: float) -> Timing:
    return Timing(config=config(0), p50_us=us, error=error, samples=9)


def test_what_a_choice_is_expected_to_lose() -> None:
    generator = random.Random(5)
    for gap, error in ((0.0, 0.02), (0.03, 0.01), (-0.03, 0.02)):
        drawn = [max(0.0, generator.gauss(gap, error)) for _ in range(20_000)]
        found = expected_loss(timing(100 * (1 + gap), error), timing(100, 0.0))
        assert found == pytest.approx(sum(drawn) / len(drawn), rel=0.05), (gap, error)
    assert expected_loss(timing(103, 0), timing(100, 0)) == pytest.approx(0.03)
    assert expected_loss(timing(100, 0), timing(103, 0)) == 0

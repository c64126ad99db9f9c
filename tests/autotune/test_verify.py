from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from tests.store_contract import CONFIG, LAYER, OTHER, decision
from tilecast.autotune.gate import Verdict
from tilecast.autotune.verify import SAMPLES, Verified, sample_decided, verify
from tilecast.evidence import Choice, Decision
from tilecast.problem import ExpertGemm, TileConfig


class Scripted:
    """A measurer whose device takes given times, alike in every launch."""

    def __init__(self, us: Mapping[TileConfig, float | Exception]) -> None:
        self.us = us
        self.order: list[tuple[int, TileConfig]] = []

    def prepare(self, gemm: ExpertGemm) -> None:
        pass

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        raise NotImplementedError

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        self.order.append((round, config))
        us = self.us[config]
        if isinstance(us, Exception):
            raise us
        return (us,) * count

    def release(self, gemm: ExpertGemm) -> None:
        pass


TUNED = Choice(config=CONFIG, p50_us=80.0, default=OTHER, default_us=100.0, noise=0.02)


def verified(us: float | Exception, default_us: float | Exception, choice: Choice = TUNED) -> Verified:
    made = decision(up=choice, down=choice)
    return verify(Scripted({choice.config: us, choice.default: default_us}), made, LAYER.up, rounds=3)


@pytest.mark.parametrize(
    ("us", "default_us", "verdict"),
    [
        (80.0, 100.0, "holds"),
        (81.0, 100.0, "holds"),  # within the noise
        (60.0, 100.0, "holds"),  # faster is no drift
        (90.0, 112.0, "slower"),
        (100.0, 100.0, "no win"),
        (100.0, 90.0, "no win"),
        (79.0, 79.0, "no win"),  # as fast as stored, but so is the default now
        (95.0, 100.0, "slower"),  # still a win
    ],
)
def test_verdicts(us: float, default_us: float, verdict: str) -> None:
    found = verified(us, default_us)
    assert found.verdict == verdict
    assert found.drifted is (verdict != "holds")
    assert (found.p50_us, found.default_us) == pytest.approx((us, default_us))


def test_the_stored_noise_counts() -> None:
    assert verified(90.0, 112.0, replace(TUNED, noise=0.2)).verdict == "holds"


def test_a_small_win_is_not_lost_within_noise() -> None:
    small = replace(TUNED, default_us=82.0)
    assert verified(80.0, 80.5, small).verdict == "holds"


def test_a_kept_default_is_compared_with_its_own_time() -> None:
    kept = replace(TUNED, config=OTHER, p50_us=100.0)
    for us, verdict in ((100.0, "holds"), (110.0, "slower")):
        found = verified(us, us, kept)
        assert found.verdict == verdict


@pytest.mark.parametrize(
    ("us", "detail"), [(120.0, "+50.0% against the stored time"), (160_000.0, "2,000.0 × the stored time")]
)
def test_how_much_slower_is_said_in_words_that_can_be_read(us: float, detail: str) -> None:
    assert verified(us, 2 * us).detail == detail


def test_a_config_that_fails_has_drifted() -> None:
    found = verified(RuntimeError("no such instruction"), 100.0)
    assert found.verdict == "fails"
    assert found.detail == "the decided config: runtime_error: RuntimeError: no such instruction"
    assert verified(80.0, MemoryError("none left")).detail.startswith("the default: resource: ")


def test_both_run_in_every_round_and_take_turns() -> None:
    measurer = Scripted({CONFIG: 80.0, OTHER: 100.0})
    verify(measurer, decision(up=TUNED, down=TUNED), LAYER.up, rounds=2)
    assert measurer.order == [(0, CONFIG), (0, OTHER), (1, OTHER), (1, CONFIG)]
    assert SAMPLES > 1


def test_the_sample_is_drawn_by_seed() -> None:
    decisions: list[Decision] = [decision(n, n + 1) for n in range(50)]
    drawn = sample_decided(decisions, 10, seed=1)
    assert drawn == sample_decided(decisions, 10, seed=1) != sample_decided(decisions, 10, seed=2)
    assert len(set(drawn)) == 10
    places = [(d.bucket.tokens, gemm.name != "up") for d, gemm in drawn]
    assert places == sorted(places)
    assert len(sample_decided(decisions, 1000, seed=1)) == 100

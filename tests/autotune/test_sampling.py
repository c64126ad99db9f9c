from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.autotune.fake_times import FakeTimes
from tests.autotune.misbehaving import Misbehaving, behaving
from tests.autotune.shared import HERE, LAYER
from tests.cases import SMALL
from tests.torch_kernel import TorchKernel
from tilecast.autotune import measure, sampling, tuner
from tilecast.autotune.clock import Launch
from tilecast.autotune.gate import Verdict
from tilecast.autotune.measure import DeviceMeasurer, Together, _turns
from tilecast.autotune.peers import Alone
from tilecast.autotune.plan import make_plan
from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.sampling import Batch, Sampling
from tilecast.autotune.sandbox import SandboxMeasurer
from tilecast.autotune.session import Session
from tilecast.cache_store.memory import MemoryStore
from tilecast.environment import cpu_environment
from tilecast.errors import DeviceError
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig

KERNEL = TorchKernel()
REGISTRY = Registry((KERNEL,))
PLAN = make_plan([LAYER], [4], HERE)
GOOD, OTHER = behaving("well"), behaving("well", 1)


def by_block(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
    return 200.0 + abs(config.integer("row_block") - 16)


class TogetherTimes(FakeTimes):
    """Given times of configs that are sampled together; `groups` holds who was; `bad` ones raise."""

    groups: list[tuple[int, list[TileConfig]]]
    bad: frozenset[TileConfig] = frozenset()

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        if config in self.bad:
            raise RuntimeError("planted")
        return super().sample(gemm, tokens, config, round=round, count=count)

    def sample_together(
        self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig], *, round: int, count: int
    ) -> list[tuple[float, ...]]:
        self.groups.append((round, list(configs)))
        return [self.sample(gemm, tokens, config, round=round, count=count) for config in configs]


def together(bad: frozenset[TileConfig] = frozenset(), noise: float = 0.01) -> TogetherTimes:
    measurer = TogetherTimes(by_block, noise=noise)
    measurer.groups, measurer.bad = [], bad
    return measurer


def tuned(measurer: FakeTimes, store: MemoryStore | None = None, **options: Any) -> MemoryStore:
    store = store or MemoryStore()
    tuner.measure_plan(PLAN, store, REGISTRY, measurer=measurer, strategy="halving", **options)
    return store


def test_rounds_are_sampled_together_and_their_measurements_are_the_same() -> None:
    measurer = together()
    store = tuned(measurer)
    alone = tuned(FakeTimes(by_block, noise=0.01))
    assert {m.key: m.samples_us for m in store.measurements()} == {m.key: m.samples_us for m in alone.measurements()}
    rounds = Counter(m.round for m in store.measurements() if m.gemm == LAYER.up)
    assert [(r, len(group)) for r, group in measurer.groups[: len(rounds)]] == list(rounds.items())


def test_a_round_is_sampled_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = together()
    measurer.verdicts = {c: Verdict(launch_us=150e3) for c in KERNEL.space(LAYER.up, 4, HERE)}
    tuned(measurer)
    first = [group for r, group in measurer.groups if r == 0]
    # Of these, two take 0.3 s and three would take more than a stretch.
    assert {len(group) for group in first} <= {2, 3} and len(first) > 2


def test_the_one_that_fails_in_a_group_is_named_and_asked_for_no_more() -> None:
    bad = list(KERNEL.space(LAYER.up, 4, HERE))[2]
    measurer = together(frozenset([bad]))
    store = tuned(measurer)
    failed = [m for m in store.measurements() if m.status != "ok"]
    assert {(m.config, m.round, m.detail) for m in failed} == {(bad, 0, "RuntimeError: planted")}
    assert len(failed) == 2, "once for up and once for down"
    assert all(bad not in group for r, group in measurer.groups if r > 0)
    others = {m.config for m in store.measurements() if m.round == 0 and m.status == "ok"}
    assert others == {m.config for m in store.measurements()} - {bad}


class Busy:
    """A watch that sees the first `stretches` disturbed."""

    def __init__(self, stretches: int) -> None:
        self.left = stretches

    def read(self) -> None:
        return None

    def disturbed(self, start: object, end: object) -> str | None:
        self.left -= 1
        return "others" if self.left >= 0 else None


def test_a_disturbed_stretch_is_sampled_again_without_those_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.autotune.stretch.PAUSE_S", 0.0)
    monkeypatch.setattr("tilecast.autotune.stretch.MIN_STRETCH_S", 0.0)
    bad = list(KERNEL.space(LAYER.up, 4, HERE))[2]
    measurer, store = together(frozenset([bad])), MemoryStore()
    run = tuner.measure_plan(PLAN, store, REGISTRY, measurer=measurer, strategy="halving", watch=Busy(1))
    assert run.disturbed == 1
    first, again = (group for _, group in measurer.groups[:2])
    assert set(first) - set(again) == {bad}
    assert len(store.measurements()) == len({m.key for m in store.measurements()})
    assert {m.detail for m in store.measurements()} == {"", "RuntimeError: planted"}


class Killed(BaseException):
    """What ends a process in the middle, as Ctrl-C does."""


@pytest.mark.parametrize("kill_at", [0, 30, 70])
def test_a_killed_tuning_loses_the_samples_of_one_group(kill_at: int) -> None:
    def kill(batch: int) -> None:
        if batch == kill_at:
            raise Killed

    whole, store = tuned(together(noise=0.02)), MemoryStore()
    measurer = together(noise=0.02)
    measurer.on_sample = kill
    with pytest.raises(Killed):
        tuned(measurer, store)
    before = {m.key for m in store.measurements()}
    assert len(before) == sum(len(group) for _, group in measurer.groups[:-1])
    after = together(noise=0.02)
    tuned(after, store)
    assert after.batches == len(store.measurements()) - len(before)
    assert {m.key for m in store.measurements()} == {m.key for m in whole.measurements()}


def test_what_waits_counts_towards_a_budget() -> None:
    """Without it every config would be checked before the first sample shows that there is no time."""
    measurer = together()
    measurer.verdicts = {c: Verdict(launch_us=4e6) for c in KERNEL.space(LAYER.up, 4, HERE)}
    store = tuned(measurer, budget_s=30.0)
    assert 5 <= sum(m.gemm == LAYER.up for m in store.measurements()) < 12 < len(list(KERNEL.space(LAYER.up, 4, HERE)))
    assert {m.config for m in store.measurements()} >= {KERNEL.default(LAYER.up, 4, HERE)}


def test_those_that_wait_long_are_sampled_before_the_next_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WAIT_S", -1.0)
    measurer = together()
    tuned(measurer)
    assert measurer.groups == [], "nobody waited for a second one"


def test_a_crash_in_a_group_is_put_down_to_the_one_that_crashes(tmp_path: Path) -> None:
    crash = behaving("segfault")
    configs = [GOOD, crash, OTHER]
    with SandboxMeasurer(partial(Misbehaving, str(tmp_path)), check_limit_s=20.0, sample_limit_s=20.0) as sandbox:
        store = MemoryStore()
        store.add_environment(HERE)
        session = Session(plan=PLAN, store=store, measurer=sandbox, peers=Alone(), run=0)
        sandbox.prepare(SMALL.up)
        known = {c: Candidate(config=c, layout="", order="", numerics="", batch_invariant=True) for c in configs}
        batch = Batch(Sampling(session, SMALL.up, 4, known), 1, 2)
        for config in configs:
            batch.add(config, Verdict())
        found = {m.config: m for m in batch.close()}
    assert {config: m.status for config, m in found.items()} == {GOOD: "ok", crash: "runtime_error", OTHER: "ok"}
    assert "SIGSEGV" in found[crash].detail and found[GOOD].samples_us == (410.0, 411.0)


def test_a_measurer_that_cannot_measure_ends_the_tuning() -> None:
    def lost(batch: int) -> None:
        raise DeviceError("no device")

    measurer = together()
    measurer.on_sample = lost
    with pytest.raises(DeviceError, match="no device"):
        tuned(measurer)


class Counting:
    """A clock that counts the launches of each call; one takes 8 ms."""

    def __init__(self) -> None:
        self.launched: list[int] = []

    def time(self, launches: Sequence[Launch]) -> float:
        for launch in launches:
            launch()
        self.launched.append(len(launches))
        return 8000.0


def test_launches_take_turns_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Counting()
    measurer = DeviceMeasurer(cpu_environment(), REGISTRY, clock=clock)
    assert isinstance(measurer, Together)
    configs = list(dict.fromkeys(KERNEL.space(SMALL.up, 4, HERE)))[:3]
    for config in configs:
        assert measurer.check(SMALL.up, 4, config).launch_us > 0
    # Too short in the gate to tell how many make a sample, however busy this machine is.
    monkeypatch.setattr(measurer._gate, "launch_us", lambda *_: 0.0)
    assert measurer.sample_together(SMALL.up, 4, configs, round=1, count=2) == [(8000.0, 8000.0)] * 3
    # Three of 8 ms make a sample, each timed by itself, after two to warm up.
    assert clock.launched == [1] * (3 * 2 + 3 * 3 * 2)
    # No room for all layouts at once: whole samples, one config after the other.
    monkeypatch.setattr(measurer._workload, "fits", lambda gemm, stacks: False)
    clock.launched.clear()
    assert measurer.sample_together(SMALL.up, 4, configs, round=2, count=1) == [(8000.0,)] * 3
    assert clock.launched == [3] * 3
    measurer.release(SMALL.up)


def test_turns_spread_every_configs_launches_over_all_of_the_time() -> None:
    turns = _turns([8, 8, 2, 1], seed=3)
    assert Counter(turns) == {0: 8, 1: 8, 2: 2, 3: 1}
    halves = turns[: len(turns) // 2], turns[len(turns) // 2 :]
    assert [half.count(2) for half in halves] == [1, 1]
    assert all(3 <= half.count(0) <= 5 for half in halves)
    assert _turns([8, 8, 2, 1], seed=3) == turns != _turns([8, 8, 2, 1], seed=4)
    assert measure.MAX_REPEATS >= 8

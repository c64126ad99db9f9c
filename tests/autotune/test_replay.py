"""Sweeps: recorded, kept in a file, played back; and tuning over them without the device."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.regret_picture import picture
from benchmarks.strategies import by_file, compare, summary, true_times, unbiased
from tests.autotune.fake_times import FakeTimes
from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import TorchKernel
from tilecast.autotune.contention import CpuWatch, Reading
from tilecast.autotune.gate import Verdict
from tilecast.autotune.plan import make_plan
from tilecast.autotune.replay import Recorded, ReplayMeasurer, Sweep, load_sweeps, record_sweep, save_sweeps
from tilecast.autotune.tuner import measure_plan, tune
from tilecast.cache_store.memory import MemoryStore
from tilecast.environment import cpu_environment
from tilecast.errors import InputError
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig

KERNEL = TorchKernel()
REGISTRY = Registry((KERNEL,))
TOKENS = (4, 32)


def by_block(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
    return 200.0 + abs(config.integer("row_block") - min(tokens, 64)) + 30 * (config["layout"] == "transposed")


@pytest.fixture(scope="module")
def sweeps() -> list[Sweep]:
    measurer = FakeTimes(by_block, noise=0.01)
    return [
        record_sweep(gemm, tokens, HERE, REGISTRY, measurer, samples=8, all_tokens=TOKENS, watch=Silent())
        for gemm in LAYER.gemms
        for tokens in TOKENS
    ]


class Silent(CpuWatch):
    """Nothing is known of others."""

    def read(self) -> Reading | None:
        return None


class Scripted(CpuWatch):
    """Readings in which others use the CPUs in the first `busy` stretches."""

    def __init__(self, busy: int) -> None:
        super().__init__(cpus=frozenset([0]))
        self.busy = busy
        self.wall_s = 0.0

    def read(self) -> Reading | None:
        self.wall_s += 0.3
        return Reading(self.wall_s, 0.0, 0.0)

    def stolen(self, start: Reading | None, end: Reading | None) -> float | None:
        self.busy -= 1
        return 0.5 if self.busy >= 0 else 0.0


def test_every_candidate_is_recorded_the_default_first(sweeps: list[Sweep]) -> None:
    for sweep in sweeps:
        assert sweep.recorded[0].config == KERNEL.default(sweep.gemm, sweep.tokens, HERE)
        assert all(len(r.samples_us) in (3, 8) for r in sweep.recorded)
        assert sweep.best().config.integer("row_block") == (0 if sweep.tokens == 4 else 16)
    assert len(sweeps[0].recorded) == len({r.config for r in sweeps[0].recorded}) > 5


def test_hopeless_configs_run_less_often() -> None:
    def times(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        return 100.0 if config.integer("row_block") == 0 else 1000.0

    sweep = record_sweep(LAYER.up, 4, HERE, REGISTRY, FakeTimes(times), samples=6, watch=Silent())
    assert {len(r.samples_us) for r in sweep.recorded} == {3, 6}


def test_what_fails_is_recorded_with_its_reason() -> None:
    bad = next(KERNEL.space(LAYER.up, 4, HERE))
    measurer = FakeTimes(by_block, verdicts={bad: Verdict(status="wrong_result", detail="off by one")})
    sweep = record_sweep(LAYER.up, 4, HERE, REGISTRY, measurer, samples=2, watch=Silent())
    (found,) = [r for r in sweep.recorded if r.config == bad]
    assert (found.status, found.detail, found.samples_us) == ("wrong_result", "off by one", ())
    assert bad not in sweep.ok


def test_a_disturbed_stretch_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.autotune.replay.PAUSE_S", 0.0)
    quiet = record_sweep(LAYER.up, 4, HERE, REGISTRY, FakeTimes(by_block), samples=2, watch=Scripted(0))
    measurer = FakeTimes(by_block)
    sweep = record_sweep(LAYER.up, 4, HERE, REGISTRY, measurer, samples=2, watch=Scripted(3))
    assert sweep.retried == 3 and quiet.retried == 0 and sweep.stolen == 0.0
    assert all(len(r.samples_us) == 2 for r in sweep.recorded)


def test_files_hold_what_was_recorded(sweeps: list[Sweep], tmp_path: Path) -> None:
    save_sweeps(tmp_path / "layer.json", sweeps)
    found = load_sweeps(tmp_path / "layer.json")
    assert [(s.gemm, s.tokens, s.environment) for s in found] == [(s.gemm, s.tokens, HERE) for s in sweeps]
    for a, b in zip(found, sweeps, strict=True):
        assert [r.config for r in a.recorded] == [r.config for r in b.recorded]
        assert a.best().p50_us == pytest.approx(b.best().p50_us, abs=0.01)
    assert list(tmp_path.iterdir()) == [tmp_path / "layer.json"]


@pytest.mark.parametrize(
    "change", [{"format": 99}, {"sweeps": [{"layer": {}}]}, {"environment": {}}, {"sweeps": 3}], ids=str
)
def test_a_wrong_file_is_one_clear_line(change: dict[str, object], sweeps: list[Sweep], tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    save_sweeps(path, sweeps[:1])
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError) as error:
        load_sweeps(path)
    assert "\n" not in str(error.value)
    path.write_text("{")
    with pytest.raises(InputError, match=r"layer\.json"):
        load_sweeps(path)


def test_playing_back_repeats_itself_and_only_itself(sweeps: list[Sweep]) -> None:
    first, again, other = (ReplayMeasurer(sweeps, seed=seed) for seed in (0, 0, 1))
    config = sweeps[0].recorded[1].config
    asked = [(0, 1), (1, 3), (2, 2)]
    one = [first.sample(LAYER.up, 4, config, round=r, count=n) for r, n in asked]
    assert one == [again.sample(LAYER.up, 4, config, round=r, count=n) for r, n in asked]
    assert one != [other.sample(LAYER.up, 4, config, round=r, count=n) for r, n in asked]
    assert first.samples == 6 and first.elapsed_us == pytest.approx(sum(sum(samples) for samples in one))
    assert set(one[1]) <= set(sweeps[0].recorded[1].samples_us)


def test_configs_of_one_round_share_its_disturbance() -> None:
    """Recorded rounds have levels; in each round of the replay all configs are of the same recorded one."""
    sweep = record_sweep(LAYER.up, 4, HERE, REGISTRY, FakeTimes(by_block), samples=1, watch=Silent())
    configs = [r.config for r in sweep.recorded[:20]]
    recorded = tuple(
        Recorded(config=c, samples_us=tuple((1.0 + r) * (10 + i) for r in range(9))) for i, c in enumerate(configs)
    )
    measurer = ReplayMeasurer([Sweep(environment=HERE, gemm=LAYER.up, tokens=4, recorded=recorded)], seed=5)
    for number in range(6):
        levels = {
            round(measurer.sample(LAYER.up, 4, c, round=number, count=1)[0] / (10 + i), 6)
            for i, c in enumerate(configs)
        }
        assert len(levels) == 1


def test_what_was_not_recorded_is_an_error(sweeps: list[Sweep]) -> None:
    measurer = ReplayMeasurer(sweeps)
    with pytest.raises(InputError, match="99 tokens"):
        measurer.check(LAYER.up, 99, sweeps[0].recorded[0].config)
    with pytest.raises(InputError, match="not in the sweep"):
        measurer.check(LAYER.up, 4, TileConfig("torch.loop", {"none": 1}))


def test_tuning_over_sweeps_finds_their_best(sweeps: list[Sweep]) -> None:
    plan, store = make_plan([LAYER], TOKENS, HERE), MemoryStore()
    table = tune(plan, store, REGISTRY, measurer=ReplayMeasurer(sweeps), strategy="halving", verify=False)
    best = {(s.gemm.name, s.tokens): s.best().p50_us for s in sweeps}
    truth = {(s.gemm.name, s.tokens): s.ok for s in sweeps}
    for decision in table.decisions:
        for choice, name in ((decision.up, "up"), (decision.down, "down")):
            key = name, decision.bucket.tokens
            assert truth[key][choice.config].p50_us <= 1.05 * best[key]


def test_strategies_are_compared_by_regret_and_cost(
    sweeps: list[Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.strategies.default_registry", lambda: REGISTRY)
    save_sweeps(tmp_path / "layer.json", sweeps)
    table, outcomes = compare(tmp_path, ["ranked", "exhaustive"], 2)
    assert table["ranked"]["share_of_exhaustive"] < table["exhaustive"]["share_of_exhaustive"] <= 1
    assert table["exhaustive"]["median_regret"] < 0.02
    assert len(outcomes) == 2 * 2 * 4
    of_ranked = [o for o in outcomes if o.strategy == "ranked"]
    assert summary(of_ranked, [1.0]) == {**table["ranked"], "sampling_seconds": 1.0}
    assert all(o.regret >= 0 for o in outcomes)
    files = by_file(outcomes)["layer"]
    assert {name: row["median_regret"] for name, row in files.items()} == {
        name: row["median_regret"] for name, row in table.items()
    }
    assert table["ranked"]["slower_than_default"] == 0
    fewer, _ = compare(tmp_path, ["ranked", "exhaustive"], {"ranked": 2, "exhaustive": 1})
    assert fewer["ranked"] == table["ranked"]
    drawing = ElementTree.fromstring(picture("a < b", table))
    texts = {element.text for element in drawing.iter() if element.text}
    assert {"a < b", *table} <= texts


def test_the_unbiased_regret_is_free_of_the_winners_curse(sweeps: list[Sweep]) -> None:
    """All configs are equally fast: the plain regret of any of them is well above none, the unbiased one about none."""
    rng = random.Random(5)
    plain, fair = [], []
    for _ in range(60):
        recorded = tuple(
            replace(r, samples_us=tuple(100 * math.exp(0.06 * rng.gauss(0, 1)) for _ in range(14)))
            for r in sweeps[0].recorded
        )
        times = true_times(replace(sweeps[0], recorded=recorded))
        configs = [r.config for r in recorded]
        plain.append(times.us[configs[0]] / min(times.us.values()) - 1)
        fair.append(unbiased(times, configs[0], configs))
    assert sum(plain) / len(plain) > 0.015
    assert abs(sum(fair) / len(fair)) < 0.01


def test_a_real_sweep_can_be_tuned_over() -> None:
    from tilecast.autotune.measure import DeviceMeasurer

    here = cpu_environment()
    layer_sweeps = [
        record_sweep(gemm, 3, here, REGISTRY, DeviceMeasurer(here, REGISTRY), samples=2, watch=Silent())
        for gemm in LAYER.gemms
    ]
    plan, store = make_plan([LAYER], [3], here), MemoryStore()
    measure_plan(plan, store, REGISTRY, measurer=ReplayMeasurer(layer_sweeps), strategy="quick")
    assert {m.status for m in store.measurements()} == {"ok"}


def in_stretches(levels: list[float], *, configs: int = 20) -> Sweep:
    """Configs of 100, 101, … µs over six rounds of two stretches; round r's second stretch is slower by `levels[r]`."""
    space = [TileConfig("fake.kernel", {"block": place}) for place in range(configs)]
    # Whoever is drawn into the second stretch differs from round to round.
    drawn = [random.Random(number).sample(range(configs), configs // 2) for number in range(6)]
    recorded = []
    for place, config in enumerate(space):
        stretches = tuple(int(place in second) for second in drawn)
        samples = tuple((100.0 + place) * (levels[number] if second else 1) for number, second in enumerate(stretches))
        recorded.append(Recorded(config=config, samples_us=samples, stretches=stretches))
    return Sweep(environment=HERE, gemm=LAYER.up, tokens=4, recorded=tuple(recorded))


def test_stretches_of_a_round_are_put_at_one_level() -> None:
    sweep = in_stretches([1.3, 1.0, 1.2, 0.9, 1.1, 1.25])
    found = sweep.at_rounds_levels()
    for number in range(6):
        ratios = [r.samples_us[number] / (100 + place) for place, r in enumerate(found.recorded)]
        assert max(ratios) / min(ratios) == pytest.approx(1, abs=5e-3), "within a round all differ by their own times"
    assert {r.stretches for r in found.recorded} == {()}
    assert found.at_rounds_levels() == found, "and that is done once"
    # What is played back has it done.
    measurer = ReplayMeasurer([sweep])
    first, second = (measurer.sample(LAYER.up, 4, r.config, round=3, count=2) for r in sweep.recorded[:2])
    assert second[0] / first[0] == pytest.approx(101 / 100, rel=5e-3)


def test_stretches_of_few_configs_keep_their_levels() -> None:
    sweep = in_stretches([1.3] * 6, configs=6)
    assert [r.samples_us for r in sweep.at_rounds_levels().recorded] == [r.samples_us for r in sweep.recorded]


def test_stretches_are_recorded_and_kept_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tilecast.autotune.replay.MIN_STRETCH_S", 0.0)

    def slow(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        return 1e3 * by_block(gemm, tokens, config)

    sweep = record_sweep(LAYER.up, 4, HERE, REGISTRY, FakeTimes(slow), samples=2, watch=Silent())
    assert all(len(r.stretches) == len(r.samples_us) for r in sweep.recorded)
    assert {n for r in sweep.recorded for n in r.stretches} > {0}, "no round was longer than a stretch"
    save_sweeps(tmp_path / "layer.json", [sweep])
    assert [r.stretches for r in load_sweeps(tmp_path / "layer.json")[0].recorded] == [
        r.stretches for r in sweep.recorded
    ]
    text = (tmp_path / "layer.json").read_text()
    (tmp_path / "layer.json").write_text(text.replace('"stretches":[', '"stretches":[7,', 1))
    with pytest.raises(InputError, match="stretches are 3 numbers from 0, expected 2"):
        load_sweeps(tmp_path / "layer.json")

"""Compare search strategies over recorded sweeps: regret, measurements, simulated time; over many seeds.

`python -m benchmarks.strategies FOLDER [--strategies a,b:5] [--seeds 20] [--out FILE.json] [--plot FILE.svg]`. FOLDER
holds sweeps as `python -m benchmarks.sweep` writes them. Every strategy tunes every layer from nothing, all buckets in
one go, with times drawn from the sweeps. Regret is the chosen config's true time (the median of all recorded samples,
the rounds' levels taken out) over the best of all
configs that could have been chosen with the same weight layout and numerics class, minus one; measurements are samples,
as a share of 20 of every config, which is what an exhaustive tuning takes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.regret_picture import picture
from benchmarks.report import commit
from benchmarks.sweep import calibration_beside, sweep_files
from tilecast.autotune.calibrate import nominal
from tilecast.autotune.decide import decide
from tilecast.autotune.levels import levelled
from tilecast.autotune.plan import make_plan
from tilecast.autotune.rank import CostModel, ModelRanker
from tilecast.autotune.replay import FEW_ROUNDS, ReplayMeasurer, Sweep, load_sweeps
from tilecast.autotune.search import STRATEGIES
from tilecast.autotune.timing import noise, pool
from tilecast.autotune.tuner import NoRanker, Ranker, measure_plan
from tilecast.cache_store.memory import MemoryStore
from tilecast.engine.runtime import default_registry
from tilecast.environment import Environment
from tilecast.evidence import Measurement, percentile
from tilecast.kernels.spec import Kernel, Registry
from tilecast.problem import ExpertGemm, TileConfig

EXHAUSTIVE_SAMPLES = 20
"""Samples of every config in an exhaustive tuning; vLLM's takes the mean of as many."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """What a sweep says of its configs.

    `us` are the medians of all samples, `halves` those of the even and of the odd rounds, `noise` the relative
    difference from the default that the recorded samples cannot tell from none.
    """

    us: dict[TileConfig, float]
    halves: tuple[dict[TileConfig, float], dict[TileConfig, float]]
    noise: dict[TileConfig, float]


Truth = dict[tuple[ExpertGemm, int], Times]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One decision of one strategy with one seed; times in µs are the recorded medians.

    `unbiased` is the regret against the best of one half of the recorded rounds in the other half, the mean of both
    ways; `noise` what the recorded samples cannot tell from the default.
    """

    file: str
    gemm: str
    tokens: int
    strategy: str
    seed: int
    chosen_us: float
    best_us: float
    default_us: float
    share: float
    unbiased: float
    noise: float

    @property
    def regret(self) -> float:
        """How much slower the chosen config is than the best, as a fraction."""
        return self.chosen_us / self.best_us - 1


class _Remembered:
    """A ranker that is asked the same of every seed and strategy, and works it out once."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker = ranker
        self._said: dict[tuple[ExpertGemm, int, tuple[TileConfig, ...]], Mapping[TileConfig, float]] = {}

    def rank(self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig]) -> Mapping[TileConfig, float]:
        key = gemm, tokens, tuple(configs)
        if key not in self._said:
            self._said[key] = self._ranker.rank(gemm, tokens, configs)
        return self._said[key]


def replay(
    sweeps: Sequence[Sweep],
    truth: Truth,
    name: str,
    seed: int,
    registry: Registry,
    ranker: Ranker,
    *,
    file: str,
    policy: str,
) -> tuple[list[Outcome], float]:
    """Tune one layer over its sweeps; return the outcomes, and the seconds that its samples took when recorded."""
    by_task = {(sweep.gemm, sweep.tokens): sweep for sweep in sweeps}
    tokens = sorted({sweep.tokens for sweep in sweeps})
    environment = sweeps[0].environment
    layer = sweeps[0].gemm.layer
    plan = make_plan([layer], tokens, environment, policy=policy)
    store, measurer = MemoryStore(), ReplayMeasurer(sweeps, seed=seed)
    measure_plan(plan, store, registry, measurer=measurer, strategy=name, ranker=ranker, seed=seed)
    used: dict[tuple[object, int], int] = {}
    for m in store.measurements():
        used[m.gemm, m.tokens] = used.get((m.gemm, m.tokens), 0) + len(m.samples_us)
    found = []
    for decision in decide(plan, store, registry, verify=False).decisions:
        for gemm, choice in ((layer.up, decision.up), (layer.down, decision.down)):
            sweep = by_task[gemm, decision.bucket.tokens]
            kernel = registry[choice.config.kernel]
            times = truth[gemm, sweep.tokens]
            rivals = same_group(sweep, times.us, registry, environment, choice.config, kernel)
            found.append(
                Outcome(
                    file=file, gemm=gemm.name, tokens=sweep.tokens, strategy=name, seed=seed,
                    chosen_us=times.us[choice.config], best_us=min(times.us[c] for c in rivals),
                    default_us=times.us[sweep.recorded[0].config], unbiased=unbiased(times, choice.config, rivals),
                    noise=times.noise[choice.config],
                    share=used[gemm, sweep.tokens] / (EXHAUSTIVE_SAMPLES * len(sweep.recorded)),
                )
            )  # fmt: skip
    return found, measurer.elapsed_us / 1e6


def true_times(sweep: Sweep) -> Times:
    """Return what all recorded samples say, without the levels of the recorded rounds."""
    halves = [_medians(sweep, half) for half in (0, 1)]
    timings, _ = pool(
        Measurement(
            environment=sweep.environment.digest, gemm=sweep.gemm, tokens=sweep.tokens, config=r.config,
            samples_us=(us,), round=number,
        )
        for r in sweep.recorded
        if r.status == "ok"
        for number, us in enumerate(r.samples_us)
    )  # fmt: skip
    default = timings[sweep.recorded[0].config]
    return Times(
        us=_medians(sweep),
        halves=(halves[0], halves[1]),
        noise={config: noise(timing, default) for config, timing in timings.items()},
    )


def _medians(sweep: Sweep, half: int | None = None) -> dict[TileConfig, float]:
    moments = {
        r.config: {
            (i,): us for i, us in enumerate(r.samples_us)
            # Of hopeless configs, which have but a few samples, all are taken.
            if half is None or i % 2 == half or len(r.samples_us) <= FEW_ROUNDS
        }
        for r in sweep.recorded
        if r.status == "ok"
    }  # fmt: skip
    return {config: percentile(values, 50) for config, values in levelled(moments).items()}


def unbiased(times: Times, chosen: TileConfig, rivals: Sequence[TileConfig]) -> float:
    """Return the regret against what one half of the rounds shows to be best, in the other half; of both ways."""
    first, second = times.halves
    ways = ((first, second), (second, first))
    return sum(seen[chosen] / seen[min(rivals, key=lambda c: told[c])] for told, seen in ways) / 2 - 1


def same_group(
    sweep: Sweep,
    true_us: dict[TileConfig, float],
    registry: Registry,
    environment: Environment,
    chosen: TileConfig,
    kernel: Kernel,
) -> list[TileConfig]:
    """Return all configs with the chosen one's weight layout and numerics."""
    gemm = sweep.gemm
    layout, numerics = kernel.layout(gemm, chosen), kernel.numerics(gemm, chosen, environment)
    return [
        config
        for config in true_us
        if registry[config.kernel].layout(gemm, config) == layout
        and registry[config.kernel].numerics(gemm, config, environment) == numerics
    ]


def summary(outcomes: Sequence[Outcome], seconds: Sequence[float]) -> dict[str, float]:
    """Return the figures that strategies are compared by."""
    regrets = [o.regret for o in outcomes]
    share = sum(o.share for o in outcomes) / len(outcomes)
    return {
        "median_regret": median(regrets),
        "p95_regret": percentile(regrets, 95),
        "worst_regret": max(regrets),
        "mean_regret": sum(regrets) / len(regrets),
        "unbiased_median_regret": median(o.unbiased for o in outcomes),
        "unbiased_mean_regret": sum(o.unbiased for o in outcomes) / len(outcomes),
        "share_of_exhaustive": share,
        "slower_than_default": sum(o.chosen_us > (1 + o.noise) * o.default_us for o in outcomes) / len(outcomes),
        "found_within_1_percent": sum(r <= 0.01 for r in regrets) / len(regrets),
        "gain_over_default": median(o.default_us / o.chosen_us for o in outcomes),
        "sampling_seconds": sum(seconds) / len(seconds),
    }


def by_file(outcomes: Sequence[Outcome]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures of every strategy for every recorded layer."""
    found: dict[str, dict[str, list[Outcome]]] = {}
    for o in outcomes:
        found.setdefault(o.file, {}).setdefault(o.strategy, []).append(o)
    return {
        file: {
            name: {
                "median_regret": median(o.regret for o in of_name),
                "p95_regret": percentile([o.regret for o in of_name], 95),
                "unbiased_mean_regret": sum(o.unbiased for o in of_name) / len(of_name),
                "share_of_exhaustive": sum(o.share for o in of_name) / len(of_name),
            }
            for name, of_name in of_file.items()
        }
        for file, of_file in found.items()
    }


def compare(
    folder: Path,
    names: Sequence[str],
    seeds: int | Mapping[str, int],
    *,
    ranker_for: Callable[[Environment, Registry], Ranker] | None = None,
    policy: str = "reproducible",
) -> tuple[dict[str, dict[str, float]], list[Outcome]]:
    """Replay every file of `folder` with every strategy and its number of seeds; return the summaries and outcomes."""
    registry = default_registry()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for path in sweep_files(folder):
        sweeps = [sweep.at_rounds_levels() for sweep in load_sweeps(path)]
        truth = {(sweep.gemm, sweep.tokens): true_times(sweep) for sweep in sweeps}
        ranker = _Remembered(ranker_for(sweeps[0].environment, registry) if ranker_for else NoRanker())
        for name in names:
            for seed in range(seeds if isinstance(seeds, int) else seeds[name]):
                found, took = replay(sweeps, truth, name, seed, registry, ranker, file=path.stem, policy=policy)
                outcomes[name] += found
                seconds[name].append(took)
    return {name: summary(outcomes[name], seconds[name]) for name in names}, [
        o for name in names for o in outcomes[name]
    ]


def model_of(folder: Path) -> Callable[[Environment, Registry], Ranker]:
    """Return what makes a ranker: the cost model with the calibration kept beside the sweeps, else nominal rates."""
    known = calibration_beside(folder)

    def make(environment: Environment, registry: Registry) -> Ranker:
        return ModelRanker(CostModel(environment, known or nominal(environment)), registry)

    return make


def main() -> None:
    """Print the table; write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--strategies", default=",".join(STRATEGIES), help="names, with another number of seeds as in exhaustive:5"
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--policy", default="reproducible")
    parser.add_argument("--no-model", action="store_true", help="rank by what neighbours show alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG of the table")
    options = parser.parse_args()
    parts = [part.partition(":") for part in options.strategies.split(",")]
    seeds = {name: int(own) if own else options.seeds for name, _, own in parts}
    ranker_for = None if options.no_model else model_of(options.folder)
    table, outcomes = compare(options.folder, list(seeds), seeds, ranker_for=ranker_for, policy=options.policy)
    print(f"{'strategy':14} median   mean unbiased    p95  worst  share  <=1%  slower  gain  seconds")
    for name, row in table.items():
        print(
            f"{name:14} {row['median_regret']:6.2%} {row['mean_regret']:6.2%} {row['unbiased_mean_regret']:+8.2%} "
            f"{row['p95_regret']:6.2%} {row['worst_regret']:6.1%} "
            f"{row['share_of_exhaustive']:6.2%} {row['found_within_1_percent']:5.0%} {row['slower_than_default']:6.1%} "
            f"{row['gain_over_default']:6.3f} {row['sampling_seconds']:7.1f}"
        )
    if options.out:
        device = load_sweeps(sweep_files(options.folder)[0])[0].environment.device
        document = {
            "command": shlex.join(["python", "-m", "benchmarks.strategies", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(), "device": device, "seeds": seeds, "folder": options.folder.name, "summary": table,
            "files": by_file(outcomes),
        }  # fmt: skip
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        title = f"{options.seeds} seeds over {options.folder.resolve().parent.name}"
        options.plot.write_text(picture(title, table), encoding="utf-8")


if __name__ == "__main__":
    main()

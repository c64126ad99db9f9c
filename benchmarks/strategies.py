"""Compare search strategies over recorded sweeps: regret, measurements, simulated time; over many seeds.

`python -m benchmarks.strategies FOLDER [--strategies a,b] [--seeds 20] [--out FILE.json] [--plot FILE.svg]`. FOLDER
holds sweeps as `python -m benchmarks.sweep` writes them. Every strategy tunes every layer from nothing, all buckets in
one go, with times drawn from the sweeps. Regret is the chosen config's true time (the median of all recorded samples,
the rounds' levels taken out) over the best of all
configs that could have been chosen with the same weight layout and numerics class, minus one; measurements are samples,
as a share of 20 of every config, which is what an exhaustive tuning takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.regret_picture import picture
from benchmarks.sweep import calibration_beside, sweep_files
from tilecast.autotune.calibrate import nominal
from tilecast.autotune.decide import decide
from tilecast.autotune.levels import levelled
from tilecast.autotune.plan import make_plan
from tilecast.autotune.rank import CostModel, ModelRanker
from tilecast.autotune.replay import ReplayMeasurer, Sweep, load_sweeps
from tilecast.autotune.search import STRATEGIES
from tilecast.autotune.tuner import NoRanker, Ranker, measure_plan
from tilecast.cache_store.memory import MemoryStore
from tilecast.engine.runtime import default_registry
from tilecast.environment import Environment
from tilecast.evidence import percentile
from tilecast.kernels.spec import Kernel, Registry
from tilecast.problem import ExpertGemm, TileConfig

EXHAUSTIVE_SAMPLES = 20
"""Samples of every config in an exhaustive tuning; vLLM's takes the mean of as many."""


Truth = dict[tuple[ExpertGemm, int], dict[TileConfig, float]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One decision of one strategy with one seed; times in µs are the recorded medians."""

    file: str
    gemm: str
    tokens: int
    strategy: str
    seed: int
    chosen_us: float
    best_us: float
    default_us: float
    share: float

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
            true_us = truth[gemm, sweep.tokens]
            rivals = same_group(sweep, true_us, registry, environment, choice.config, kernel)
            found.append(
                Outcome(
                    file=file, gemm=gemm.name, tokens=sweep.tokens, strategy=name, seed=seed,
                    chosen_us=true_us[choice.config], best_us=min(rivals),
                    default_us=true_us[sweep.recorded[0].config],
                    share=used[gemm, sweep.tokens] / (EXHAUSTIVE_SAMPLES * len(sweep.recorded)),
                )
            )  # fmt: skip
    return found, measurer.elapsed_us / 1e6


def true_times(sweep: Sweep) -> dict[TileConfig, float]:
    """Return each config's median of all recorded samples, without the levels of the recorded rounds."""
    moments = {r.config: {(i,): us for i, us in enumerate(r.samples_us)} for r in sweep.recorded if r.status == "ok"}
    return {config: percentile(values, 50) for config, values in levelled(moments).items()}


def same_group(
    sweep: Sweep,
    true_us: dict[TileConfig, float],
    registry: Registry,
    environment: Environment,
    chosen: TileConfig,
    kernel: Kernel,
) -> list[float]:
    """Return the times of all configs with the chosen one's weight layout and numerics."""
    gemm = sweep.gemm
    layout, numerics = kernel.layout(gemm, chosen), kernel.numerics(gemm, chosen, environment)
    return [
        us
        for config, us in true_us.items()
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
        "share_of_exhaustive": share,
        "slower_than_default": sum(o.chosen_us > 1.02 * o.default_us for o in outcomes) / len(outcomes),
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
                "share_of_exhaustive": sum(o.share for o in of_name) / len(of_name),
            }
            for name, of_name in of_file.items()
        }
        for file, of_file in found.items()
    }


def compare(
    folder: Path,
    names: Sequence[str],
    seeds: int,
    *,
    ranker_for: Callable[[Environment, Registry], Ranker] | None = None,
    policy: str = "reproducible",
) -> tuple[dict[str, dict[str, float]], list[Outcome]]:
    """Replay every file of `folder` with every strategy and seed; return the summaries and all outcomes."""
    registry = default_registry()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for path in sweep_files(folder):
        sweeps = load_sweeps(path)
        truth = {(sweep.gemm, sweep.tokens): true_times(sweep) for sweep in sweeps}
        ranker = _Remembered(ranker_for(sweeps[0].environment, registry) if ranker_for else NoRanker())
        for name in names:
            for seed in range(seeds):
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
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--policy", default="reproducible")
    parser.add_argument("--no-model", action="store_true", help="rank by what neighbours show alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG of the table")
    options = parser.parse_args()
    names = options.strategies.split(",")
    ranker_for = None if options.no_model else model_of(options.folder)
    table, outcomes = compare(options.folder, names, options.seeds, ranker_for=ranker_for, policy=options.policy)
    print(f"{'strategy':14} median    p95  worst  share  <=1%  slower  gain  seconds")
    for name, row in table.items():
        print(
            f"{name:14} {row['median_regret']:6.2%} {row['p95_regret']:6.2%} {row['worst_regret']:6.1%} "
            f"{row['share_of_exhaustive']:6.2%} {row['found_within_1_percent']:5.0%} {row['slower_than_default']:6.1%} "
            f"{row['gain_over_default']:6.3f} {row['sampling_seconds']:7.1f}"
        )
    if options.out:
        document = {"seeds": options.seeds, "folder": options.folder.name, "summary": table, "files": by_file(outcomes)}
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        title = f"{options.seeds} seeds over {options.folder.parent.name}"
        options.plot.write_text(picture(title, table), encoding="utf-8")


if __name__ == "__main__":
    main()

"""How well the cost model ranks: `python -m benchmarks.ranking FOLDER` over recorded sweeps.

For each sweep: the rank correlation (Spearman) of predicted and measured times, and how much slower than the best
config the fastest of the model's best k is. Sweeps of this machine's CPU are predicted with a probe of it, others
with nominal figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.sweep import calibration_beside, sweep_files
from tilecast.autotune.calibrate import Calibration, calibration_for
from tilecast.autotune.rank import CostModel
from tilecast.autotune.replay import Sweep, load_sweeps
from tilecast.engine.runtime import default_registry
from tilecast.errors import InputError
from tilecast.kernels.spec import Registry
from tilecast.settings import Settings

BEST_OF = (1, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One sweep: its rank correlation, the regret of the model's best k, and predicted over measured of the best."""

    sweep: Sweep
    spearman: float
    regret: dict[int, float]
    ratio: float


def ranks(values: Sequence[float]) -> list[float]:
    """Return each value's rank from 1, equal values sharing the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for i in order[start:stop]:
            found[i] = (start + 1 + stop) / 2
        start = stop
    return found


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the correlation of two series' ranks; 0 where one of them is constant. Raises InputError."""
    if len(left) != len(right) or len(left) < 2:
        raise InputError(f"{len(left)} and {len(right)} values cannot be compared, expected as many, at least 2")
    a, b = ranks(left), ranks(right)
    mean = (len(a) + 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    bottom = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    return float(top / bottom**0.5) if bottom else 0.0


def judge(sweep: Sweep, model: CostModel, registry: Registry) -> Ranked:
    """Compare the model with one sweep of at least two configs."""
    measured = {config: recorded.p50_us for config, recorded in sweep.ok.items()}
    predicted = model.rank(sweep.gemm, sweep.tokens, measured, registry, sweep.routing)
    best = sweep.best()
    first = list(predicted)
    return Ranked(
        sweep=sweep,
        spearman=spearman([predicted[config] for config in measured], list(measured.values())),
        regret={k: min(measured[config] for config in first[:k]) / best.p50_us - 1 for k in BEST_OF},
        ratio=predicted[best.config] / best.p50_us,
    )


def calibration_of(sweep: Sweep, registry: Registry, known: dict[str, Calibration]) -> Calibration:
    """Return the calibration of a sweep's environment, probed or looked up once."""
    digest = sweep.environment.digest
    if digest not in known:
        known[digest] = calibration_for(sweep.environment, registry, folder=Settings.from_environment().cache_dir)
    return known[digest]


def table(found: Sequence[Ranked], calibrations: dict[str, Calibration]) -> str:
    """Return a Markdown table of the comparison, its medians in the last row."""
    lines = [
        f"| sweep | configs | Spearman | {' | '.join(f'best of {k}' for k in BEST_OF)} | predicted ÷ measured |",
        "| --- | --- | --- |" + " --- |" * (len(BEST_OF) + 1),
    ]
    for one in found:
        name = f"{one.sweep.gemm.layer.label} {one.sweep.gemm.name} {one.sweep.tokens}"
        regrets = " | ".join(f"+{one.regret[k]:.1%}" for k in BEST_OF)
        lines.append(f"| {name} | {len(one.sweep.ok)} | {one.spearman:.2f} | {regrets} | {one.ratio:.2f} |")
    regrets = " | ".join(f"+{median(one.regret[k] for one in found):.1%}" for k in BEST_OF)
    spread = f"{median(one.spearman for one in found):.2f} | {regrets} | {median(one.ratio for one in found):.2f}"
    near = sum(one.regret[BEST_OF[-1]] <= 0.02 for one in found)
    sources = ", ".join(sorted({calibration.source for calibration in calibrations.values()}))
    lines.append(f"| median | | {spread} |")
    lines.append(f"\nThe best of {BEST_OF[-1]} is within 2% in {near} of {len(found)} sweeps; calibration: {sources}.")
    return "\n".join(lines)


def main() -> None:
    """Print the table of a folder of sweeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    registry = default_registry()
    known: dict[str, Calibration] = {}
    beside = calibration_beside(options.folder)
    found = []
    for path in sweep_files(options.folder):
        for sweep in load_sweeps(path):
            if len(sweep.ok) > 1:
                if beside is not None:
                    known[sweep.environment.digest] = beside
                model = CostModel(sweep.environment, calibration_of(sweep, registry, known))
                found.append(judge(sweep, model, registry))
    if not found:
        raise SystemExit(f"{options.folder} holds no sweeps of at least two configs")
    print(table(found, known))


if __name__ == "__main__":
    main()

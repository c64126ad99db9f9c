"""The expert layer, tuned and then timed against the default configs and the peers."""

from __future__ import annotations

from pathlib import Path

from tilecast.autotune.plan import make_plan
from tilecast.autotune.tuner import tune
from tilecast.cache_store.store import open_store
from tilecast.canonical import Json
from tilecast.engine.bench import OURS, BenchResult, Point, bench_layer
from tilecast.engine.peers import Peer
from tilecast.environment import cpu_environment
from tilecast.evidence import TuningTable
from tilecast.kernels import registry
from tilecast.problem import ExpertLayer

TRANSFORMERS = ("transformers eager", "transformers grouped_mm")
"""The paths of transformers: the faster of the two at each point is what a speed-up is against."""


def tuned_table(
    layers: list[ExpertLayer], tokens: tuple[int, ...], *, policy: str, store: Path, budget_s: float
) -> TuningTable:
    """Tune what the store lacks and return the decisions."""
    plan = make_plan(layers, tokens, cpu_environment(), policy=policy)
    store.parent.mkdir(parents=True, exist_ok=True)
    with open_store(store) as opened:
        return tune(plan, opened, registry, budget_s=budget_s)


def measure(
    layers: list[ExpertLayer],
    tokens: tuple[int, ...],
    *,
    policies: tuple[str, ...],
    peers: tuple[Peer, ...],
    store: Path,
    tune_s: float,
    bench_s: float,
    rounds: int,
    threads: int,
) -> BenchResult:
    """Tune, then time every layer under every policy; budgets are seconds per layer and policy."""
    result: BenchResult | None = None
    for policy in policies:
        table = tuned_table(layers, tokens, policy=policy, store=store, budget_s=tune_s * len(layers))
        for layer in layers:
            part = bench_layer(
                layer, tokens, table=table, policy=policy, peers=peers, rounds=rounds, budget_s=bench_s,
                threads=threads, progress=lambda line: print(f"  timing {line}", flush=True),
            )  # fmt: skip
            result = part if result is None else result.merged(part)
    assert result is not None, "argparse asks for at least one dtype and policy"
    return result


def to_json(result: BenchResult) -> Json:
    """The result with the figures against transformers added."""
    groups = result.summaries(also=[TRANSFORMERS])
    return {**result.to_json(), "summaries": [summary.to_json() for summary in groups]}


def print_result(result: BenchResult) -> None:
    """Print one line per point and one per summary."""
    for point in result.points:
        print(_line(point))
        for timing in point.timings:
            if timing.status != "ok":
                print(f"    {timing.name}: {timing.status}: {timing.detail}")
    for summary in result.summaries(also=[TRANSFORMERS]):
        print(
            f"against {summary.against}: geometric mean {summary.geometric_mean:.2f}, worst {summary.worst:.2f} "
            f"({summary.worst_point}), {summary.points} points"
        )


def _line(point: Point) -> str:
    times = ", ".join(f"{t.name} {t.p50_us / 1e3:.2f}" for t in point.timings if t.p50_us is not None)
    share = point.share(OURS)
    reached = "" if share is None else f"; {share:.0%} of the {point.bound} limit"
    if point.limit_exceeded:
        reached += ", which is more than can be: the machine was busy when its peak was measured"
    return f"{point.layer.label} T={point.tokens} {point.policy}: ms {times}{reached}"

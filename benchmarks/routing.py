"""What it costs to tune under another routing than the one that is served: one layer, tuned and timed under each.

python benchmarks/routing.py                                             as published
python benchmarks/routing.py --profiles uniform,zipf:2 --tokens 16 --rounds 20

Every profile's table is timed under every profile, interleaved: each round times every table's configs on the same
operands, routed by the profile, and a ratio is taken within a round. Operands are none of those that the tuner saw.
Rounds in which other processes used more than a little of the CPUs are made again, and counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from report import write_result

from tilecast.autotune.contention import CpuWatch, contended
from tilecast.autotune.draws import typical_counts
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.autotune.plan import make_plan
from tilecast.autotune.routing_profiles import RoutingProfile, load_profile, plain_histogram
from tilecast.autotune.tuner import tune
from tilecast.cache_store.memory import MemoryStore
from tilecast.canonical import Json
from tilecast.environment import cpu_environment
from tilecast.errors import TilecastError
from tilecast.evidence import Decision
from tilecast.kernels import registry
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

LAYER = ExpertLayer(hidden=1024, intermediate=512, experts=32, top_k=4)
HOT_SHARE = 0.23
"""Part of the slots that `hot` sends to one expert: of top-4 slots, nearly every token has it."""
EVALUATION_SEED = 1
SAMPLES = 4
"""Samples per config and round, so that a round is long enough to tell what others used of the CPUs in it."""
MOST_AGAIN = 100
"""Disturbed rounds that are made again, per profile; further ones are kept."""


@dataclass(frozen=True)
class Timed:
    """µs of the whole layer, per round, of each table's configs under one profile; and rounds made again."""

    samples_us: dict[str, list[float]]
    again: int
    disturbed: int


def profile_of(name: str, experts: int) -> RoutingProfile:
    """Return a profile by name or file; `hot` sends a share of all slots to one expert, the rest evenly."""
    if name != "hot":
        return load_profile(name)
    rest = round(10_000 * (1 - HOT_SHARE) / (experts - 1))
    return plain_histogram([round(10_000 * HOT_SHARE), *[rest] * (experts - 1)])


def chosen(profile: RoutingProfile, tokens: int, policy: str, budget_s: float) -> Decision:
    """Tune under a profile and return the decision."""
    environment = cpu_environment()
    plan = make_plan([LAYER], [tokens], environment, policy=policy, routing=profile)
    measurer = DeviceMeasurer(environment, registry, routing=profile)
    return tune(plan, MemoryStore(), registry, measurer=measurer, budget_s=budget_s).decisions[0]


def timed(profile: RoutingProfile, tables: dict[str, Decision], tokens: int, rounds: int) -> Timed:
    """Time every table's configs under a profile, interleaved; one that several share is timed once for all."""
    measurer = DeviceMeasurer(cpu_environment(), registry, routing=profile, seed=EVALUATION_SEED)
    totals = {name: [0.0] * rounds for name in tables}
    again = disturbed = 0
    watch = CpuWatch()
    for gemm in LAYER.gemms:
        configs = list(dict.fromkeys(decision.choice(gemm.name).config for decision in tables.values()))
        for config in configs:
            measurer.sample(gemm, tokens, config, round=0, count=1)
        for number in range(rounds):
            while True:
                before = watch.read()
                found = _round(measurer, gemm, tokens, configs, number)
                busy = contended(watch.stolen(before, watch.read()))
                if not busy or again >= MOST_AGAIN:
                    break
                again += 1
            disturbed += busy
            for name, decision in tables.items():
                totals[name][number] += found[decision.choice(gemm.name).config]
        measurer.release(gemm)
    return Timed(totals, again, disturbed)


def _round(
    measurer: DeviceMeasurer, gemm: ExpertGemm, tokens: int, configs: list[TileConfig], number: int
) -> dict[TileConfig, float]:
    turn = number % len(configs)
    order = [*configs[turn:], *configs[:turn]]
    return {
        config: statistics.median(measurer.sample(gemm, tokens, config, round=1 + number, count=SAMPLES))
        for config in order
    }


def compared(result: Timed, own: str) -> dict[str, Json]:
    """Return per table the median µs and the median and quartiles of its time over that of the table tuned for this."""
    found: dict[str, Json] = {}
    for name, samples in result.samples_us.items():
        ratios = sorted(a / b for a, b in zip(samples, result.samples_us[own], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "p50_us": statistics.median(samples),
            "ratio": statistics.median(ratios),
            "quartiles": [low, high],
        }
    return found


def measure(names: list[str], tokens: int, *, policy: str, budget_s: float, rounds: int) -> dict[str, Json]:
    """Tune under every profile, time all tables under all, and print one line for each pair."""
    profiles = {name: profile_of(name, LAYER.experts) for name in names}
    tables = {}
    for name, profile in profiles.items():
        tables[name] = chosen(profile, tokens, policy, budget_s)
        print(f"  tuned for {name}: {tables[name].up.config.label} | {tables[name].down.config.label}", flush=True)
    under: dict[str, Json] = {}
    for name, profile in profiles.items():
        result = timed(profile, tables, tokens, rounds)
        pairs = compared(result, name)
        counts = typical_counts(LAYER, tokens, profile)
        under[name] = {
            "profile": profile.name, "active_experts": sum(count > 0 for count in counts), "busiest_rows": max(counts),
            "rounds_made_again": result.again, "rounds_disturbed": result.disturbed, "tables": pairs,
        }  # fmt: skip
        print(f"  under {name} ({sum(count > 0 for count in counts)} experts, at most {max(counts)} rows): {pairs}")
    return {
        "layer": LAYER.to_json(), "label": LAYER.label, "tokens": tokens, "policy": policy, "rounds": rounds,
        "tune_budget_s": budget_s, "under": under,
        "tables": {
            name: {gemm.name: decision.choice(gemm.name).config.to_json() for gemm in LAYER.gemms}
            for name, decision in tables.items()
        },
    }  # fmt: skip


def main() -> int:
    """Run and write the result."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--profiles", default="uniform,zipf:1.5,hot", help="comma-separated names, files or `hot`")
    parser.add_argument("--tokens", default="64", help="comma-separated")
    parser.add_argument("--policy", default="fastest")
    parser.add_argument("--tune-budget", type=float, default=30.0, help="seconds per profile and token count")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    options = parser.parse_args()
    # Before anything asks for the environment, which records the thread count.
    torch.set_num_threads(options.threads)
    try:
        points = [
            measure(
                options.profiles.split(","), int(tokens), policy=options.policy, budget_s=options.tune_budget,
                rounds=options.rounds,
            )
            for tokens in options.tokens.split(",")
        ]  # fmt: skip
    except TilecastError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    print(f"  written to {write_result('routing', {'points': points}, options.results)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

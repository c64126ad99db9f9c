"""Tables of several tunings held against each other: where they chose otherwise, their choices run side by side.

The times that two tunings store were taken minutes apart, and memory alone may be a quarter slower in one of them than
in the other. Whether both chose as fast a config shows when both run at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tilecast.autotune.contention import CpuWatch, contended
from tilecast.autotune.measure import Measurer, Together
from tilecast.autotune.timing import Timing, noise, pool
from tilecast.evidence import Decision, Measurement, TuningTable
from tilecast.problem import ExpertGemm, TileConfig

ROUNDS, SAMPLES = 12, 2
TRIES, PAUSE_S = 5, 0.5
"""How often a round is measured again in which others used the CPUs, and the wait before."""


def head_to_head(
    tables: Sequence[TuningTable], measurer: Measurer, *, rounds: int = ROUNDS, watch: CpuWatch | None = None
) -> list[dict[str, Any]]:
    """Measure what the tables, of the same layers and buckets, chose differently, and the default; interleaved.

    For each such layer, bucket and GEMM: the times in µs of every table's choice and of the default, slowest ÷ fastest
    choice - 1, the noise that the decisions state, the noise of this comparison, and whether the difference is
    within the larger of both.
    """
    found: list[dict[str, Any]] = []
    held: ExpertGemm | None = None
    places = [(decisions, name) for name in ("up", "down") for decisions in _together(tables)]
    for decisions, name in sorted(places, key=lambda place: (place[0][0].layer.digest, place[1] == "down")):
        choices = [decision.choice(name) for decision in decisions]
        if len({choice.config for choice in choices}) == 1:
            continue
        gemm = decisions[0].layer.up if name == "up" else decisions[0].layer.down
        if gemm != held:
            if held is not None:
                measurer.release(held)
            measurer.prepare(held := gemm)
        configs = tuple(dict.fromkeys([*(c.config for c in choices), *(c.default for c in choices)]))
        timings = _timings(measurer, gemm, decisions[0], configs, rounds, watch or CpuWatch())
        own = [timings[choice.config] for choice in choices]
        slowest, fastest = max(own, key=lambda t: t.p50_us), min(own, key=lambda t: t.p50_us)
        difference, stated = slowest.p50_us / fastest.p50_us - 1, max(choice.noise for choice in choices)
        of_now = noise(slowest, fastest)
        found.append(
            {
                "layer": gemm.layer.label, "tokens": decisions[0].bucket.tokens, "gemm": name,
                "chosen": [choice.config.label for choice in choices], "chosen_us": [t.p50_us for t in own],
                "default_us": [timings[choice.default].p50_us for choice in choices], "difference": difference,
                "noise": stated, "noise_of_comparison": of_now, "within_noise": difference <= max(stated, of_now),
            }
        )  # fmt: skip
    if held is not None:
        measurer.release(held)
    return found


def _together(tables: Sequence[TuningTable]) -> list[tuple[Decision, ...]]:
    return list(zip(*(table.decisions for table in tables), strict=True))


def _timings(
    measurer: Measurer,
    gemm: ExpertGemm,
    decision: Decision,
    configs: Sequence[TileConfig],
    rounds: int,
    watch: CpuWatch,
) -> dict[TileConfig, Timing]:
    made = []
    for config in configs:
        verdict = measurer.check(gemm, decision.bucket.tokens, config)
        if verdict.status != "ok":
            raise RuntimeError(f"{config.label} was chosen and now is {verdict.status}: {verdict.detail}")
    for number in range(rounds):
        for _ in range(TRIES):
            start = watch.read()
            samples = _round(measurer, gemm, decision.bucket.tokens, configs, number)
            if not contended(watch.stolen(start, watch.read())):
                break
            time.sleep(PAUSE_S)
        made += [
            Measurement(
                environment=decision.environment, gemm=gemm, tokens=decision.bucket.tokens, config=config,
                samples_us=taken, routing=decision.routing, round=number,
            )
            for config, taken in zip(configs, samples, strict=True)
        ]  # fmt: skip
    timings, _ = pool(made)
    return timings


def _round(
    measurer: Measurer, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig], number: int
) -> list[tuple[float, ...]]:
    if isinstance(measurer, Together):
        return measurer.sample_together(gemm, tokens, configs, round=number, count=SAMPLES)
    return [measurer.sample(gemm, tokens, config, round=number, count=SAMPLES) for config in configs]

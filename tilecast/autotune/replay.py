"""Sweeps: every valid config of a GEMM measured, kept in a file, and played back as if it were measured now.

So strategies are compared without the device, with the noise that the device had: `ReplayMeasurer` draws each sample
from those recorded for the config. The format is documented in docs/tuning.md.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import cast

from tilecast.autotune.contention import MIN_STRETCH_S, CpuWatch, contended
from tilecast.autotune.gate import Verdict
from tilecast.autotune.levels import Moment, moment_levels
from tilecast.autotune.measure import SAMPLE_US, Measurer, Together, failure
from tilecast.autotune.prescreen import anchors, prescreen
from tilecast.autotune.seeds import hash_seed
from tilecast.canonical import Json, fields_of
from tilecast.environment import Environment
from tilecast.errors import InputError
from tilecast.evidence import percentile
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig, check_int

FORMAT = 1
MAX_FILE_BYTES = 64 << 20
TRIES = 60
"""How often a contended stretch is measured again before its samples are kept as they are."""
PAUSE_S = 1.0
"""Wait before that."""
HOPELESS = 2.0
FEW_ROUNDS = 3
"""Configs that are slower than the best by this factor after so many rounds run no longer: their times are known."""
FEWEST_TOGETHER = 8
"""Configs in a stretch, on average, that it takes to tell its level."""
SLICE_S = 0.4
"""Stretches of measuring between two looks at the CPUs' counters."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One config of a sweep: its samples in µs, in the order of rounds, or why there are none.

    `stretches` number the stretch of its round that each sample was taken in; () where all of a round is one.
    """

    config: TileConfig
    status: str = "ok"
    samples_us: tuple[float, ...] = ()
    detail: str = ""
    stretches: tuple[int, ...] = ()

    @property
    def p50_us(self) -> float:
        """Median of the samples."""
        return percentile(self.samples_us, 50)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All candidates of one GEMM at one token count under one routing profile; the default is the first.

    `stolen` is the mean part of the CPUs that others used while it was recorded, `retried` how many stretches were
    measured again for that.
    """

    environment: Environment
    gemm: ExpertGemm
    tokens: int
    recorded: tuple[Recorded, ...]
    routing: str = "uniform"
    stolen: float = 0.0
    retried: int = 0

    @property
    def ok(self) -> dict[TileConfig, Recorded]:
        """What can be chosen, by config."""
        return {r.config: r for r in self.recorded if r.status == "ok"}

    def at_rounds_levels(self) -> Sweep:
        """Return the sweep with what tells the stretches of a round apart taken out, as if a round were one stretch.

        A tuning's rounds are shorter, mostly one stretch. Stretches of few configs are left as they are: their levels
        would take a part of the configs' noise with them.
        """
        moments: dict[TileConfig, dict[Moment, float]] = {
            r.config: {
                (number, stretch): us
                for number, (stretch, us) in enumerate(zip(r.stretches, r.samples_us, strict=True))
            }
            for r in self.recorded
            if r.stretches
        }
        sizes = Counter(moment for of_config in moments.values() for moment in of_config)
        if not sizes or sum(sizes.values()) < FEWEST_TOGETHER * len(sizes):
            return replace(self, recorded=tuple(replace(r, stretches=()) for r in self.recorded))
        level = moment_levels(moments)
        of_round: dict[int, list[float]] = {}
        for moment, factor in level.items():
            of_round.setdefault(moment[0], []).append(factor)
        usual = {number: median(factors) for number, factors in of_round.items()}
        return replace(
            self,
            recorded=tuple(
                replace(
                    r, stretches=(),
                    samples_us=tuple(
                        us * usual[moment[0]] / level[moment] if moment in level else us
                        for moment, us in moments.get(r.config, {}).items()
                    ),
                )
                for r in self.recorded
            ),
        )  # fmt: skip

    def best(self) -> Recorded:
        """Return the config with the smallest median. Raises InputError where none ran."""
        if not self.ok:
            raise InputError(f"the sweep of {self.gemm.layer.label} {self.gemm.name} at {self.tokens} has no times")
        return min(self.ok.values(), key=lambda r: (r.p50_us, r.config.sort_key))


def record_sweep(
    gemm: ExpertGemm,
    tokens: int,
    environment: Environment,
    registry: Registry,
    measurer: Measurer,
    *,
    samples: int = 15,
    routing: str = "uniform",
    all_tokens: Sequence[int] = (),
    watch: CpuWatch | None = None,
    progress: Callable[[str], None] | None = None,
) -> Sweep:
    """Measure every valid candidate `samples` times, in rounds that go through all of them; hopeless ones less often.

    A round draws who is measured with whom: on CPUs those of a stretch take turns, where `measurer` can do that. A
    stretch in which others used the CPUs is measured again. `all_tokens` are the buckets of the whole
    recording, whose defaults' groups are measured in every one of them.
    """
    check_int("samples", samples, 1, 1 << 16)
    watch = watch or CpuWatch()
    held = anchors(gemm, tuple(all_tokens) or (tokens,), environment, registry)
    candidates = [c.config for c in prescreen(gemm, tokens, environment, registry, anchors=held).candidates]
    status: dict[TileConfig, tuple[str, str]] = {}
    expected_us: dict[TileConfig, float] = {}
    for config in candidates:
        try:
            verdict = measurer.check(gemm, tokens, config)
            status[config], expected_us[config] = (verdict.status, verdict.detail), verdict.launch_us
        except Exception as error:  # What a kernel raises is a fact about it, kept like any other.
            status[config] = failure(error)
    running = [config for config in candidates if status[config][0] == "ok"]
    found: dict[TileConfig, list[float]] = {config: [] for config in running}
    stretches: dict[TileConfig, list[int]] = {config: [] for config in running}
    shares, retried = [], 0
    least_us = SAMPLE_US[environment.device_kind]
    for number in range(samples):
        order = random.Random(number).sample(running, len(running))
        groups = _groups(order, [max(least_us, expected_us[config]) / 1e6 for config in order])
        for place, group in enumerate(groups):
            values, stolen, again = _stretch(gemm, tokens, group, number, measurer, watch)
            retried += again
            shares += [] if stolen is None else [stolen]
            for config, value in zip(group, values, strict=True):
                found[config].append(value)
                stretches[config].append(place)
                expected_us[config] = value
        if running and number + 1 == FEW_ROUNDS:
            best = min(median(found[config]) for config in running)
            running = [config for config in running if median(found[config]) <= HOPELESS * best]
        if progress is not None:
            progress(f"{gemm.layer.label} {gemm.name} {tokens}: {number + 1}/{samples}, {retried} stretches again")
    return Sweep(
        environment=environment, gemm=gemm, tokens=tokens, routing=routing,
        recorded=tuple(
            Recorded(
                config=c, status=status[c][0], samples_us=tuple(found.get(c, ())), detail=status[c][1],
                stretches=tuple(stretches.get(c, ())),
            )
            for c in candidates
        ),
        stolen=sum(shares) / len(shares) if shares else 0.0, retried=retried,
    )  # fmt: skip


def _groups(order: Sequence[TileConfig], costs_s: Sequence[float]) -> list[list[TileConfig]]:
    """Return configs in groups of about the same time, of which a sample each takes about a stretch's time."""
    each_s = sum(costs_s) / max(1, math.ceil(sum(costs_s) / SLICE_S))
    groups: list[list[TileConfig]] = []
    spent_s = 0.0
    for config, cost_s in zip(order, costs_s, strict=True):
        if spent_s + cost_s / 2 > each_s * len(groups):
            groups.append([])
        groups[-1].append(config)
        spent_s += cost_s
    return groups


def _stretch(
    gemm: ExpertGemm, tokens: int, group: Sequence[TileConfig], number: int, measurer: Measurer, watch: CpuWatch
) -> tuple[list[float], float | None, int]:
    """Return one sample of each of `group`, the others' share of the CPUs, and how often it was done again."""
    retried = 0
    while True:
        start = watch.read()
        if isinstance(measurer, Together) and len(group) > 1:
            taken = measurer.sample_together(gemm, tokens, group, round=number, count=1)
        else:
            taken = [measurer.sample(gemm, tokens, config, round=number, count=1) for config in group]
        stolen = watch.stolen(start, watch.read())
        if stolen is None:
            # Too short to tell: whether others run is asked of the moment after.
            start = watch.read()
            time.sleep(MIN_STRETCH_S)
            stolen = watch.stolen(start, watch.read())
        if not contended(stolen) or retried == TRIES:
            return [value for (value,) in taken], stolen, retried
        retried += 1
        time.sleep(PAUSE_S)


# Files ------------------------------------------------------------------------------------


def save_sweeps(path: Path, sweeps: Sequence[Sweep]) -> None:
    """Write sweeps of one environment into a JSON file, whole or not at all; times to 10 ns."""
    if not sweeps:
        raise InputError("there are no sweeps to save")
    environments = {sweep.environment.digest for sweep in sweeps}
    if len(environments) > 1:
        raise InputError(f"sweeps of {len(environments)} environments cannot be kept in one file")
    document: Json = {
        "format": FORMAT,
        "environment": sweeps[0].environment.to_json(),
        "sweeps": [_to_json(sweep) for sweep in sweeps],
    }
    lines = json.dumps(document, separators=(",", ":"), sort_keys=True).replace('{"config"', '\n{"config"')
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(lines + "\n", encoding="ascii")
    temporary.replace(path)


def _to_json(sweep: Sweep) -> Json:
    return {
        "layer": sweep.gemm.layer.to_json(),
        "gemm": sweep.gemm.name,
        "tokens": sweep.tokens,
        "routing": sweep.routing,
        "stolen": round(sweep.stolen, 4),
        "retried": sweep.retried,
        "recorded": [
            {
                "config": r.config.to_json(), "status": r.status, "detail": r.detail,
                "samples_us": [round(value, 2) for value in r.samples_us],
                **({"stretches": list(r.stretches)} if r.stretches else {}),
            }
            for r in sweep.recorded
        ],
    }  # fmt: skip


def load_sweeps(path: Path) -> list[Sweep]:
    """Read sweeps. Raises InputError, in one line, for a file that is none."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    parsed = fields_of(document, {"format": int, "environment": dict, "sweeps": list}, f"{path}")
    if parsed["format"] != FORMAT:
        raise InputError(f"{path}: sweeps of format {parsed['format']}, this version reads {FORMAT}")
    environment = Environment.from_json(parsed["environment"])
    return [_from_json(value, environment, str(path)) for value in cast(list[object], parsed["sweeps"])]


def _from_json(value: object, environment: Environment, where: str) -> Sweep:
    number: tuple[type, ...] = (float, int)
    kinds: dict[str, type | tuple[type, ...]] = {
        "layer": dict, "gemm": str, "tokens": int, "routing": str, "stolen": number, "retried": int, "recorded": list,
    }  # fmt: skip
    parsed = fields_of(value, kinds, where)
    if parsed["gemm"] not in ("up", "down"):
        raise InputError(f"{where}: gemm is {parsed['gemm']!r}, expected up or down")
    gemm = ExpertGemm(layer=ExpertLayer.from_json(parsed["layer"]), name=parsed["gemm"])
    recorded = []
    for item in cast(list[object], parsed["recorded"]):
        fields: dict[str, type] = {"config": dict, "status": str, "detail": str, "samples_us": list}
        if isinstance(item, dict) and "stretches" in item:
            fields["stretches"] = list
        one = fields_of(item, fields, where)
        samples = tuple(float(sample) for sample in cast(list[float], one["samples_us"]))
        if one["status"] == "ok" and not (samples and all(sample > 0 for sample in samples)):
            raise InputError(f"{where}: a config with status ok needs times above 0")
        stretches = tuple(cast(list[int], one.get("stretches", [])))
        if stretches and (len(stretches) != len(samples) or not all(type(n) is int and n >= 0 for n in stretches)):
            raise InputError(f"{where}: stretches are {len(stretches)} numbers from 0, expected {len(samples)}")
        recorded.append(
            Recorded(
                config=TileConfig.from_json(one["config"]), status=cast(str, one["status"]), samples_us=samples,
                detail=cast(str, one["detail"]), stretches=stretches,
            )
        )  # fmt: skip
    return Sweep(
        environment=environment, gemm=gemm, tokens=cast(int, parsed["tokens"]), routing=cast(str, parsed["routing"]),
        recorded=tuple(recorded), stolen=float(cast(float, parsed["stolen"])), retried=cast(int, parsed["retried"]),
    )  # fmt: skip


# Playing back -----------------------------------------------------------------------------


class ReplayMeasurer:
    """A measurer that plays sweeps back: each sample is one recorded round, drawn with replacement from a seed.

    All configs of one round of a tuning get their times from the same recorded rounds, as they would be measured one
    after the other on the same operands: what disturbed a recorded round disturbs them alike. Equal (config, round)
    give equal samples whatever was asked before, as in a resumed tuning. `samples`, `checks` and `elapsed_us` count
    what was asked for.
    """

    def __init__(self, sweeps: Iterable[Sweep], *, seed: int = 0) -> None:
        """Play back `sweeps`, one for each (GEMM, tokens), a round as if it were one stretch."""
        sweeps = [sweep.at_rounds_levels() for sweep in sweeps]
        self._recorded = {(s.gemm, s.tokens): {r.config: r for r in s.recorded} for s in sweeps}
        self._rounds = {key: max(len(r.samples_us) for r in of.values()) for key, of in self._recorded.items()}
        self._seed = seed
        self.samples = 0
        self.checks = 0
        self.elapsed_us = 0.0

    def prepare(self, gemm: ExpertGemm) -> None:
        """Nothing to do."""

    def release(self, gemm: ExpertGemm) -> None:
        """Nothing to do."""

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        """Return what the gate said when the sweep was recorded."""
        found = self._find(gemm, tokens, config)
        self.checks += 1
        return Verdict(status=found.status, detail=found.detail)

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        """Return `count` recorded times, drawn at random."""
        found = self._find(gemm, tokens, config)
        parts = (self._seed, tokens, round, int(gemm.layer.digest[:8], 16), len(gemm.name))
        generator = random.Random(hash_seed(*parts))
        rounds = self._rounds[gemm, tokens]
        drawn = tuple(found.samples_us[generator.randrange(rounds) % len(found.samples_us)] for _ in range(count))
        self.samples += count
        self.elapsed_us += sum(drawn)
        return drawn

    def _find(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Recorded:
        recorded = self._recorded.get((gemm, tokens))
        if recorded is None:
            raise InputError(f"no sweep of {gemm.layer.label} {gemm.name} at {tokens} tokens was recorded")
        if config not in recorded:
            raise InputError(f"{config.label} is not in the sweep of {gemm.layer.label} {gemm.name} at {tokens} tokens")
        return recorded[config]

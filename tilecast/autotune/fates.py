"""What became of each config of one race, told from its measurements alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.select import Group, group_of
from tilecast.autotune.timing import NOISE_FLOOR, Pool, Timing, fastest, noise, pool, within_noise
from tilecast.evidence import Choice, Measurement, percentile
from tilecast.problem import TileConfig

FATES = (
    "chosen", "tie", "slower", "few samples", "other order", "other group", "not batch-invariant", "class check",
    "cut", "left out", "partial", "duplicate", "failed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One config of a race.

    Times are percentiles in µs of the samples of all rounds of the slowest rank, None without samples. `last_round`
    is the last one it ran in; `cut_after` the same for a config that the race went on without, else None.
    `ratio` is its median over the chosen config's, `noise` that of this comparison. `fate` is one of `FATES`,
    `reason` says it in words.
    """

    config: TileConfig
    numerics: str
    layout: str | None
    order: str | None
    status: str
    detail: str
    error_ratio: float | None
    rank: int | None
    samples: int
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    last_round: int
    cut_after: int | None
    ratio: float | None
    noise: float | None
    fate: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What besides times decides over a config: the choice, the policy, and what is known of the configs."""

    choice: Choice
    policy: str
    candidates: Mapping[TileConfig, Candidate]
    excluded: Collection[TileConfig]

    @property
    def group(self) -> Group | None:
        """The chosen config's group; None where its layout is not known."""
        chosen = self.candidates.get(self.choice.config)
        return None if chosen is None else group_of(chosen, self.policy)


def entrants(measured: Sequence[Measurement], standing: Standing, pooled: Pool) -> tuple[Entrant, ...]:
    """Return every config of one run of one GEMM and token count, by time, those without last.

    `pooled` is of what was `measured`, which records of broken classes are no part of.
    """
    race = _Race(measured, standing, pooled)
    found = [race.entrant(config) for config in dict.fromkeys(m.config for m in measured)]
    return tuple(
        sorted(found, key=lambda e: (math.inf if e.p50_us is None or not _ran(e) else e.p50_us, e.config.sort_key))
    )


def _ran(entrant: Entrant) -> bool:
    return entrant.fate not in ("failed", "partial", "duplicate")


class _Race:
    """The measurements of a race, looked at from each config."""

    def __init__(self, measured: Sequence[Measurement], standing: Standing, pooled: Pool) -> None:
        self._standing = standing
        self._timings, self._failures = pooled.timings, pooled.failures
        self._pooled = pooled.slowest()
        self._of: dict[TileConfig, list[Measurement]] = {}
        for m in measured:
            self._of.setdefault(m.config, []).append(m)
        self._last = {config: max(m.round for m in of) for config, of in self._of.items()}
        rounds = sorted({m.round for m in measured})
        self._end = rounds[-1]
        self._after = {r: pool(m for m in measured if m.round <= r)[0] for r in rounds[:-1]}
        self._after[self._end] = self._timings
        chosen = self._timings[standing.choice.config]
        self._group = [t for c, t in self._timings.items() if self._in_reach(c)]
        self._most = max((t.samples for t in self._group), default=chosen.samples)
        self._chosen = chosen

    def entrant(self, config: TileConfig) -> Entrant:
        of, timing = self._of[config], self._timings.get(config)
        rank, samples = self._pooled.get(config, (None, ()))
        p20, p50, p80 = (percentile(samples, p) if samples else None for p in (20, 50, 80))
        bad = next((m for m in of if m.status != "ok"), None)
        ratios = [m.error_ratio for m in of if m.error_ratio is not None]
        candidate = self._standing.candidates.get(config)
        fate, reason = self._fate(config)
        return Entrant(
            config=config,
            numerics=next((m.numerics for m in of if m.numerics), ""),
            layout=None if candidate is None else candidate.layout,
            order=None if candidate is None else candidate.order,
            status="ok" if bad is None else bad.status,
            detail="" if bad is None else bad.detail,
            error_ratio=max(ratios, default=None),
            rank=rank,
            samples=len(samples),
            p20_us=p20,
            p50_us=p50,
            p80_us=p80,
            last_round=self._last[config],
            cut_after=self._last[config] if fate in ("cut", "left out") else None,
            ratio=None if timing is None else timing.p50_us / self._chosen.p50_us,
            noise=None if timing is None else noise(timing, self._chosen),
            fate=fate,
            reason=reason,
        )

    def _fate(self, config: TileConfig) -> tuple[str, str]:
        """Return what became of a config and why; the first reason that holds, in the order in which they bind."""
        choice, timing = self._standing.choice, self._timings.get(config)
        twin = next((m.detail for m in self._of[config] if m.status == "duplicate"), None)
        if twin is not None:
            return "duplicate", twin
        if config in self._failures:
            return "failed", self._failure(config)
        if timing is None:
            return "partial", "has no samples on some rank"
        if config == choice.config:
            return "chosen", self._victory()
        if config in self._standing.excluded and self._standing.policy == "reproducible":
            return "class check", "its bits are not those of its class"
        if self._last[config] < self._end:
            return self._cut(config)
        return self._beaten(config, timing)

    def _failure(self, config: TileConfig) -> str:
        ratios = [m.error_ratio for m in self._of[config] if m.error_ratio is not None]
        error = f"; error {max(ratios):.3g}× torch's" if ratios else ""
        return f"{self._failures[config]}{error}"

    def _cut(self, config: TileConfig) -> tuple[str, str]:
        """Tell a config that was too slow from one that the time or a limit on finalists left out."""
        last = self._last[config]
        then = self._after[last]
        timing, best = then[config], fastest(then.values())
        text = f"after round {last + 1}: {timing.p50_us / best.p50_us:.3f}× the best, noise {noise(timing, best):.1%}"
        ran_on = [t for c, t in then.items() if self._last[c] > last and c not in self._kept_anyway(then)]
        slower = [t for t in ran_on if t.p50_us > timing.p50_us]
        if slower:
            return "left out", f"{text}; {len(slower)} slower ran on: time, another class or a limit ended it"
        if within_noise(timing, best):
            return "left out", f"{text}: not slower beyond noise, but the time or the limit on finalists ended it"
        return "cut", text

    def _kept_anyway(self, then: Mapping[TileConfig, Timing]) -> set[TileConfig]:
        """Return who may run on though slow: the default, the chosen, and each group's and order's best."""
        leaders: dict[object, Timing] = {}
        for c, t in sorted(then.items(), key=lambda item: (item[1].p50_us, item[0].sort_key)):
            candidate = self._standing.candidates.get(c)
            key = None if candidate is None else (group_of(candidate, self._standing.policy), candidate.order)
            leaders.setdefault(key, t)
        return {self._standing.choice.default, *(t.config for t in leaders.values())}

    def _in_reach(self, config: TileConfig) -> bool:
        """Whether a config is of the chosen one's group, so that only times decide."""
        if config in self._standing.excluded and self._standing.policy == "reproducible":
            return False
        candidate = self._standing.candidates.get(config)
        return candidate is not None and group_of(candidate, self._standing.policy) == self._standing.group

    def _beaten(self, config: TileConfig, timing: Timing) -> tuple[str, str]:
        standing = self._standing
        candidate, chosen = standing.candidates.get(config), standing.candidates.get(standing.choice.config)
        if candidate is not None and chosen is not None:
            group = group_of(candidate, standing.policy)
            if group is None:
                return "not batch-invariant", "its rows depend on the rest of the batch"
            if group != standing.group:
                return "other group", _difference(candidate, chosen)
            if candidate.order != chosen.order:
                return "other order", f"order {candidate.order}; up and down together are chosen in {chosen.order}"
            if 2 * timing.samples < self._most:
                return "few samples", f"{timing.samples} of up to {self._most} samples: fewer than half"
        times = f"{timing.p50_us / self._chosen.p50_us:.3f}× the chosen, noise {noise(timing, self._chosen):.1%}"
        if timing.p50_us <= self._chosen.p50_us or within_noise(timing, self._chosen):
            return "tie", f"{times}: within noise, {self._tie_breaker(timing)}"
        return "slower", times

    def _tie_breaker(self, timing: Timing) -> str:
        choice = self._standing.choice
        if choice.config == choice.default:
            return "the default is kept"
        alike = timing.p50_us <= self._chosen.p50_us * (1 + NOISE_FLOOR)
        return "first in order" if alike and choice.config.sort_key < timing.config.sort_key else "the faster one"

    def _victory(self) -> str:
        choice = self._standing.choice
        kept = choice.config == choice.default
        default = self._timings.get(choice.default)
        if kept or default is None:
            text = "the default: nothing it could be replaced by is faster beyond noise"
        else:
            gain = default.p50_us / self._chosen.p50_us
            text = f"{gain:.3f}× as fast as the default, noise {noise(self._chosen, default):.1%}"
        second = None if choice.runner_up is None else self._timings.get(choice.runner_up)
        if second is None:
            return text
        margin = second.p50_us / self._chosen.p50_us - 1
        return f"{text}; runner-up {margin:+.1%}, noise {noise(self._chosen, second):.1%}"


def _difference(candidate: Candidate, chosen: Candidate) -> str:
    if candidate.layout != chosen.layout:
        return f"weight layout {candidate.layout}; the layer is stored as {chosen.layout}"
    return f"class {candidate.numerics[:8]}; the layer has {chosen.numerics[:8]}"

"""Which of two tables' decisions to keep where both decide the same token counts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from tilecast.errors import CacheError, UsageError
from tilecast.evidence import Decision, TuningTable
from tilecast.problem import Bucket

MERGE_POLICIES = ("best", "ours", "theirs", "newest", "error")
"""How a conflict is settled; `ours` is the table named first."""

Ages = Mapping[Decision, float]
"""When decisions were measured, in seconds since 1970; what is absent was not measured at a known time."""


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Decisions for the same token counts of one series that differ, and what became of them.

    One side is empty only where series as wholes exclude each other.
    """

    ours: tuple[Decision, ...]
    theirs: tuple[Decision, ...]
    kept: str
    reason: str

    def __str__(self) -> str:
        """Return one line."""
        decision = (self.ours + self.theirs)[0]
        buckets = ", ".join(span(d.bucket) for d in self.ours or self.theirs)
        return (
            f"{decision.layer.label}, {buckets} tokens, {decision.policy}, routing {decision.routing}, environment "
            f"{decision.environment[:12]}: {self.kept} kept: {self.reason}"
        )


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What `resolve` made of two tables: the one table, and how it came about."""

    table: TuningTable
    conflicts: tuple[Conflict, ...] = ()
    added: int = 0
    equal: int = 0
    """Decisions of `theirs` that were new, and those that both had alike."""


def span(bucket: Bucket) -> str:
    """Write the token counts of a bucket: `5–16`, `1`."""
    return str(bucket.tokens) if bucket.tokens == bucket.above + 1 else f"{bucket.above + 1}–{bucket.tokens}"


def served_together(decision: Decision) -> Hashable:
    """Return what all buckets of a series have alike, or the engine refuses them.

    Both GEMMs' weight layouts, as configs name them, and under `reproducible` the numerics classes.
    """
    parts: list[str] = []
    for choice in (decision.up, decision.down):
        parameters = dict(choice.config.params)
        plain = parameters.get("layout", "plain") == "plain" and parameters.get("prepack", "no") != "yes"
        # Only the plain layout is common to kernels.
        parts.append("plain" if plain else f"{choice.config.kernel} {parameters.get('layout', '')}")
        if decision.policy == "reproducible":
            parts.append(choice.numerics)
    return tuple(parts)


def check_merge_policy(policy: str) -> str:
    """Return the policy if there is such a one. Raises UsageError."""
    if policy not in MERGE_POLICIES:
        raise UsageError(f"--policy is {policy!r:.40}, expected one of {', '.join(MERGE_POLICIES)}")
    return policy


def resolve(
    ours: TuningTable,
    theirs: TuningTable,
    policy: str,
    *,
    ages: tuple[Ages, Ages] | None = None,
) -> Resolution:
    """Return both tables' decisions as one table; where they differ, `policy` says which to keep.

    `best` compares times of one environment, layer, policy, routing and bucket, and believes only a win beyond the
    stored noise; what cannot be compared stays ours. `newest` needs `ages`, of our and their decisions. Buckets of
    one series that cannot be served together (another layout or numerics class) are taken from one side only.
    Raises CacheError at the first conflict under `error`, UsageError for an unknown policy.
    """
    resolver = _Resolver(check_merge_policy(policy), ages or ({}, {}))
    series: dict[tuple[str, ...], tuple[list[Decision], list[Decision]]] = {}
    for side, table in enumerate((ours, theirs)):
        for decision in table.decisions:
            series.setdefault(decision.sort_key[:4], ([], []))[side].append(decision)
    kept = [decision for mine, other in series.values() for decision in resolver.series(mine, other)]
    if policy == "error" and resolver.conflicts:
        more = f" and {len(resolver.conflicts) - 1} more" if len(resolver.conflicts) > 1 else ""
        first = (resolver.conflicts[0].ours + resolver.conflicts[0].theirs)[0]
        raise CacheError(
            f"both tables decide {first.layer.label} at {span(first.bucket)} tokens, {first.policy}{more}; "
            f"nothing was written, choose another --policy"
        )
    table = TuningTable(ours.environments + theirs.environments, tuple(kept))
    return Resolution(table=table, conflicts=tuple(resolver.conflicts), added=resolver.added, equal=resolver.equal)


@dataclass
class _Resolver:
    policy: str
    ages: tuple[Ages, Ages]
    conflicts: list[Conflict] = field(default_factory=list)
    added: int = 0
    equal: int = 0

    def series(self, ours: list[Decision], theirs: list[Decision]) -> list[Decision]:
        """Return what stays of one series."""
        if not ours or not theirs:
            self.added += len(theirs)
            return ours or theirs
        if len({served_together(d) for d in (*ours, *theirs)}) > 1 and ours != theirs:
            return self._whole(ours, theirs)
        kept: list[Decision] = []
        for mine, other in _groups(ours, theirs):
            if mine == other:
                self.equal += len(other)
                kept += mine
            elif not mine or not other:
                self.added += len(other)
                kept += mine or other
            else:
                kept += self._choose(mine, other, *self._judged(mine, other))
        return kept

    def _whole(self, ours: list[Decision], theirs: list[Decision]) -> list[Decision]:
        """Choose between series whose buckets cannot be served together."""
        common = {d.bucket for d in ours} & {d.bucket for d in theirs}
        mine, other = ([d for d in side if d.bucket in common] for side in (ours, theirs))
        why = "buckets of another layout or numerics class cannot be served together"
        missing = [d for d in ours if not covers_bucket(d.bucket, [x.bucket for x in theirs])]
        if self.policy == "best" and (missing or not common):
            spans = ", ".join(span(d.bucket) for d in missing or ours)
            return self._choose(ours, theirs, "ours", f"{why}, and theirs do not all cover {spans}")
        kept, reason = self._judged(mine, other) if self.policy == "best" else self._judged(ours, theirs)
        return self._choose(ours, theirs, kept, f"{reason}; {why}")

    def _choose(self, ours: list[Decision], theirs: list[Decision], kept: str, reason: str) -> list[Decision]:
        self.conflicts.append(Conflict(ours=tuple(ours), theirs=tuple(theirs), kept=kept, reason=reason))
        return ours if kept == "ours" else theirs

    def _judged(self, ours: Sequence[Decision], theirs: Sequence[Decision]) -> tuple[str, str]:
        if self.policy == "newest":
            return self._newer(ours, theirs)
        if self.policy == "best":
            return _better(ours, theirs)
        return ("theirs" if self.policy == "theirs" else "ours"), "as the policy says"

    def _newer(self, ours: Sequence[Decision], theirs: Sequence[Decision]) -> tuple[str, str]:
        times = [[age[d] for d in side if d in age] for side, age in zip((ours, theirs), self.ages, strict=True)]
        if not all(times):
            side = "ours" if not times[0] else "theirs"
            return "ours", f"when {side} was measured is not known, as its measurements are not there"
        if max(times[1]) > max(times[0]):
            return "theirs", "measured later"
        return "ours", "measured later, or at the same time"


def _better(ours: Sequence[Decision], theirs: Sequence[Decision]) -> tuple[str, str]:
    """Return which side is faster beyond the noise, and why. Both times must speak for theirs.

    A run on a machine that was faster that day is faster in everything: so where both raced the same defaults, the
    win over them must be larger, too. The smallest time alone would favour a lucky measurement.
    """
    if [d.bucket for d in ours] != [d.bucket for d in theirs]:
        return "ours", "other buckets, which do not compare"
    noise = max(c.noise for d in (*ours, *theirs) for c in (d.up, d.down))
    pairs = list(zip(ours, theirs, strict=True))
    faster = _mean([a.tuned_us / b.tuned_us for a, b in pairs]) - 1
    times = f"{sum(d.tuned_us for d in theirs):.1f} µs against {sum(d.tuned_us for d in ours):.1f}"
    if all(_same_configs(a, b) for a, b in pairs):
        return "ours", f"the same configs; theirs took {times}"
    if faster < -noise:
        return "ours", f"theirs are slower ({times}, noise {noise:.1%})"
    if faster <= noise:
        return "ours", f"within the noise of {noise:.1%} ({times})"
    same_defaults = all((a.up.default, a.down.default) == (b.up.default, b.down.default) for a, b in pairs)
    over_default = _mean([(a.tuned_us / a.default_us) / (b.tuned_us / b.default_us) for a, b in pairs]) - 1
    if same_defaults and over_default <= noise:
        return "ours", f"theirs took {times}, but the default was faster there, too"
    return "theirs", f"faster by {faster:.1%} ({times}, noise {noise:.1%})"


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _same_configs(a: Decision, b: Decision) -> bool:
    return a.up.config == b.up.config and a.down.config == b.down.config


def _groups(ours: list[Decision], theirs: list[Decision]) -> list[tuple[list[Decision], list[Decision]]]:
    """Return the least groups of decisions such that none overlaps with one of another group."""
    marked = sorted([(d, 0) for d in ours] + [(d, 1) for d in theirs], key=lambda item: item[0].bucket.above)
    groups: list[tuple[list[Decision], list[Decision]]] = []
    end = 0
    for decision, side in marked:
        if not groups or decision.bucket.above >= end:
            groups.append(([], []))
        groups[-1][side].append(decision)
        end = max(end, decision.bucket.tokens)
    return groups


def covers_bucket(bucket: Bucket, by: Sequence[Bucket]) -> bool:
    """Whether each token count of `bucket` is in one of the others."""
    above = bucket.above
    for other in sorted(by):
        if other.above <= above < other.tokens:
            above = other.tokens
    return above >= bucket.tokens

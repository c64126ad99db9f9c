"""What one numerics class for a whole layer costs: times of the class, of one layout in any bits, and of no bounds.

All three are minima over the same well-sampled timings, over nested sets, so that their order is not luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import product

from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.select import Evidence, Group, call_noise, call_us, group_of, pair_timing, well_sampled
from tilecast.autotune.timing import Timing, fastest, noise
from tilecast.errors import InputError
from tilecast.problem import TileConfig

Allowed = Callable[[TileConfig, Candidate], bool]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Three times of up and down together in µs, in one bucket or, with `tokens` None, of a call over all buckets.

    `class_us`: the fastest configs of the layer's classes and layouts. `layout_us`: the fastest of any bits, in the
    one weight layout a GEMM that would then be best over all buckets. `free_us`: the fastest of all, as if weights
    were stored in every layout. `noise` is that of the comparison of the first with the last.
    """

    tokens: int | None
    class_us: float
    layout_us: float
    free_us: float
    noise: float

    @property
    def total(self) -> float:
        """Class best over unconstrained best: what both constraints cost together, 1 or more."""
        return self.class_us / self.free_us

    @property
    def bits(self) -> float:
        """What one numerics class costs beyond one layout; in a single bucket it may be below 1."""
        return self.class_us / self.layout_us

    @property
    def layout(self) -> float:
        """What storing weights in one layout costs, 1 or more: a bound of memory, not of bits."""
        return self.layout_us / self.free_us


@dataclass(frozen=True, kw_only=True)
class ReproducibilityCost:
    """The cost in every bucket, in their order, and over all of them."""

    buckets: tuple[Cost, ...]
    overall: Cost


def reproducibility_cost(
    up: Sequence[Evidence],
    down: Sequence[Evidence],
    chosen_up: TileConfig,
    chosen_down: TileConfig,
    *,
    excluded_up: Collection[TileConfig] = (),
    excluded_down: Collection[TileConfig] = (),
    weights: Sequence[float] | None = None,
) -> ReproducibilityCost:
    """Return what `reproducible` costs for a layer, whose classes and layouts are those of the chosen configs.

    The evidence is given for the same buckets; `excluded` configs broke their class, so they count as other bits;
    `weights` are the buckets' shares of the calls. Raises InputError for a chosen config that is not of a class
    that `reproducible` allows, or is not timed in the first bucket.
    """
    sides = (_Side.of(up, chosen_up, excluded_up), _Side.of(down, chosen_down, excluded_down))
    of_class = _best_pairs(sides, [side.in_class for side in sides])
    if of_class is None:
        raise InputError("the measurements lack a well-sampled config of the chosen classes in some bucket")
    layouts = _best_layouts(sides, weights)
    free = _best_pairs(sides, [_any, _any])
    assert free is not None, "the class's own timings count"
    buckets = tuple(
        Cost(tokens=e.bucket.tokens, class_us=a.p50_us, layout_us=b.p50_us, free_us=c.p50_us, noise=noise(a, c))
        for e, a, b, c in zip(up, of_class, layouts, free, strict=True)
    )
    times = [call_us([t.p50_us for t in timings], weights) for timings in (of_class, layouts, free)]
    overall = Cost(
        tokens=None, class_us=times[0], layout_us=times[1], free_us=times[2], noise=call_noise(of_class, free, weights)
    )
    return ReproducibilityCost(buckets=buckets, overall=overall)


def _any(config: TileConfig, candidate: Candidate) -> bool:
    return True


@dataclass(frozen=True)
class _Side:
    """One GEMM: its evidence, the timings that count in each bucket, and the chosen group."""

    evidence: Sequence[Evidence]
    counted: Sequence[Sequence[Timing]]
    group: Group
    excluded: Collection[TileConfig]

    @classmethod
    def of(cls, evidence: Sequence[Evidence], chosen: TileConfig, excluded: Collection[TileConfig]) -> _Side:
        candidate = evidence[0].candidates.get(chosen)
        group = None if candidate is None else group_of(candidate, "reproducible")
        if group is None:
            raise InputError(f"{chosen.label} is not of a class that reproducible allows")
        side = cls(evidence, (), group, excluded)
        return cls(evidence, [side._counted(e) for e in evidence], group, excluded)

    def in_class(self, config: TileConfig, candidate: Candidate) -> bool:
        return group_of(candidate, "reproducible") == self.group and config not in self.excluded

    def _counted(self, e: Evidence) -> list[Timing]:
        # The smallest of many times with few samples is luck. The class's own count as they did for the choice.
        known = [t for t in e.timings.values() if t.config in e.candidates]
        own = [t for t in known if self.in_class(t.config, e.candidates[t.config])]
        kept = {t.config: t for t in (*well_sampled(known), *(well_sampled(own) if own else ()))}
        return list(kept.values())

    def by_order(self, bucket: int, allowed: Allowed) -> dict[str, list[Timing]]:
        candidates = self.evidence[bucket].candidates
        found: dict[str, list[Timing]] = {}
        for timing in self.counted[bucket]:
            candidate = candidates[timing.config]
            if allowed(timing.config, candidate):
                found.setdefault(candidate.order, []).append(timing)
        return found

    def layouts(self) -> list[str]:
        """Return the layouts that have a counted timing in every bucket."""
        each = [
            {e.candidates[t.config].layout for t in counted}
            for e, counted in zip(self.evidence, self.counted, strict=True)
        ]
        return sorted(set(each[0]).intersection(*each[1:]))


def _best_pairs(sides: tuple[_Side, _Side], allowed: Sequence[Allowed]) -> list[Timing] | None:
    """Return each bucket's best time of up and down in one order; None if some bucket has none."""
    found = []
    for bucket in range(len(sides[0].evidence)):
        up, down = (side.by_order(bucket, allow) for side, allow in zip(sides, allowed, strict=True))
        pairs = [pair_timing(fastest(up[order]), fastest(down[order])) for order in sorted(up) if order in down]
        if not pairs:
            return None
        found.append(min(pairs, key=lambda t: t.p50_us))
    return found


def _best_layouts(sides: tuple[_Side, _Side], weights: Sequence[float] | None) -> list[Timing]:
    """Return each bucket's best time in the pair of layouts that is fastest over all buckets."""
    best: list[Timing] = []
    least = math.inf
    for layouts in product(sides[0].layouts(), sides[1].layouts()):
        timings = _best_pairs(sides, [_within(layout) for layout in layouts])
        if timings is not None and (us := call_us([t.p50_us for t in timings], weights)) < least:
            best, least = timings, us
    assert best, "the chosen configs' layouts are in every bucket"
    return best


def _within(layout: str) -> Allowed:
    return lambda config, candidate: candidate.layout == layout

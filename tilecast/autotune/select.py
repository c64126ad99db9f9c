"""From measurements to choices: pure functions, no device, no store, no clock.

A time is the centre of a config's samples, without what a round did to all of its configs (timing.py, levels.py); over
ranks the slowest counts, as every rank waits for it. A config replaces the default only if it wins by more than the
noise of that very comparison. What must be the same in all buckets is chosen by the time of a call: the mean over the
workload's calls where it is known, else the geometric mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.timing import NOISE_FLOOR, Timing, fastest, noise, within_noise
from tilecast.errors import CoverageError, DeviceError, InputError
from tilecast.evidence import Choice
from tilecast.problem import Bucket, ExpertGemm, TileConfig, tokens_text

Group = tuple[str, ...]
"""What must be the same in all buckets: (layout,), or (layout, numerics class) under `reproducible`."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that selection knows about one GEMM in one bucket.

    `candidates` hold what can be chosen; `timings` the ones that ran well on every rank; `failures` why others
    did not.
    """

    gemm: ExpertGemm
    bucket: Bucket
    default: TileConfig
    candidates: Mapping[TileConfig, Candidate]
    timings: Mapping[TileConfig, Timing]
    failures: Mapping[TileConfig, str]


def pick(timings: Sequence[Timing], default: TileConfig) -> Timing:
    """Return the timing to choose: the default unless it is measurably slower than the best.

    Otherwise, of all that are as fast as the best but for less than any win counts, the first in the order on configs.
    """
    best = fastest(timings)
    for timing in timings:
        if timing.config == default and within_noise(timing, best):
            return timing
    equals = [t for t in timings if t.p50_us <= best.p50_us * (1 + NOISE_FLOOR)]
    return min(equals, key=lambda t: t.config.sort_key)


def bucket_weights(weights: Mapping[int, float], buckets: Sequence[Bucket]) -> tuple[float, ...]:
    """Return each bucket's share of the calls, from a share or a count for some token counts.

    Token counts that no bucket covers are left out. Raises InputError for a share that is negative or not finite,
    or when no bucket has any.
    """
    for tokens, share in weights.items():
        if not (math.isfinite(share) and share >= 0):
            raise InputError(f"the weight of {tokens_text(tokens)} is {share!r}, expected a number of at least 0")
    sums = [sum(share for tokens, share in weights.items() if b.above < tokens <= b.tokens) for b in buckets]
    total = sum(sums)
    if not total > 0:
        raise InputError("the weights give no share to any bucket that is tuned; name token counts that one covers")
    return tuple(share / total for share in sums)


def call_us(times_us: Sequence[float], weights: Sequence[float] | None) -> float:
    """Return the time that stands for all buckets, from one time of each.

    With `weights`, each bucket's share of the calls, the mean time of a call; None, where nothing is known of the
    workload, gives the geometric mean, in which a factor in a short bucket counts as much as in a long one.
    """
    if weights is None:
        return math.exp(sum(math.log(us) for us in times_us) / len(times_us))
    return sum(share * us for share, us in zip(weights, times_us, strict=True))


def call_noise(a: Sequence[Timing], b: Sequence[Timing], weights: Sequence[float] | None) -> float:
    """Return the relative difference of two series' `call_us` that cannot be told from none."""
    each = [noise(x, y) for x, y in zip(a, b, strict=True)]
    if weights is None:
        return math.sqrt(sum(x * x for x in each)) / len(each)
    parts = [share * t.p50_us for share, t in zip(weights, b, strict=True)]
    return math.sqrt(sum((part * x) ** 2 for part, x in zip(parts, each, strict=True))) / sum(parts)


def _call_us(timings: Sequence[Timing], weights: Sequence[float] | None) -> float:
    return call_us([t.p50_us for t in timings], weights)


def group_of(candidate: Candidate, policy: str) -> Group | None:
    """Return the group a candidate belongs to under a policy; None if the policy does not allow it."""
    if policy == "fastest":
        return (candidate.layout,)
    return (candidate.layout, candidate.numerics) if candidate.batch_invariant else None


def choose(
    evidence: Sequence[Evidence],
    policy: str,
    *,
    excluded: Collection[TileConfig] = (),
    weights: Sequence[float] | None = None,
) -> tuple[Group, tuple[Choice, ...]]:
    """Return the group to use for one GEMM, and its choice for each bucket.

    Of the groups that have a timing in every bucket, the one whose best times have the smallest `call_us` under
    `weights`, the buckets' shares of the calls; a group of the defaults if that is within noise of it. `excluded`
    configs are not chosen. Raises CoverageError where a default was not measured, DeviceError where a default
    does not run, or no group is left.
    """
    by_group, complete = _complete_groups(evidence, policy, excluded)
    group = _best_group(_Side(evidence, by_group, complete), policy, weights)
    choices = [_choice(e, of[group], policy, excluded) for e, of in zip(evidence, by_group, strict=True)]
    return group, tuple(choices)


def choose_pair(
    up: Sequence[Evidence],
    down: Sequence[Evidence],
    policy: str,
    *,
    excluded_up: Collection[TileConfig] = (),
    excluded_down: Collection[TileConfig] = (),
    weights: Sequence[float] | None = None,
) -> tuple[tuple[Choice, ...], tuple[Choice, ...]]:
    """Return the choices for a layer's up and down GEMMs, whose evidence is given for the same buckets.

    Each GEMM's group is chosen as `choose` does, unless the two have no order of the intermediate in common in some
    bucket, or are measurably slower together than the fastest pair of groups, as a group's best config may be of an
    order that the other GEMM lacks or is slow in: then it is that pair. Within a bucket both configs have the same
    order, and of the orders the one with the smallest sum of both times; the defaults' order if that is within
    noise of it. Raises as `choose` does.
    """
    sides = [_Side.of(up, policy, excluded_up), _Side.of(down, policy, excluded_down)]
    groups = _fitting_groups(sides[0], sides[1], policy, weights)
    chosen: tuple[list[Choice], list[Choice]] = ([], [])
    for bucket in range(len(up)):
        orders = _common_orders(sides[0].in_orders(groups[0], bucket), sides[1].in_orders(groups[1], bucket))
        defaults = {e.candidates[e.default].order for e in (up[bucket], down[bucket])}
        order = pick_order(orders, next(iter(defaults)) if len(defaults) == 1 else None)
        both = zip(chosen, (up[bucket], down[bucket]), orders[order], (excluded_up, excluded_down), strict=True)
        for choices, e, timings, excluded in both:
            choices.append(_choice(e, timings, policy, excluded))
    return tuple(chosen[0]), tuple(chosen[1])


Orders = Mapping[str, tuple[Sequence[Timing], Sequence[Timing]]]
"""The timings of up and of down by the order of the intermediate, neither empty."""


def pick_order(orders: Orders, default: str | None) -> str:
    """Return the order to use: the default one unless its best pair is measurably slower than the best of all.

    Otherwise, of the orders within noise of the best, the first by name. There must be at least one.
    """
    pairs = {order: pair_timing(fastest(up), fastest(down)) for order, (up, down) in orders.items()}
    best = min(pairs.values(), key=lambda t: t.p50_us)
    equals = [order for order in sorted(pairs) if within_noise(pairs[order], best)]
    return default if default is not None and default in equals else equals[0]


def pair_timing(up: Timing, down: Timing) -> Timing:
    """Return both timings as one: the sum of the times, and the error that the sum has. It bears up's config."""
    total = up.p50_us + down.p50_us
    error = math.hypot(up.p50_us * up.error, down.p50_us * down.error) / total
    return Timing(config=up.config, p50_us=total, error=error, samples=min(up.samples, down.samples))


@dataclass(frozen=True)
class _Side:
    """One GEMM's evidence with its timings by group, and the groups that every bucket has."""

    evidence: Sequence[Evidence]
    by_group: Sequence[Mapping[Group, list[Timing]]]
    complete: set[Group]

    @classmethod
    def of(cls, evidence: Sequence[Evidence], policy: str, excluded: Collection[TileConfig]) -> _Side:
        return cls(evidence, *_complete_groups(evidence, policy, excluded))

    def in_orders(self, group: Group, bucket: int) -> dict[str, list[Timing]]:
        candidates = self.evidence[bucket].candidates
        found: dict[str, list[Timing]] = {}
        for timing in self.by_group[bucket][group]:
            found.setdefault(candidates[timing.config].order, []).append(timing)
        return found


def _common_orders(up: Mapping[str, list[Timing]], down: Mapping[str, list[Timing]]) -> Orders:
    return {order: (up[order], down[order]) for order in up if order in down}


def _fitting_groups(up: _Side, down: _Side, policy: str, weights: Sequence[float] | None) -> tuple[Group, Group]:
    first, second = (_best_group(side, policy, weights) for side in (up, down))
    best: dict[tuple[Group, Group], list[Timing]] = {}
    for pair in product(sorted(up.complete), sorted(down.complete)):
        timings = _pair_timings(up, down, pair)
        if timings is not None:
            best[pair] = timings
    if not best:
        raise DeviceError(
            f"no working configs of {up.evidence[0].gemm.layer.label} up and down have the same order of the "
            "intermediate in every bucket; measure with a larger budget"
        )
    cost = {pair: _call_us(timings, weights) for pair, timings in best.items()}
    fastest_pair = min(cost, key=lambda pair: (cost[pair], pair))
    own = (first, second)
    if own in best and cost[own] <= cost[fastest_pair] * (1 + call_noise(best[own], best[fastest_pair], weights)):
        return own
    return fastest_pair


def _pair_timings(up: _Side, down: _Side, pair: tuple[Group, Group]) -> list[Timing] | None:
    """Return each bucket's best time of two groups together; None if they share no order in some bucket."""
    found = []
    for bucket in range(len(up.evidence)):
        orders = _common_orders(up.in_orders(pair[0], bucket), down.in_orders(pair[1], bucket))
        if not orders:
            return None
        found.append(min((pair_timing(fastest(u), fastest(d)) for u, d in orders.values()), key=lambda t: t.p50_us))
    return found


def _complete_groups(
    evidence: Sequence[Evidence], policy: str, excluded: Collection[TileConfig]
) -> tuple[list[dict[Group, list[Timing]]], set[Group]]:
    """Return the timings by group of each bucket, and the groups that every bucket has. Raises as `choose`."""
    for e in evidence:
        _require_default(e)
    by_group = [_grouped(e, policy, excluded) for e in evidence]
    complete = set(by_group[0]).intersection(*by_group[1:]) if by_group else set()
    if not complete:
        gemm = evidence[0].gemm
        kind = "weight layout" if policy == "fastest" else "batch-invariant numerics class"
        raise DeviceError(
            f"no {kind} has a working config for {gemm.layer.label} {gemm.name} at every one of "
            f"{', '.join(str(e.bucket.tokens) for e in evidence)} tokens"
            + ("" if policy == "fastest" else "; use the policy fastest, or measure with a larger budget")
        )
    return by_group, complete


def _require_default(e: Evidence) -> None:
    if e.default in e.timings:
        return
    gemm = f"{e.gemm.layer.label} {e.gemm.name} at {tokens_text(e.bucket.tokens)}"
    where = f"the default config {e.default.label} for {gemm}"
    if e.default in e.failures:
        raise DeviceError(f"{where} does not work here: {e.failures[e.default]}")
    raise CoverageError(f"{where} was not measured on every rank; run tune again, it goes on where it stopped")


def _grouped(e: Evidence, policy: str, excluded: Collection[TileConfig]) -> dict[Group, list[Timing]]:
    groups: dict[Group, list[Timing]] = {}
    barred = () if policy == "fastest" else excluded
    for config, timing in e.timings.items():
        candidate = e.candidates.get(config)
        group = None if candidate is None else group_of(candidate, policy)
        if group is not None and (not barred or config not in barred):
            groups.setdefault(group, []).append(timing)
    return {group: well_sampled(timings) for group, timings in groups.items()}


def well_sampled(timings: Sequence[Timing]) -> list[Timing]:
    """Return the timings with at least half as many samples as the one that has most."""
    # A config that was dropped after a round or two was slower then; its few samples must not win by luck.
    most = max(t.samples for t in timings)
    return [t for t in timings if 2 * t.samples >= most]


def _dropped(e: Evidence, chosen: Timing, policy: str, excluded: Collection[TileConfig]) -> list[Timing]:
    """Return the timings of what could stand for `chosen` and was dropped early: none of them wins, one is second."""

    def place(config: TileConfig) -> tuple[Group | None, str] | None:
        candidate = e.candidates.get(config)
        return None if candidate is None else (group_of(candidate, policy), candidate.order)

    barred = {chosen.config, *(() if policy == "fastest" else excluded)}
    wanted = place(chosen.config)
    return [t for config, t in e.timings.items() if config not in barred and place(config) == wanted]


def _best_group(side: _Side, policy: str, weights: Sequence[float] | None) -> Group:
    best_in = {group: [fastest(of_group[group]) for of_group in side.by_group] for group in side.complete}
    cost = {group: _call_us(timings, weights) for group, timings in best_in.items()}
    best = min(cost, key=lambda group: (cost[group], group))
    defaults = {group_of(e.candidates[e.default], policy) for e in side.evidence if e.default in e.candidates}
    for group in sorted(side.complete & defaults, key=lambda g: (cost[g], g)):
        if cost[group] <= cost[best] * (1 + call_noise(best_in[group], best_in[best], weights)):
            return group
    return best


def group_call_us(
    evidence: Sequence[Evidence],
    policy: str,
    *,
    excluded: Collection[TileConfig] = (),
    weights: Sequence[float] | None = None,
) -> dict[Group, float]:
    """Return what `choose` compares: the `call_us` of each group that has a timing in every bucket."""
    by_group, complete = _complete_groups(evidence, policy, excluded)
    return {g: _call_us([fastest(of[g]) for of in by_group], weights) for g in sorted(complete)}


def _choice(e: Evidence, timings: Sequence[Timing], policy: str, excluded: Collection[TileConfig]) -> Choice:
    chosen, default = pick(timings, e.default), e.timings[e.default]
    others = [t for t in timings if t.config != chosen.config] or _dropped(e, chosen, policy, excluded)
    runner_up = fastest(others) if others else None
    rival = default if chosen.config != e.default else runner_up
    return Choice(
        config=chosen.config,
        p50_us=chosen.p50_us,
        default=e.default,
        default_us=default.p50_us,
        runner_up=None if runner_up is None else runner_up.config,
        runner_up_us=None if runner_up is None else runner_up.p50_us,
        # What a second look would differ by, where there is nothing to compare with.
        noise=noise(chosen, chosen if rival is None else rival),
        numerics=e.candidates[chosen.config].numerics,
    )

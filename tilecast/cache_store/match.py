"""Which decision of a table holds for a device, a layer and a token count, and if none, why, field by field."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields

from tilecast.environment import Environment, Mismatch
from tilecast.errors import UsageError
from tilecast.evidence import Decision, TuningTable
from tilecast.problem import ExpertLayer, tokens_text

RELAXABLE = tuple(name for name in (*Environment.HARD, *Environment.HARD_TO_MINOR) if name != "device_kind")
"""Fields whose difference may be allowed by name; a config of another kind of device means nothing here."""


Alike = Callable[[Decision, Decision], bool]
"""Whether two decisions of a layer may hold side by side: one weight layout and, where wanted, one numerics class."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The answer of `match`.

    With a decision: `environment` is where it was made and `differences` the soft and the relaxed fields in which
    that differs from here. Without: `environment` is the nearest one in the table (None if there is none),
    `differences` all fields in which the nearest entry differs from what was asked for, and `reasons` says it in
    lines.
    """

    decision: Decision | None = None
    environment: Environment | None = None
    differences: tuple[Mismatch, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def hit(self) -> bool:
        """Whether a decision holds."""
        return self.decision is not None

    @property
    def relaxed(self) -> tuple[Mismatch, ...]:
        """The hard fields in which the decision's environment differs, allowed because the caller named them."""
        return tuple(d for d in self.differences if d.hard) if self.hit else ()


def check_relax(names: Iterable[str]) -> tuple[str, ...]:
    """Return the fields to relax, each once. Raises UsageError for one that cannot be, or need not be."""
    found = tuple(dict.fromkeys(names))
    for name in found:
        if name not in RELAXABLE:
            raise UsageError(
                f"--relax is {name!r:.40}, expected a hard field of the environment: {', '.join(RELAXABLE)}"
            )
    return found


def match(
    table: TuningTable,
    environment: Environment,
    layer: ExpertLayer,
    tokens: int,
    policy: str,
    routing: str = "uniform",
    *,
    relax: Collection[str] = (),
    reach: float | None = None,
    alike: Alike | None = None,
) -> Match:
    """Find the decision for `tokens` rows of `layer` on this device under a policy and routing profile.

    The bucket that covers `tokens` holds, whether it was tuned for just that count or for more; past the buckets
    nothing does, and with `reach` neither does one that was tuned for more than `reach` times the tokens. Of several
    environments that fit, the one that differs least is asked first; hard fields named in `relax` may differ.
    Another one's bucket holds where it fills a gap, overlaps none that hold, and is `alike` them (None: not asked).
    """
    if not table.decisions:
        return Match(reasons=("the table is empty",))
    places = sorted(table.environments, key=lambda there: _distance(environment, there))
    fitting = [there for there in places if not blocking(environment, there, relax)]
    groups: dict[str, list[Decision]] = {there.digest: [] for there in fitting}
    for decision in table.decisions:
        asked = decision.policy == policy and decision.routing == routing and decision.layer == layer
        if asked and decision.environment in groups:
            groups[decision.environment].append(decision)
    for decision in side_by_side(groups.values(), alike):
        if tokens in decision.bucket:
            there = next(e for e in fitting if e.digest == decision.environment)
            if reach is not None and decision.bucket.tokens > reach * tokens:
                return _too_far(decision, there, tokens, reach)
            return Match(decision=decision, environment=there, differences=environment.compare(there))
    if not fitting:
        return _other_device(environment, places)
    return _near_miss(table, fitting, layer, tokens, policy, routing)


def side_by_side(groups: Iterable[Sequence[Decision]], alike: Alike | None = None) -> list[Decision]:
    """Return the decisions of one layer that hold together, ascending; the groups are environments, the closest first.

    All of the closest hold, and of the others what fills gaps and is `alike` the closest's.
    """
    chosen: list[Decision] = []
    for number, group in enumerate(group for group in groups if group):
        for decision in group:
            new = decision.bucket
            covered = any(new.above < c.bucket.tokens and c.bucket.above < new.tokens for c in chosen)
            if number == 0 or (not covered and (alike is None or alike(decision, chosen[0]))):
                chosen.append(decision)
    return sorted(chosen, key=lambda d: d.bucket.tokens)


def blocking(here: Environment, there: Environment, relax: Collection[str] = ()) -> tuple[Mismatch, ...]:
    """Return the hard fields, but for relaxed ones, in which `there` differs: why its decisions do not hold here."""
    return tuple(found for found in here.compare(there) if found.hard and found.field not in relax)


def covered(decisions: Iterable[Decision]) -> str:
    """Return the token counts that decisions cover, adjoining buckets joined: `1…16, 33…64`."""
    joined: list[list[int]] = []
    for bucket in sorted({decision.bucket for decision in decisions}):
        if joined and bucket.above <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], bucket.tokens)
        else:
            joined.append([bucket.above, bucket.tokens])
    return ", ".join(str(high) if low + 1 == high else f"{low + 1}…{high}" for low, high in joined)


def _too_far(decision: Decision, there: Environment, tokens: int, reach: float) -> Match:
    tuned = decision.bucket.tokens
    return Match(
        environment=there,
        reasons=(f"covered only by what was tuned for {tuned}, {tuned / tokens:g} times {tokens_text(tokens)}; "
                 f"reach is {reach:g}",),
    )  # fmt: skip


def _distance(here: Environment, there: Environment) -> tuple[int, int, str]:
    differences = here.compare(there)
    return sum(d.hard for d in differences), len(differences), there.digest


def _other_device(here: Environment, places: list[Environment]) -> Match:
    nearest = places[0]
    differences = here.compare(nearest)
    hard = [str(difference) for difference in differences if difference.hard]
    head = "the table was made in another environment"
    if len(places) > 1:
        head = f"none of the table's {len(places)} environments fits; in the nearest one"
    return Match(environment=nearest, differences=differences, reasons=(f"{head}: {'; '.join(hard)}",))


def _near_miss(
    table: TuningTable, fitting: list[Environment], layer: ExpertLayer, tokens: int, policy: str, routing: str
) -> Match:
    """Explain a miss by the series of buckets that differs from the question in the fewest fields."""
    order = {there.digest: position for position, there in enumerate(fitting)}
    usable = [d for d in table.decisions if d.environment in order]
    if not usable:
        return Match(environment=fitting[0], reasons=("the table has no decision for this environment",))

    def differences(decision: Decision) -> tuple[Mismatch, ...]:
        return _series_differences(decision, layer, policy, routing)

    nearest = min(usable, key=lambda d: (len(differences(d)), order[d.environment], d.sort_key))
    there, found = fitting[order[nearest.environment]], differences(nearest)
    series = [d for d in usable if d.sort_key[:4] == nearest.sort_key[:4]]
    reasons = [str(difference) for difference in found]
    if reasons:
        reasons.insert(
            0, f"no decision is for this layer, policy and routing; the nearest is for {nearest.layer.label}"
        )
    if not any(tokens in d.bucket for d in series):
        reasons.append(f"no decision covers {tokens_text(tokens)}; covered: {covered(series)}")
    return Match(environment=there, differences=found, reasons=tuple(reasons))


def _series_differences(decision: Decision, layer: ExpertLayer, policy: str, routing: str) -> tuple[Mismatch, ...]:
    pairs = [(f.name, getattr(layer, f.name), getattr(decision.layer, f.name)) for f in fields(layer)]
    pairs += [("policy", policy, decision.policy), ("routing", routing, decision.routing)]
    return tuple(
        Mismatch(field=name, here=str(here), there=str(there), hard=True)
        for name, here, there in pairs
        if here != there
    )

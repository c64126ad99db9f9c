"""Which decision of a table holds for a device, a layer and a token count, and if none, why, field by field."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from tilecast.environment import Environment, Mismatch
from tilecast.evidence import Decision, TuningTable
from tilecast.problem import ExpertLayer, tokens_text


@dataclass(frozen=True, kw_only=True)
class Match:
    """The answer of `match`.

    With a decision: `environment` is where it was made and `differences` the soft fields in which that differs
    from here. Without: `environment` is the nearest one in the table (None if there is none), `differences` all
    fields in which the nearest entry differs from what was asked for, and `reasons` says it in lines.
    """

    decision: Decision | None = None
    environment: Environment | None = None
    differences: tuple[Mismatch, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def hit(self) -> bool:
        """Whether a decision holds."""
        return self.decision is not None


def match(
    table: TuningTable,
    environment: Environment,
    layer: ExpertLayer,
    tokens: int,
    policy: str,
    routing: str = "uniform",
) -> Match:
    """Find the decision for `tokens` rows of `layer` on this device under a policy and routing profile.

    Of several environments that fit, the one that differs least is asked first.
    """
    if not table.decisions:
        return Match(reasons=("the table is empty",))
    places = sorted(table.environments, key=lambda there: _distance(environment, there))
    fitting = [there for there in places if environment.accepts(there)]
    for there in fitting:
        for decision in table.decisions:
            if decision.environment == there.digest and _covers(decision, layer, tokens, policy, routing):
                return Match(decision=decision, environment=there, differences=environment.compare(there))
    if not fitting:
        return _other_device(environment, places)
    return _near_miss(table, fitting, layer, tokens, policy, routing)


def covered(decisions: Iterable[Decision]) -> str:
    """Return the token counts that decisions cover, adjoining buckets joined: `1…16, 33…64`."""
    joined: list[list[int]] = []
    for bucket in sorted({decision.bucket for decision in decisions}):
        if joined and bucket.above <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], bucket.tokens)
        else:
            joined.append([bucket.above, bucket.tokens])
    return ", ".join(str(high) if low + 1 == high else f"{low + 1}…{high}" for low, high in joined)


def _covers(decision: Decision, layer: ExpertLayer, tokens: int, policy: str, routing: str) -> bool:
    return (
        tokens in decision.bucket
        and decision.policy == policy
        and decision.routing == routing
        and decision.layer == layer
    )


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

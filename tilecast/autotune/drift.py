"""Whether serving spreads tokens over experts as the profile expects that a table was tuned for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tilecast.autotune.record import ServingRecord, read_record
from tilecast.autotune.routing_profiles import RoutingProfile, histogram_of, parse_profile
from tilecast.errors import InputError
from tilecast.evidence import Decision
from tilecast.problem import ExpertLayer

if TYPE_CHECKING:
    import torch

CLEARLY = 0.1
"""Part of the slots that must have gone elsewhere than expected before it is spoken of."""
CHANCE = 0.6
"""Times √(experts ÷ slots): more than equal profiles differ by chance, which is 0.4 of it (half the sum of the mean
deviations √(2p ÷ πn) of n slots' shares, with p the same for all experts)."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A layer whose recorded loads are not those of the profile that it was tuned for.

    `moved` is the part of the slots (0 to 1) that went elsewhere, experts compared in the order of their popularity;
    `busiest` and `expected` are the most popular expert's share of the slots, recorded and in the profile.
    """

    layer: ExpertLayer
    routing: str
    moved: float
    busiest: float
    expected: float


def drifts(decisions: Iterable[Decision], record: ServingRecord) -> list[Drift]:
    """Return the layers whose recorded loads clearly differ from every profile that they were tuned for, worst first.

    Layers that were not recorded, or for a histogram that is only known by its name, are left out: nothing is known.
    """
    profiles: dict[ExpertLayer, dict[str, None]] = {}
    for d in decisions:
        profiles.setdefault(d.layer, {})[d.routing] = None
    try:
        recorded = histogram_of(record)
    except InputError:
        return []  # Nothing was routed.
    found = []
    for layer, names in profiles.items():
        slots = [sum(load.slots) + load.absent for load in recorded.loads.get(layer.digest, ())]
        if not slots:
            continue
        compared = [_compare(layer, name, recorded) for name in names]
        known = [drift for drift in compared if drift is not None]
        if len(known) < len(compared):
            continue
        nearest = min(known, key=lambda drift: drift.moved)
        # The place with the fewest slots: each is ordered by its own popularity, which chance alone makes uneven.
        if nearest.moved > CLEARLY + CHANCE * math.sqrt(layer.global_experts / min(slots)):
            found.append(nearest)
    return sorted(found, key=lambda drift: (-drift.moved, drift.layer.digest))


def _compare(layer: ExpertLayer, name: str, recorded: RoutingProfile) -> Drift | None:
    if name != recorded.name and name.startswith("histogram:"):
        return None
    own = _popularity(recorded, layer)
    wanted = own if name == recorded.name else _popularity(parse_profile(name), layer)
    moved = float((own - wanted).abs().sum()) / 2
    return Drift(layer=layer, routing=name, moved=moved, busiest=float(own[0]), expected=float(wanted[0]))


def _popularity(profile: RoutingProfile, layer: ExpertLayer) -> torch.Tensor:
    """Return float64 [experts + 1]: the slots' shares of this rank's experts, most popular first, and of the rest."""
    import torch

    shares = profile.probabilities(layer)
    if profile.exponent and layer.top_k < layer.global_experts:
        shares = _among_top_k(shares, layer.top_k) / layer.top_k
    own = shares[: layer.experts].sort(descending=True).values
    return torch.cat([own, shares[layer.experts :].sum()[None]])


def _among_top_k(weights: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return how likely each expert is among the `top_k` that are drawn by these weights without replacement.

    With exponential clocks (see `RoutingProfile.log_weights`) it is 1 - exp(-w·t), at the t at which they sum to
    `top_k`, found by halving.
    """
    low, high = 0.0, 1.0
    while float(-(-weights * high).expm1().sum()) < top_k:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(-(-weights * middle).expm1().sum()) < top_k else (low, middle)
    return -(-weights * high).expm1()


def drift_line(found: list[Drift], record: Path) -> str:
    """Return the one line to say of layers that drifted, of which there is one at least."""
    worst = found[0]
    more = "" if len(found) == 1 else f" (and {len(found) - 1} more)"
    return (
        f"the table was tuned for routing {worst.routing}, but {record} recorded other loads for {worst.layer.label}"
        f"{more}: {worst.moved:.0%} of the slots went elsewhere, the busiest expert got {worst.busiest:.1%}, expected "
        f"{worst.expected:.1%}; tune with --routing {record}"
    )


def drift_from_file(decisions: Iterable[Decision], record: str | None) -> str | None:
    """Return the line to say of what an earlier process recorded; None where all is as expected, or nothing is there.

    A file that is no record is passed over: the next writing replaces it.
    """
    if record is None or not Path(record).is_file():
        return None
    try:
        found = drifts(decisions, read_record(Path(record)))
    except InputError:
        return None
    return drift_line(found, Path(record)) if found else None

"""Search strategies by name, and the effort profiles that choose among them."""

from __future__ import annotations

from collections.abc import Callable

from tilecast.autotune.search.base import Strategy, Turn, View
from tilecast.autotune.search.exhaustive import Exhaustive
from tilecast.autotune.search.halving import Halving
from tilecast.autotune.search.random_start import RandomStart
from tilecast.autotune.search.ranked import Ranked
from tilecast.errors import UsageError

__all__ = ["EFFORTS", "STRATEGIES", "Strategy", "Turn", "View", "strategy_for"]

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ranked": Ranked,
    "ranked-wide": lambda: Ranked(
        samples_each=3.0, least=60, most=400, joining=(5, 4, 3, 2), finalists=(10, 8, 6, 4, 3), rounds=24, explore=3
    ),
    "halving": Halving,
    "random": RandomStart,
    "exhaustive": Exhaustive,
}
"""Every strategy, by the name that reports use."""
EFFORTS = {"quick": "ranked", "standard": "ranked-wide", "exhaustive": "exhaustive"}
"""The strategy of each effort profile."""


def strategy_for(name: str) -> Strategy:
    """Return the strategy of an effort profile, or one by its own name. Raises UsageError."""
    found = STRATEGIES.get(EFFORTS.get(name, name))
    if found is None:
        raise UsageError(f"effort is {name!r}, expected {', '.join(EFFORTS)}, or one of {', '.join(STRATEGIES)}")
    return found()

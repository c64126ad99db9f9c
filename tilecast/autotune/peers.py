"""How ranks that tune together keep the same survivors; one rank alone needs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tilecast.evidence import Measurement


class Peers(Protocol):
    """The ranks that measure one plan together.

    `merge` is called by every rank equally often, in the same order: once at the start and once per round of
    every task. All ranks get the same answer in the same order, this rank's own measurements included; equal
    keys may come more than once. It may raise, which ends the tuning.
    """

    rank: int
    world_size: int

    def merge(self, measurements: Sequence[Measurement], stop: bool) -> tuple[list[Measurement], bool]:
        """Return all ranks' measurements, by rank, and whether any rank wants this task to stop."""
        ...


class Alone:
    """The only rank."""

    rank = 0
    world_size = 1

    def merge(self, measurements: Sequence[Measurement], stop: bool) -> tuple[list[Measurement], bool]:
        """Return what was given."""
        return list(measurements), stop

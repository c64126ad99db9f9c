"""Importing into a store that has decisions of its own: conflicts are settled by a policy, each with its reason."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from tilecast.cache_store.bundle import Bundle
from tilecast.cache_store.gc import delete_decisions, open_database
from tilecast.cache_store.resolve import Conflict, check_merge_policy, resolve
from tilecast.cache_store.store import open_store
from tilecast.cache_store.streams import latest_times, place_of
from tilecast.evidence import Decision, Measurement
from tilecast.store import Store


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What an import did: decisions put into the store or taken out of it, new measurements, and the conflicts."""

    put: int
    removed: int
    measurements: int
    conflicts: tuple[Conflict, ...]


def adopt_under(bundle: Bundle, where: str | Path, policy: str = "theirs") -> Adopted:
    """Put what a bundle holds into the store at a path or URL; where both decide the same, `policy` says who stays.

    The store's decisions are ours, the bundle's theirs. Measurements are united. Raises CacheError, under `error` for
    a conflict, and nothing is imported then; UsageError for an unknown policy.
    """
    check_merge_policy(policy)
    with open_store(where) as store:
        ours = store.table()
        mine = _store_times(where, ours.decisions) if policy == "newest" else {}
        found = resolve(ours, bundle.table, policy, ages=(mine, _times(bundle)))
        kept, present = set(found.table.decisions), set(ours.decisions)
        put = [decision for decision in found.table.decisions if decision not in present]
        gone = [decision for decision in ours.decisions if decision not in kept]
        new = _put(store, bundle, put)
    if gone:
        # Most were displaced by what was put; what remains cannot be served together with that.
        with contextlib.closing(open_database(where)) as database:
            delete_decisions(database, gone)
    return Adopted(put=len(put), removed=len(gone), measurements=new, conflicts=found.conflicts)


def _put(store: Store, bundle: Bundle, decisions: list[Decision]) -> int:
    for environment in bundle.table.environments:
        store.add_environment(environment)
    new = store.add_measurements(list(bundle.measurements))
    store.put_decisions(decisions)
    return new


def _times(bundle: Bundle) -> dict[Decision, float]:
    latest: dict[tuple[str, str, str, int], float] = {}
    for m in bundle.measurements:
        place = _measured_at(m)
        latest[place] = max(m.measured_at, latest.get(place, m.measured_at))
    return {d: latest[place_of(d)] for d in bundle.table.decisions if place_of(d) in latest}


def _measured_at(measurement: Measurement) -> tuple[str, str, str, int]:
    return measurement.environment, measurement.gemm.layer.digest, measurement.routing, measurement.tokens


def _store_times(where: str | Path, decisions: tuple[Decision, ...]) -> dict[Decision, float]:
    with contextlib.closing(open_database(where, read_only=True)) as database, database.reading() as connection:
        latest = latest_times(connection)
    return {d: latest[place_of(d)] for d in decisions if place_of(d) in latest}

"""Which routing profile's decisions commands ask a table for, and how to tune for the same one."""

from __future__ import annotations

from tilecast.environment import Environment
from tilecast.evidence import TuningTable
from tilecast.settings import Settings

UNIFORM = "uniform"


def asked_routing(
    found: TuningTable, policy: str, place: Environment, given: str | None, relaxed: tuple[str, ...] = ()
) -> str:
    """Return the routing profile's name that serving in an environment asks for; `given` None is the table's own.

    Raises InputError for a name or a file that is no profile, CoverageError for a table of several.
    """
    from tilecast.cache_store.match import blocking
    from tilecast.engine.runtime import routing_named
    from tilecast.engine.table_index import routing_of

    named = routing_named(given)
    fits = frozenset(e.digest for e in found.environments if not blocking(place, e, relaxed))
    return routing_of(found, policy, fits) if named is None else named


def tuned_routing(given: str | None, asked: str, settings: Settings) -> str | None:
    """Return what `tune --routing` takes for the profile that was asked for, None where it tunes for that anyway."""
    if asked == UNIFORM and settings.routing is None:
        return None
    if given is None and asked.startswith("histogram:"):
        return "FILE"  # The counts' name says what they are; only their file can be tuned for.
    return given or asked

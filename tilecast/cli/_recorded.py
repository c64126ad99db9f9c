"""Tuning what serving missed: from a record (TM_GEMM_RECORD) to a table that covers it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tilecast.cli._exit import resumable
from tilecast.cli._output import Output, plural
from tilecast.cli._run import reported_tuning
from tilecast.cli._stores import read_table
from tilecast.problem import ExpertLayer
from tilecast.settings import DEFAULT_TOKENS

if TYPE_CHECKING:
    from tilecast.autotune.routing_profiles import RoutingProfile
    from tilecast.engine.group import Group
    from tilecast.engine.tuning import Search
    from tilecast.evidence import TuningTable

Missed = dict[ExpertLayer, dict[int, int]]
"""Per layer the calls that ran a default, by token count."""


def read_missed(
    path: Path, layers: Iterable[ExpertLayer] | None, output: Output
) -> tuple[Missed, dict[int, float] | None]:
    """Return what a record says was missed, of `layers` only where given, and note it.

    With it comes each token count's share of these layers' calls, hits included; None where nothing was missed.
    Raises InputError.
    """
    from tilecast.autotune.record import read_record

    record = read_record(path)
    wanted = None if layers is None else set(layers)
    missed = {seen.layer: seen.missed for seen in record.layers if seen.missed}
    kept = {layer: counts for layer, counts in missed.items() if wanted is None or layer in wanted}
    for layer, counts in kept.items():
        shown = ", ".join(map(str, list(counts)[:8])) + (f", … {max(counts)}" if len(counts) > 8 else "")
        output.note(f"  {layer.label}: {plural(sum(counts.values()), 'call')} missed, at {shown} tokens")
    if len(kept) < len(missed):
        output.note(f"  {plural(len(missed) - len(kept), 'layer')} of the record left out: not of this model")
    if not kept:
        output.note(f"{path} holds no misses to tune")
    return kept, record.shares(kept) or None


def tune_missed(
    missed: Missed,
    tokens: tuple[int, ...] | None,
    *,
    policy: str,
    profile: RoutingProfile | None,
    base: str | None,
    where: str,
    group: Group,
    output: Output,
    search: Search | None,
    budget_s: float | None,
    fresh: bool,
) -> TuningTable:
    """Tune what was missed on all ranks, and return it added to the table at `base`, if one is given.

    Token counts are the missed ones, or those of `tokens` that cover them. `missed` must be equal on all ranks; the
    other arguments and what is raised are as for `tune_layers`.
    """
    from tilecast.autotune.record import edges_for
    from tilecast.cache_store.store import open_store
    from tilecast.engine.agreement import agree_on_environment, agree_on_table
    from tilecast.engine.runtime import default_registry
    from tilecast.engine.table_runtime import Runtime, missing_buckets
    from tilecast.engine.tuning import tune_missing

    with resumable("measurements made"), group.guard(), reported_tuning(output) as progress:
        here = agree_on_environment(group)
        table = agree_on_table(group, read_table(base) if base is not None and group.rank == 0 else None)
        runtime = Runtime(
            table, environment=here, registry=default_registry(), policy=policy,
            routing=None if profile is None else profile.name,
        )  # fmt: skip
        missing = {}
        for layer, counts in missed.items():
            edges = edges_for(counts, DEFAULT_TOKENS) if tokens is None else edges_for(counts, tokens, most=0)
            missing[layer] = missing_buckets(runtime, layer, edges)
        store = open_store(where) if group.rank == 0 else None
        try:
            return tune_missing(
                runtime, missing, store, group, profile=profile, search=search, budget_s=budget_s, fresh=fresh,
                progress=progress,
            )  # fmt: skip
        finally:
            if store is not None:
                store.close()

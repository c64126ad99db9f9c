"""Adopting decisions of another environment on purpose: hard fields relaxed by name, and that recorded for good."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from tilecast.cache_store.match import blocking, check_relax
from tilecast.environment import Environment
from tilecast.evidence import TuningTable


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """A table with what was relaxed added to it: for each environment adopted, the one made up for its decisions."""

    table: TuningTable
    adopted: tuple[tuple[Environment, Environment], ...] = ()

    @property
    def decisions(self) -> int:
        """How many decisions were adopted."""
        made_up = {environment.digest for _, environment in self.adopted}
        return sum(decision.environment in made_up for decision in self.table.decisions)


def relax_table(table: TuningTable, here: Environment, names: Collection[str]) -> Relaxed:
    """Add to a table, under an environment that fits `here`, the decisions that only hard fields in `names` keep out.

    The environment made up has this device's values in those fields, and its `system`, a soft field that every
    command shows, says which they were and where the decisions come from; so it goes into every digest and export.
    What was certified there was not certified here: these decisions' certificate is `none`. The original decisions
    stay. Raises UsageError for a field that cannot be relaxed.
    """
    allowed = check_relax(names)
    adopted: list[tuple[Environment, Environment]] = []
    decisions = list(table.decisions)
    for there in table.environments:
        hard = blocking(here, there)
        own = [d for d in table.decisions if d.environment == there.digest]
        if not own or not hard or any(found.field not in allowed for found in hard):
            continue
        made_up = _made_up(here, there, tuple(found.field for found in hard))
        adopted.append((there, made_up))
        decisions += [replace(d, environment=made_up.digest, certificate="none") for d in own]
    environments = (*table.environments, *(made_up for _, made_up in adopted))
    return Relaxed(table=TuningTable(environments, tuple(decisions)), adopted=tuple(adopted))


def _made_up(here: Environment, there: Environment, names: tuple[str, ...]) -> Environment:
    def shown(name: str) -> str:
        value = str(getattr(there, name))
        return value[:12] if name == "kernel_source" else value

    was = ", ".join(f"{name} was {shown(name)!r}" for name in names)
    record = f"{there.system}; relaxed: {was}, in environment {there.digest[:12]}".removeprefix("; ")
    return replace(there, system=record, **{name: getattr(here, name) for name in names})

"""The table in use: which runtime a process looks up in, and what puts one in use.

A process has one table in use, and over it one `Runtime` for each kind of device that its layers are on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tilecast import environment as environments
from tilecast.autotune.drift import drift_from_file
from tilecast.autotune.routing_profiles import load_profile
from tilecast.engine import recording
from tilecast.engine.table_index import Entry
from tilecast.engine.table_runtime import Miss, Runtime
from tilecast.environment import Environment
from tilecast.errors import TilecastError
from tilecast.evidence import TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertLayer
from tilecast.settings import Settings

logger = logging.getLogger(__name__)


class _InUse:
    """The table in use of this process: a runtime for the main kind of device, others made when asked for."""

    def __init__(self, runtime: Runtime, others: Mapping[str, Runtime | TilecastError]) -> None:
        self.main = runtime
        self.refused = {kind: found for kind, found in others.items() if isinstance(found, TilecastError)}
        self.runtimes = {kind: found for kind, found in others.items() if isinstance(found, Runtime)}
        self.runtimes[runtime.environment.device_kind] = runtime

    def of(self, kind: str) -> Runtime:
        found = self.runtimes.get(kind)
        if found is None:
            if kind in self.refused:
                raise self.refused[kind]
            found = self.main.with_environment(environments.environment_for(kind))
            found.log_differences()
            self.runtimes[kind] = found
        return found


_in_use: _InUse | None = None


_lent: tuple[_InUse | None, _InUse | None] = (None, None)
"""What a load put in use by settings of its own, and what was in use before."""


@contextmanager
def lent() -> Iterator[None]:
    """Have what the block puts in use be so until `own_again` alone: it was asked for one load, not by the program."""
    global _lent
    own_again()
    before = _in_use
    try:
        yield
    finally:
        if _in_use is not before:
            _lent = (_in_use, before)


def own_again() -> None:
    """Put back what was in use before `lent`, unless the program has put something else in use since."""
    global _in_use, _lent
    if _lent[0] is not None and _in_use is _lent[0]:
        _in_use = _lent[1]
    _lent = (None, None)


def in_use() -> bool:
    """Whether this process has a table in use."""
    return _in_use is not None


def current(kind: str | None = None) -> Runtime:
    """Return the runtime in use for a kind of device, `cpu` or `cuda`; the first call reads the environment variables.

    Without `kind` it is the main one: that of the current GPU if there is one, unless the table in use is for the
    CPU alone. In one process, `TM_GEMM_IMPORT` is read here. With several ranks, all of them agree on rank 0's
    table first, so every rank must come here. Raises what reading and validating a table raise, AgreementError,
    and DeviceError for a device that is not here.
    """
    if _in_use is None:
        # Imported here: the agreement builds on this module.
        from tilecast.engine.agreement import startup

        startup(())
    assert _in_use is not None, "startup puts a table in use or raises"
    return _in_use.main if kind is None else _in_use.of(kind)


def use_table(
    table: TuningTable | None,
    *,
    policy: str | None = None,
    miss: str | None = None,
    routing: str | None = None,
    warn_miss: bool | None = None,
    environment: Environment | None = None,
    registry: Registry | None = None,
    settings: Settings | None = None,
) -> Runtime:
    """Make `table` (None: an empty one) the table in use of this process and return its main runtime.

    What is not given comes from `settings`, by default from the environment variables; `environment` is by
    default the current GPU's where there is one and the table is not for the CPU alone. Layers that were
    prepared before keep the runtime that they were prepared with. Raises what `Runtime` raises.
    """
    chosen = settings or Settings.from_environment()
    used = table or TuningTable()
    made = Runtime(
        used,
        environment=environment or main_environment(used),
        registry=registry or default_registry(),
        policy=policy or chosen.policy,
        routing=routing or routing_named(chosen.routing),
        miss=miss or chosen.miss,
        warn_miss=chosen.warn_cache_miss if warn_miss is None else warn_miss,
    )
    made.log_differences()
    drift = drift_from_file(used.decisions, chosen.record_to)
    if drift is not None:
        logger.warning("%s", drift)
    recording.start(chosen.record_to)
    return use_runtime(made)


def routing_named(text: str | None) -> str | None:
    """Return the name of the profile that TM_GEMM_ROUTING, a name or a file, stands for. Raises InputError."""
    if text is None or text.startswith("histogram:"):
        # A lookup needs no counts.
        return text
    return load_profile(text).name


def main_environment(table: TuningTable) -> Environment:
    """Return the current GPU's environment, or the CPU's where there is none or the table is for CPUs alone."""
    here = environments.here()
    return here if may_run(table, here.device_kind) else environments.cpu_environment()


def may_run(table: TuningTable, kind: str) -> bool:
    """Whether a table says anything for a kind of device, or nothing for any."""
    kinds = {e.device_kind for e in table.environments if any(d.environment == e.digest for d in table.decisions)}
    return not kinds or kind in kinds


def use_runtime(runtime: Runtime, others: Mapping[str, Runtime | TilecastError] | None = None) -> Runtime:
    """Make a runtime the main one in use and return it.

    `others` are the runtimes for other kinds of device, or the error that asking for one raises; what is not
    given is made from the same table when it is asked for.
    """
    global _in_use
    _in_use = _InUse(runtime, others or {})
    return runtime


def forget_table() -> None:
    """Drop the table in use; the next `current()` reads one from the environment variables again."""
    global _in_use
    _in_use = None


def default_registry() -> Registry:
    """Return the process's registry of kernels."""
    # Imported here, so that reading a table does not compile kernels.
    from tilecast.kernels import registry

    return registry


def lookup(layer: ExpertLayer, tokens: int) -> Entry:
    """Return what runs `layer` for `tokens` on the main kind of device. Raises what `Runtime.lookup` raises."""
    return (current() if _in_use is None else _in_use.main).lookup(layer, tokens)


def misses() -> tuple[Miss, ...]:
    """Return the misses of the table in use on all kinds of device, most frequent first."""
    if _in_use is None:
        return ()
    found = [miss for runtime in _in_use.runtimes.values() for miss in runtime.misses()]
    return tuple(sorted(found, key=lambda m: -m.count))

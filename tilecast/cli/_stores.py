"""Where decisions are kept and read from, and what must hold before configs from a file are trusted."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilecast.environment import Environment, kernel_source_digest
from tilecast.errors import CacheError, ConfigError
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertGemm, TileConfig, tokens_text
from tilecast.settings import Settings

if TYPE_CHECKING:
    from tilecast.cache_store.bundle import Bundle


def store_location(option: str | None, settings: Settings) -> str:
    """Return the path or URL of the store to use: the option's, else the one in the cache folder."""
    return option if option is not None else str(settings.cache_dir / "store.db")


def read_table(where: str) -> TuningTable:
    """Read and check an exported file or a store. Raises CacheError."""
    return read_file(where, measurements=False).table


def read_file(where: str, *, measurements: bool = True) -> Bundle:
    """Read and check an exported file or a store, by default with its measurements. Raises CacheError."""
    from tilecast.cache_store.bundle import read_bundle

    if not where.strip():
        raise CacheError("the name of a table or store is empty, expected a path or a SQLAlchemy URL")
    return read_bundle(where, measurements=measurements)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One environment of a table: how many decisions it has, and which fields differ from here."""

    environment: Environment
    decisions: int
    hard: tuple[str, ...]
    soft: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether decisions made there may be used here."""
        return not self.hard

    def __str__(self) -> str:
        """Return one line: the device, the count and whether it fits this machine."""
        environment = self.environment
        name = f"{environment.device} ({environment.digest[:12]})"
        if self.hard:
            return f"{name}: not for this machine: {'; '.join(self.hard)}"
        return f"{name}: fits this machine" + (f", differing only in {'; '.join(self.soft)}" if self.soft else "")


def origins(of: TuningTable, here: Environment) -> tuple[Origin, ...]:
    """Return where a table's decisions were made."""
    found = []
    for environment in of.environments:
        mismatches = here.compare(environment)
        found.append(
            Origin(
                environment=environment,
                decisions=sum(d.environment == environment.digest for d in of.decisions),
                hard=tuple(str(m) for m in mismatches if m.hard),
                soft=tuple(str(m) for m in mismatches if not m.hard),
            )
        )
    return tuple(found)


def check_configs(
    of: TuningTable, here: Environment, source: str, measured: Iterable[tuple[str, TileConfig]] = ()
) -> int:
    """Check every config that the kernels of this Tilecast know about and return how many decided ones were checked.

    What was tuned for a machine like this one must be able to run here. What was tuned on another device, and
    what was only measured, must lie within its kernel's domain; whether that device can run it, only that device
    knows. Left alone are other kernel sources, whose configs follow rules unknown here and are never used here.
    `measured` is what else was measured, by the environment's digest. Raises ConfigError that names the entry.
    """
    environments = {e.digest: e for e in of.environments if _has_our_kernels(e)}
    checked = 0
    _check_domains(of, environments.keys(), source, measured)
    for decision in of.decisions:
        there = environments.get(decision.environment)
        if there is None:
            continue
        for gemm in decision.layer.gemms:
            reason = _impossible(gemm, decision.choice(gemm.name).config, here if here.accepts(there) else None)
            if reason is not None:
                place = f"{decision.layer.label} at {tokens_text(decision.bucket.tokens)}"
                raise ConfigError(
                    f"{source}: the {gemm.name} config for {place} is impossible: {reason}; nothing of "
                    f"the file is used, tune this layer again"
                )
            checked += 1
    return checked


def _has_our_kernels(there: Environment) -> bool:
    # A file may name kinds of device that there are none of.
    return there.device_kind in ("cpu", "cuda") and there.kernel_source == kernel_source_digest(there.device_kind)


def _check_domains(of: TuningTable, known: Set[str], source: str, measured: Iterable[tuple[str, TileConfig]]) -> None:
    """Check what decisions were compared with, and what was measured, each config once. Raises ConfigError."""
    configs: dict[TileConfig, str] = {}
    for decision in of.decisions:
        if decision.environment in known:
            place = f"{decision.layer.label} at {tokens_text(decision.bucket.tokens)}"
            for choice in (decision.up, decision.down):
                configs.setdefault(choice.default, f"a default config for {place}")
                if choice.runner_up is not None:
                    configs.setdefault(choice.runner_up, f"a runner-up for {place}")
    for environment, config in measured:
        if environment in known:
            configs.setdefault(config, "a measured config")
    for config, what in configs.items():
        reason = _outside_domain(config)
        if reason is not None:
            raise ConfigError(f"{source}: {what} is impossible: {reason}; nothing of it is used, do not use this file")


def _impossible(gemm: ExpertGemm, config: TileConfig, here: Environment | None) -> str | None:
    from tilecast.kernels import registry

    return registry.invalid(gemm, config, here) if here is not None else _outside_domain(config)


def _outside_domain(config: TileConfig) -> str | None:
    from tilecast.kernels import registry
    from tilecast.kernels.spec import outside_domain

    try:
        return outside_domain(registry[config.kernel], config)
    except ConfigError as error:
        return str(error)

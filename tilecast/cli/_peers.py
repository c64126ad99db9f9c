"""Imported configs of other engines beside ours: the times they took here, as `tune` and `cache explain` print them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from tilecast.canonical import Json
from tilecast.cli._output import Output, add_row, microseconds, ratio, table
from tilecast.cli._tables import config_text, span
from tilecast.errors import CacheError
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.problem import GemmName, tokens_text
from tilecast.settings import Settings

if TYPE_CHECKING:
    from tilecast.cache_store.interop.peers import Baseline

COLUMNS = ("tokens", "GEMM", "engine", "its config µs", "default µs", "tuned µs", "tuned is faster", "config")


@dataclass(frozen=True, kw_only=True)
class PeerTime:
    """What an engine would run for one GEMM of a decision; `us` is its time in our kernel, None if it did not race."""

    decision: Decision
    baseline: Baseline
    us: float | None

    @property
    def choice(self) -> Choice:
        """Our choice for the same GEMM."""
        return self.decision.choice(self.baseline.gemm)


def peer_times(table: TuningTable, measurements: Sequence[Measurement], folder: Path) -> list[PeerTime]:
    """Return what the engines whose files were imported into `folder` would run for a table's decisions.

    `measurements` are those that the decisions rest on. Raises CacheError for a damaged file.
    """
    from tilecast.autotune.explain import deciding_times
    from tilecast.cache_store.interop.peers import PeerFolder, peer_us

    peers = PeerFolder(folder)
    environments = {e.digest: e for e in table.environments}
    found = []
    for d in table.decisions:
        for gemm in d.layer.gemms:
            baselines = peers.baselines_for(gemm, d.bucket.tokens, environments[d.environment])
            key = d.environment, d.layer.digest, str(gemm.name), d.bucket.tokens, d.routing
            evidence = {key: deciding_times(d, gemm.name, measurements)} if baselines else {}
            found += [PeerTime(decision=d, baseline=b, us=peer_us(b, d, evidence)) for b in baselines]
    return found


def peer_times_or_warning(
    output: Output, table: TuningTable, measurements: Sequence[Measurement], settings: Settings
) -> list[PeerTime]:
    """Return `peer_times` of the user's imported files; none, with a warning, where one of them is damaged."""
    try:
        return peer_times(table, measurements, settings.cache_dir / "peers")
    except CacheError as error:
        output.warn(str(error))
        return []


def peer_table(times: Sequence[PeerTime]) -> list[Table]:
    """Return a table of the configs that raced; none where none did."""
    from tilecast.cache_store.interop.names import ENGINE_TITLES

    result = table("Imported configs beside ours", COLUMNS, left=("GEMM", "engine", "config"))
    for time in times:
        if time.us is not None and time.baseline.config is not None:
            add_row(
                result, span(time.decision), time.baseline.gemm, ENGINE_TITLES[time.baseline.engine],
                microseconds(time.us), microseconds(time.choice.default_us), microseconds(time.choice.p50_us),
                ratio(time.us / time.choice.p50_us), config_text(time.baseline.config, kernel=False),
            )  # fmt: skip
    return [result] if result.row_count else []


def peer_lines(times: Sequence[PeerTime], gemm: GemmName) -> list[str]:
    """Return a line for each engine: what it would run for one GEMM of a decision, and how long that took here."""
    from tilecast.cache_store.interop.names import ENGINE_TITLES

    lines = []
    for time in times:
        baseline = time.baseline
        if baseline.gemm == gemm:
            took = "is no config of ours" if baseline.config is None else "did not race"
            if time.us is not None:
                took = f"{microseconds(time.us)} µs ({time.us / time.choice.p50_us:.3f}× the chosen)"
            config = "" if baseline.config is None else f": {config_text(baseline.config)}"
            row = f"{ENGINE_TITLES[baseline.engine]}'s for {tokens_text(baseline.tokens)} in {baseline.file}"
            lines.append(f"  {row} {took}{config}")
    return lines


def peers_json(times: Sequence[PeerTime]) -> list[Json]:
    """Return what each engine would run, and the times."""
    return [
        {
            "layer_digest": time.decision.layer.digest, "environment": time.decision.environment,
            "routing": time.decision.routing, "policy": time.decision.policy, "tokens": time.decision.bucket.tokens,
            "gemm": time.baseline.gemm, "engine": time.baseline.engine, "file": time.baseline.file,
            "triton": time.baseline.triton, "row_tokens": time.baseline.tokens, "us": time.us,
            "default_us": time.choice.default_us, "tuned_us": time.choice.p50_us,
            "config": None if time.baseline.config is None else time.baseline.config.to_json(),
        }
        for time in times
    ]  # fmt: skip

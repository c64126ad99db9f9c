"""`tilecast doctor`: what this machine is, what it can run, and which table would be used for a model."""

from __future__ import annotations

from typing import Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli import _diagnosis as diagnosis
from tilecast.cli._layers import ShardedModel, sharded
from tilecast.cli._options import (
    DtypeOption,
    EpOption,
    JsonOption,
    OptionalModelArgument,
    PolicyOption,
    TableOption,
    ThreadsOption,
    TokensOption,
    TpOption,
    parse_policy,
    parse_token_option,
    tune_command,
)
from tilecast.cli._output import Output, add_row, plural, table
from tilecast.cli._routing import asked_routing, tuned_routing
from tilecast.cli._run import use_threads
from tilecast.cli._stores import check_configs, origins, read_table
from tilecast.cli._tables import weak
from tilecast.environment import Environment
from tilecast.errors import CoverageError
from tilecast.evidence import TuningTable
from tilecast.settings import DEFAULT_TOKENS, Settings, lock_dir

LAYERS_IN_TITLE = 3
"""Most layers that a title names."""


def doctor(
    model: OptionalModelArgument = None,
    tp: TpOption = 1,
    ep: EpOption = 1,
    tokens: TokensOption = None,
    dtype: DtypeOption = None,
    policy: PolicyOption = None,
    threads: ThreadsOption = None,
    table_file: TableOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure memory and arithmetic peaks, too.")] = False,
    json_: JsonOption = False,
) -> None:
    """Say what this machine is, which kernels it can run, and which table would be used and why.

    With MODEL: for each of its layers and token counts, whether the table covers it, or why not. Exits with 4
    when a table is in use and does not cover everything asked for.

    Examples:

        tilecast doctor

        TM_GEMM_IMPORT=mixtral.db tilecast doctor mixtral-8x7b --tp 8
    """
    from tilecast import environment

    output = Output(json_wanted=json_)
    settings = Settings.from_environment()
    chosen = parse_policy(policy, settings.policy)
    counts = parse_token_option(tokens, DEFAULT_TOKENS)
    split = None if model is None else sharded(model, tp=tp, ep=ep, dtype=dtype)
    use_threads(threads)
    here = environment.here()
    document: dict[str, Json] = {"command": "doctor", "policy": chosen}
    document["machine"] = _machine(output, here, measure)
    document["kernels"] = _kernels(output, here, split)
    source = table_file or settings.import_from
    found = None if source is None else read_table(source)
    if found is not None and source is not None:
        check_configs(found, here, source)
    document["settings"] = _settings(output, settings, chosen)
    document["table"] = _table(output, source, found, here)
    document["routing_drift"] = drift = None if found is None else _drift(found, here, settings)
    if drift is not None:
        output.warn(drift)
    missing = 0
    if split is not None:
        split.explain(output)
        document["model"] = split.to_json()
        routing = "uniform" if found is None else asked_routing(found, chosen, here, settings.routing)
        document["coverage"], missing = _coverage(output, split, found, here, counts, chosen, routing)
    output.emit(document)
    if missing and found is not None and model is not None:
        asked = tuned_routing(settings.routing, routing, settings)
        command = tune_command(model, tp=tp, ep=ep, tokens=tokens, dtype=dtype, policy=policy, routing=asked)
        raise CoverageError(
            f"{source} does not cover {plural(missing, 'point')} of {model}; tune what is missing: {command}"
        )


def _machine(output: Output, here: Environment, measure: bool) -> dict[str, Json]:
    facts = diagnosis.machine_facts(here)
    if measure:
        facts |= diagnosis.peak_facts()
    shown = table("This machine", ("what", "value"), left=("what", "value"))
    for name, value in facts.items():
        add_row(shown, name, "—" if value in (None, "") else str(value))
    output.show(shown)
    if facts["openmp"] is None:
        output.warn("torch's OpenMP runtime was not found, so the kernels run on one thread only")
    return {**facts, "environment": {"digest": here.digest, **here.to_json()}}


def _kernels(output: Output, here: Environment, split: ShardedModel | None) -> list[Json]:
    found = diagnosis.kernel_facts(here, None if split is None else split.layers)
    every = list(dict.fromkeys(fact.layer for fact in found))
    asked = f" for {', '.join(every)}" if len(every) <= LAYERS_IN_TITLE else ""
    shown = table(f"Kernels{asked}", ("kernel", "layers", "run here"), left=("kernel", "layers", "run here"))
    by_kernel: dict[str, dict[str | None, list[str]]] = {}
    for fact in found:
        by_kernel.setdefault(fact.kernel, {}).setdefault(fact.reason, []).append(fact.layer)
    for kernel, by_reason in by_kernel.items():
        for reason, layers in by_reason.items():
            named = "all" if len(layers) == len(every) > 1 else "\n".join(layers)
            add_row(shown, kernel, named, "yes" if reason is None else f"no: {reason}")
    output.show(shown)
    return [fact.to_json() for fact in found]


def _settings(output: Output, settings: Settings, policy: str) -> dict[str, Json]:
    locks = lock_dir()
    facts: dict[str, Json] = {
        "import": settings.import_from,
        "export": settings.export_to,
        "record": settings.record_to,
        "tune": None if settings.tune is None else list(settings.tune.tokens),
        "miss": settings.miss,
        "warn_cache_miss": settings.warn_cache_miss,
        "policy": policy,
        "routing": settings.routing,
        "sandbox": settings.sandbox,
        "cache_dir": str(settings.cache_dir),
        "lock_dir": None if locks is None else str(locks),
    }
    shown = table("Settings", ("variable", "value"), left=("variable", "value"))
    for name, value in facts.items():
        prefix = "TILECAST" if name.endswith("_dir") else "TM_GEMM"
        add_row(shown, f"{prefix}_{name.upper()}", "—" if value is None else str(value))
    output.show(shown)
    return facts


def _table(output: Output, source: str | None, found: TuningTable | None, here: Environment) -> Json:
    if found is None:
        output.show("Table: none (TM_GEMM_IMPORT is not set), so every layer would run the kernels' defaults")
        return None
    output.show(f"Table: {source}, {plural(len(found), 'decision')}, digest {found.digest[:12]}")
    where = origins(found, here)
    for origin in where:
        output.show(f"  {plural(origin.decisions, 'decision')} from {origin}")
    uncertified = weak(d for o in where if o.usable for d in found.decisions if d.environment == o.environment.digest)
    if uncertified:
        kinds = ", ".join(sorted({d.certificate for d in uncertified}))
        output.warn(
            f"{plural(len(uncertified), 'reproducible decision')} rest on a weak certificate ({kinds}): equal bits "
            f"were not checked on this device; tune again here before relying on them"
        )
    return {
        "source": source,
        "digest": found.digest,
        "decisions": len(found),
        "usable": sum(origin.decisions for origin in where if origin.usable),
        "weak_certificates": len(uncertified),
        "environments": [
            {"digest": o.environment.digest, "usable": o.usable, "hard": list(o.hard), "soft": list(o.soft)}
            for o in where
        ],
    }


def _drift(found: TuningTable, here: Environment, settings: Settings) -> str | None:
    from tilecast.autotune.drift import drift_from_file

    usable = {o.environment.digest for o in origins(found, here) if o.usable}
    return drift_from_file([d for d in found.decisions if d.environment in usable], settings.record_to)


def _coverage(
    output: Output,
    split: ShardedModel,
    found: TuningTable | None,
    here: Environment,
    counts: tuple[int, ...],
    policy: str,
    routing: str,
) -> tuple[list[Json], int]:
    points = diagnosis.coverage(split.layers, found, here, counts, policy, routing)
    shown = table("Which decision runs", ("layer", "tokens", "hit", "certificate", "why"), left=("layer", "hit", "why"))
    for point in points:
        hit = "yes" if point.hit else "no"
        add_row(shown, point.layer, str(point.tokens), hit, point.certificate, point.why)
    output.show(shown)
    return [point.to_json() for point in points], sum(not point.hit for point in points)

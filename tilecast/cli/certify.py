"""`tilecast certify`: do the members of every numerics class give the same bits on this device?"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._certificates import (
    against_json,
    certificates_json,
    read_certificates,
    show_against,
    show_certificates,
    updated_table,
)
from tilecast.cli._layers import sharded
from tilecast.cli._options import (
    MODEL_HELP,
    DtypeOption,
    EpOption,
    JsonOption,
    LayerOption,
    ThreadsOption,
    TokensOption,
    TpOption,
    check_writable,
    model_or_layer,
    parse_token_option,
)
from tilecast.cli._output import Output, json_text, plural
from tilecast.cli._run import use_threads
from tilecast.cli._stores import check_configs, read_file
from tilecast.errors import CoverageError, UsageError
from tilecast.problem import ExpertGemm, TileConfig
from tilecast.settings import launcher

if TYPE_CHECKING:
    from tilecast.autotune.certificate import Certificate
    from tilecast.cache_store.bundle import Bundle
    from tilecast.environment import Environment

TOKENS = (1, 16, 64, 256, 1024, 4096)
"""Token counts whose spaces give a model's members."""
ENOUGH_INPUTS, MEMBERS = 1000, 12
MAX_INPUTS, MAX_MEMBERS = 1_000_000, 100_000


@dataclass(frozen=True, kw_only=True)
class Task:
    """One GEMM, the configs whose classes are asked about, and how many members of each class run (None: all)."""

    gemm: ExpertGemm
    configs: tuple[TileConfig, ...]
    members: int | None


def certify(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE_OR_MODEL",
            help=f"An exported table, a store or its URL; or: {MODEL_HELP}",
            show_default=False,
        ),
    ] = None,
    layer: LayerOption = None,
    tp: TpOption = 1,
    ep: EpOption = 1,
    tokens: TokensOption = None,
    dtype: DtypeOption = None,
    inputs: Annotated[
        int, typer.Option("--inputs", min=1, max=MAX_INPUTS, metavar="N", help="Seeded inputs for every member.")
    ] = ENOUGH_INPUTS,
    probe: Annotated[
        bool, typer.Option("--probe", help="Allow fewer than 1000 inputs: a look, and not a certificate.")
    ] = False,
    members: Annotated[
        int | None,
        typer.Option(
            "--members",
            min=1,
            max=MAX_MEMBERS,
            metavar="N",
            show_default=False,
            help="Most members of a class. Default: 12 of a model's, all of a table's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=1 << 31, metavar="N", help="Seed of the inputs.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Write the JSON document into this file, too.", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="FILE", help="Compare with a run that --save wrote earlier.", show_default=False
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Write the outcome into the table's decisions as their certificate.")
    ] = False,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
) -> None:
    """Certify numerics classes on this device: run members of each class and compare bits.

    A table's own configs are run, or members of a model's spaces that differ most. Each input runs alone and in
    batches of two sizes; a negative control shows that other bits would have been seen. Exits with 4 if a class
    does not hold or the control fails, and if bits differ from those of --against.

    Examples:

        tilecast certify mixtral.db --update --save before.json

        tilecast certify mixtral.db --against before.json

        tilecast certify qwen3-30b-a3b --tp 4
    """  # fmt: skip
    from tilecast.cache_store.files import check_writable as check_file
    from tilecast.cache_store.files import write_atomically
    from tilecast.environment import here

    output = Output(json_wanted=json_)
    if launcher() is not None:
        raise UsageError("certify runs in one process, but a launcher started several; start it without torchrun")
    if inputs < ENOUGH_INPUTS and not probe:
        raise UsageError(f"--inputs is {inputs}, a certificate needs {ENOUGH_INPUTS}; --probe allows a look at fewer")
    source = model_or_layer(model, layer)
    is_table = layer is None and _is_table(source)
    _check_update(source, is_table=is_table, update=update, probe=inputs < ENOUGH_INPUTS)
    use_threads(threads)
    environment = here()
    if is_table:
        if (tp, ep, tokens, dtype) != (1, 1, None, None):
            raise UsageError("--tp, --ep, --tokens and --dtype are for a model; a table has its own layers and tokens")
        bundle = read_file(source, measurements=update)
        tasks = _of_table(source, bundle, environment, members)
    else:
        counts = parse_token_option(tokens, TOKENS)
        split = sharded(source, tp=tp, ep=ep, dtype=dtype)
        split.explain(output)
        tasks = [_of_space(gemm, counts, environment, members) for local in split.layers for gemm in local.gemms]
    before = None if against is None else read_certificates(against.expanduser())
    if save is not None:
        check_file(save.expanduser())
    output.note(f"{plural(len(tasks), 'GEMM')}, {plural(inputs, 'input')}, seed {seed}, on {environment.device}")
    found = _certified(output, tasks, environment, inputs=inputs, seed=seed)
    document: dict[str, Json] = {"command": "certify", "source": source, **certificates_json(found)}
    document["against"] = None if before is None else against_json(found, before, environment)
    changed = _updated(source, bundle, found, environment) if update else None
    document["updated"] = changed
    if save is not None:
        write_atomically(save.expanduser(), json_text(document).encode("utf-8"))
    output.emit(document)
    show_certificates(output, found)
    if changed is not None:
        output.show(f"{source}: the certificates of {plural(changed, 'decision')} changed")
    _judge(found)
    if before is not None:
        show_against(output, found, before, environment, str(against))


def _is_table(source: str) -> bool:
    """Whether this names a table or store rather than a model: by a URL, its ending or its first bytes."""
    from tilecast.cache_store.files import SQLITE_MAGIC
    from tilecast.models import preset_names

    if source.lower() in preset_names():
        return False
    if "://" in source or source.endswith(".db"):
        return True
    with suppress(OSError, ValueError), Path(source).expanduser().open("rb") as file:
        return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    return False


def _check_update(source: str, *, is_table: bool, update: bool, probe: bool) -> None:
    if not update:
        return
    if not is_table or "://" in source:
        raise UsageError(f"--update writes into an exported table, which {source!r:.60} does not name")
    if probe:
        raise UsageError(f"--update needs certificates, so at least {ENOUGH_INPUTS} inputs")
    check_writable("--update", Path(source))


def _of_table(source: str, bundle: Bundle, environment: Environment, members: int | None) -> list[Task]:
    """Return what a table's decisions run here: their configs, and the defaults that stand in between buckets."""
    from tilecast.kernels import registry

    table = bundle.table
    check_configs(table, environment, source)
    usable = {there.digest for there in table.environments if environment.accepts(there)}
    configs: dict[ExpertGemm, list[TileConfig]] = {}
    for decision in table.decisions:
        for gemm in decision.layer.gemms if decision.environment in usable else ():
            chosen = decision.choice(gemm.name).config
            default = registry[chosen.kernel].default(gemm, decision.bucket.tokens, environment, like=chosen)
            configs.setdefault(gemm, []).extend((chosen, default))
    if not configs:
        raise CoverageError(
            f"{source} has no decision for this machine, so nothing to certify; see `tilecast cache show`"
        )
    return [Task(gemm=gemm, configs=tuple(dict.fromkeys(own)), members=members) for gemm, own in configs.items()]


def _of_space(gemm: ExpertGemm, counts: tuple[int, ...], environment: Environment, members: int | None) -> Task:
    from tilecast.autotune.certify import claimed_configs
    from tilecast.kernels import registry

    configs = claimed_configs(gemm, counts, environment, registry)
    return Task(gemm=gemm, configs=configs, members=MEMBERS if members is None else members)


def _certified(
    output: Output, tasks: list[Task], environment: Environment, *, inputs: int, seed: int
) -> list[Certificate]:
    from tilecast.autotune import certify as certifier
    from tilecast.kernels import registry

    found: list[Certificate] = []
    with output.progress("certifying") as reporter:
        for task in tasks:
            name = f"{task.gemm.layer.label} {task.gemm.name}"

            def report(share: float, text: str, name: str = name) -> None:
                reporter.update(done=len(found) + share, total=len(tasks), text=f"{name}: {text}", remaining_s=None)

            found.append(
                certifier.certify(
                    task.gemm, task.configs, environment, registry,
                    inputs=inputs, seed=seed, members=task.members, report=report,
                )
            )  # fmt: skip
    return found


def _updated(source: str, bundle: Bundle, found: Iterable[Certificate], environment: Environment) -> int:
    from tilecast.cache_store.bundle import export_table

    table, changed = updated_table(bundle.table, found, environment)
    if changed:
        export_table(table, source, bundle.measurements)
    return changed


def _judge(found: Iterable[Certificate]) -> None:
    """Raise CoverageError for the first class that does not hold, or where there was nothing to hold."""
    results = [(certificate.gemm, result) for certificate in found for result in certificate.classes]
    if not results:
        raise CoverageError("no config claims to be free of the batch, so there is no class to certify")
    failed = [(gemm, result) for gemm, result in results if result.verdict != "equal"]
    for gemm, result in failed[:1]:
        more = f" ({plural(len(failed) - 1, 'more class', 'more classes')} failed)" if len(failed) > 1 else ""
        raise CoverageError(
            f"class {result.numerics[:12]} of {gemm.layer.label} {gemm.name} is not certified: {result.reason}{more}; "
            f"do not rely on its bits on this device"
        )

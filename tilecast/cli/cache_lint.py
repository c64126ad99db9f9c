"""`tilecast cache lint`: what is wrong in a folder of vLLM's or SGLang's tuning files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilecast.cli._exit import ExitCode
from tilecast.cli._options import JsonOption
from tilecast.cli._output import Output, plural
from tilecast.errors import UsageError


def lint(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of tuning files; those below it count.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="FORMAT", help="vllm or sglang. Default: told by each file.", show_default=False
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Find entries that no engine reaches, that say other than is meant, twice, or what cannot run.

    Exits with 1 when something is found.

    Example:

        tilecast cache lint ~/tuned/vllm
    """
    from tilecast.cache_store.interop.lint import KINDS, lint_folder
    from tilecast.cache_store.interop.names import ENGINES
    from tilecast.kernels.gpu.target import TARGETS

    if format_ is not None and format_ not in ENGINES:
        raise UsageError(f"--format is {format_!r:.40}, expected one of {', '.join(ENGINES)}")
    output = Output(json_wanted=json_)
    limits = {target.environment_arch: target.shared_bytes for target in TARGETS}
    linted = lint_folder(folder.expanduser(), limits, format_)
    counts = {kind: sum(finding.kind == kind for finding in linted.findings) for kind in KINDS}
    output.emit(
        {
            "command": "cache lint",
            "folder": str(folder),
            "files": linted.files,
            "rows": linted.rows,
            "counts": counts,
            "findings": [
                {"file": f.file, "entry": f.entry, "kind": f.kind, "message": f.message} for f in linted.findings
            ],
        }
    )
    for finding in linted.findings:
        output.show(str(finding))
    looked = f"{plural(linted.files, 'file')}, {plural(linted.rows, 'row')}"
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    output.show(f"{looked}: {found or 'nothing wrong'}")
    if linted.findings:
        raise typer.Exit(ExitCode.UNEXPECTED)

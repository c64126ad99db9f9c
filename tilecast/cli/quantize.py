"""`tilecast quantize`: write a checkpoint again with its experts in four or eight bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilecast.cli._options import JsonOption, ThreadsOption
from tilecast.cli._output import Output, percent, plural
from tilecast.cli._run import use_threads
from tilecast.errors import InputError, UsageError
from tilecast.problem import GROUPS

FORMATS = ("awq", "fp8")
MAX_TEXT_BYTES = 64 << 20


def quantize(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Checkpoint folder: config.json, *.safetensors.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, a new one.", show_default=False)],
    format_: Annotated[
        str, typer.Option("--format", metavar="awq|fp8", help="awq: 4 bits. fp8: e4m3 in blocks of 128 by 128.")
    ] = "awq",
    group: Annotated[
        int | None,
        typer.Option("--group", metavar="N", help="awq: inputs that share a scale; default 128.", show_default=False),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="FILE", help="awq: a text to search for scales with.", show_default=False
        ),
    ] = None,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a checkpoint again with its experts quantised: AWQ's four bits, or fp8.

    Only experts are quantised; the rest is copied. With --calibration, awq weighs rounding errors by what the experts
    are given when the model reads the text, as AWQ does; without it, weights are rounded to nearest.

    Examples:

        tilecast quantize ./mixtral ./mixtral-awq --format awq --calibration wiki.txt

        tilecast quantize ./qwen3 ./qwen3-fp8 --format fp8
    """
    output = Output(json_wanted=json_)
    if format_ not in FORMATS:
        raise UsageError(f"--format is {format_!r:.20}, expected one of {', '.join(FORMATS)}")
    if group is not None and (format_ != "awq" or group not in GROUPS):
        raise UsageError(f"--group is {group} with {format_}, expected one of {', '.join(map(str, GROUPS))} with awq")
    if calibration is not None and format_ != "awq":
        raise UsageError("--calibration goes with --format awq: fp8 rounds in proportion, so scales gain nothing")
    text = None if calibration is None else _text(calibration)
    use_threads(threads)

    from tilecast.engine.quantize import quantize_checkpoint

    with output.progress("quantizing") as reporter:
        found = quantize_checkpoint(
            folder, out, form=format_, group=group or 128, calibration=text,
            progress=lambda done, what: reporter.update(done=done, total=1.0, text=what, remaining_s=None),
        )  # fmt: skip
    output.emit(found.document())
    share = percent(found.bytes_after / found.bytes_before)
    output.show(
        f"{found.folder}: {plural(found.projections, 'expert weight')} as {found.format}, "
        f"{found.bytes_after / 2**20:,.1f} MiB, {share} of what they were",
    )
    if text is not None:
        which = (
            f"in {plural(found.scaled_layers, 'layer')}" if found.scaled_layers else "in no layer, so rounded plainly"
        )
        output.show(f"inputs of gate and up scaled {which}")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InputError(f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB; a few hundred kilobytes are enough")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error.reason}") from error

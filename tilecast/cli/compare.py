"""`tilecast compare`: why do a model's outputs differ, and at which layer and operation first?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._exit import end_process
from tilecast.cli._options import (
    EpOption,
    JsonOption,
    SeedOption,
    TableOption,
    ThreadsOption,
    TpOption,
    parse_policy,
    parse_token_option,
)
from tilecast.cli._output import Output
from tilecast.cli._placement import GpuExpertsOption, parse_gpu_experts
from tilecast.cli._run import launched_rank, use_threads
from tilecast.errors import CoverageError, InputError, UsageError

if TYPE_CHECKING:
    from tilecast.engine.compare_capture import Prompts

MAX_PROMPTS = 256
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def compare(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint folder: config.json and safetensors.", show_default=False)
    ],
    experts: Annotated[
        str, typer.Option("--experts", metavar="NAME", help="What runs the experts: tilecast, grouped_mm, eager …")
    ] = "tilecast",
    against: Annotated[
        str, typer.Option("--against", metavar="NAME", help="What runs the reference's experts; none: no reference.")
    ] = "eager",
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="NAME,…",
            help="Checks to run: batch, order, padding, decode, chunked, buckets, restart, policy, ranks; or none. "
            "Default: all that can run here.",
            show_default=False,
        ),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect",
            metavar="NAME,…",
            help="What must hold: close, equal, routing, tokens, invariant, the name of a check, or nothing. "
            "Default: close, where there is a reference.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A prompt; may be given several times.", show_default=False),
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            "--ids", metavar="1,2,3", help="A prompt as token ids; may be given several times.", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="A file with a prompt a line.", show_default=False),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            metavar="SEQ",
            help="Token counts for the check buckets. Default: 1,2,4 … 64.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="fp32, bf16 or fp16 instead of the model's.", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="cpu, or cuda. Default: a GPU.", show_default=False)
    ] = None,
    tp: TpOption = 1,
    ep: EpOption = 1,
    policy: Annotated[
        str | None,
        typer.Option("--policy", metavar="POLICY", help="reproducible or fastest.", show_default=False),
    ] = None,
    table: TableOption = None,
    gpu_experts: GpuExpertsOption = None,
    reproducible: Annotated[
        bool, typer.Option("--reproducible", help="Run the model with operations that do not depend on the batch.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="FILE", help="Write a heat map of layers and operations, an SVG.", show_default=False
        ),
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
) -> None:
    """Find out why a model's outputs differ: from transformers' own, or from run to run.

    Every operation of every layer runs on the reference's input, and is judged by the reference's own error; then
    the model runs its prompts alone, in batches, padded, in pieces, restarted, on ranks, and every bit is compared.
    It names the first layer and operation that differ, and those that cause it. Exits with 4 if what is expected
    does not hold.

    Examples:

        tilecast compare ./mixtral

        tilecast compare ./mixtral --against none --reproducible --expect invariant

        tilecast compare ./mixtral --experts grouped_mm --dtype bf16 --picture why.svg
    """  # fmt: skip
    from tilecast.cache_store.files import check_writable, write_atomically
    from tilecast.cli._compare_picture import picture as draw
    from tilecast.cli._compared import show_comparison
    from tilecast.engine.compare import Request, check_expected, unmet
    from tilecast.engine.compare import compare as run_comparison
    from tilecast.engine.compare_invariance import EDGES

    output = Output(json_wanted=json_, rank=launched_rank())
    given, texts = _prompts(ids or [], prompt or [], prompts)
    parse_gpu_experts(gpu_experts, tp=tp, ep=ep, experts=experts)  # Usage errors come before anything is loaded.
    request = Request(
        folder=folder, experts=experts, against=None if against == "none" else against, dtype=_dtype(dtype),
        device=device, tp=tp, ep=ep, policy=_policy(policy), table=table,
        gpu_experts=gpu_experts, prompts=given, texts=texts,
        reproducible=reproducible, seed=seed, checks=_checks(check), edges=parse_token_option(tokens, EDGES),
    )  # fmt: skip
    default = () if request.against is None else ("close",)
    expected = default if expect is None else _names("--expect", expect, "nothing")
    check_expected(request, expected)
    if picture is not None:
        check_writable(picture.expanduser())
    use_threads(threads)
    with output.progress("comparing") as reporter:
        done = [0]

        def report(text: str) -> None:
            reporter.update(done=done[0], total=3 + len(request.checks), text=text, remaining_s=None)
            done[0] += 1

        found = run_comparison(request, report, end_process)
    failed = unmet(found, expected)
    if picture is not None and not output.quiet:
        write_atomically(picture.expanduser(), draw(found).encode("utf-8"))
    document: dict[str, Json] = {
        "command": "compare", "model": folder, **found.to_json(), "expected": list(expected), "unmet": failed,
    }  # fmt: skip
    output.emit(document)
    show_comparison(output, found)
    if failed is not None:
        raise CoverageError(f"not as expected: {failed}")


def _prompts(ids: list[str], texts: list[str], file: Path | None) -> tuple[Prompts | None, tuple[str, ...]]:
    """Return the prompts given as ids, and those given as text. Raises UsageError and InputError."""
    from tilecast.engine.compare_capture import Prompts

    if file is not None:
        try:
            texts = [*texts, *(line for line in file.expanduser().read_text("utf-8").splitlines() if line.strip())]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts: {file} cannot be read: {error}") from error
        if not texts:
            raise InputError(f"--prompts: {file} holds no prompt")
    if len(ids) + len(texts) > MAX_PROMPTS:
        raise UsageError(f"{len(ids) + len(texts)} prompts are given, expected at most {MAX_PROMPTS}")
    known = []
    for text in ids:
        try:
            known.append(tuple(int(part) for part in text.split(",")))
        except ValueError:
            raise UsageError(f"--ids is {text!r:.40}, expected token ids such as 1,2,3") from None
    return (Prompts(tuple(known)) if known else None), tuple(texts)


def _dtype(text: str | None) -> str | None:
    if text is None:
        return None
    name = DTYPES.get(text.lower(), text.lower())
    if name not in DTYPES.values():
        raise UsageError(f"--dtype is {text!r:.40}, expected one of {', '.join(DTYPES)}")
    return name


def _policy(text: str | None) -> str | None:
    return None if text is None else parse_policy(text, "")


def _checks(text: str | None) -> tuple[str, ...]:
    """Return the checks that were asked for; by default all that can run here."""
    from tilecast.engine.compare_invariance import CHECKS
    from tilecast.settings import launcher

    if text is not None:
        return _names("--check", text, "none")
    return tuple(name for name in CHECKS if name != ("ranks" if launcher() is None else "restart"))


def _names(option: str, text: str, nothing: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError(f"{option} is {text!r:.40}, expected names with commas between them, or {nothing}")
    return () if names == (nothing,) else names

"""`tilecast generate`: continue prompts with a checkpoint, its experts on the tuned kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._exit import end_process
from tilecast.cli._options import DtypeOption, JsonOption, PolicyOption, ThreadsOption, parse_dtypes, parse_policy
from tilecast.cli._output import Output
from tilecast.cli._placement import ExpertCountsOption, GpuExpertsOption, parse_gpu_experts, placement_json
from tilecast.cli._run import launched_rank, logged, use_threads
from tilecast.errors import InputError, UsageError

if TYPE_CHECKING:
    from tilecast.engine.generate import Generation, Sampling, TextStream
    from tilecast.engine.load import Loaded

MAX_PROMPT_BYTES = 64 << 20
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Checkpoint folder: config.json, *.safetensors.", show_default=False)
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="A file with a prompt on each line.", show_default=False),
    ] = None,
    ids: Annotated[
        str | None, typer.Option("--ids", metavar="1,2,3", help="The prompt as token ids.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Most tokens to generate for each prompt.")
    ] = 128,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the most likely token; so it is unless sampling is asked for.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="X", help="Sample at this temperature.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", help="Sample from the likeliest tokens that reach P.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Sample from the K likeliest.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of sampling; default 0.", show_default=False)
    ] = None,
    dtype: DtypeOption = None,
    tp: Annotated[int, typer.Option("--tp", min=1, metavar="N", help="Ranks that split every expert's I.")] = 1,
    ep: Annotated[int, typer.Option("--ep", min=1, metavar="N", help="Ranks that keep whole experts each.")] = 1,
    reproducible: Annotated[
        bool,
        typer.Option("--reproducible", help="The same bits whatever else is in the batch; slower outside the experts."),
    ] = False,
    policy: PolicyOption = None,
    table: Annotated[
        str | None,
        typer.Option("--import", metavar="TABLE", help="Table to use instead of TM_GEMM_IMPORT's.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=4096, metavar="N", help="Prompts run together.")] = 8,
    experts: Annotated[
        str, typer.Option("--experts", metavar="NAME", help="Experts implementation: tilecast or transformers' own.")
    ] = "tilecast",
    gpu_experts: GpuExpertsOption = None,
    expert_counts: ExpertCountsOption = None,
    experts_only: Annotated[
        bool, typer.Option("--experts-only", help="Leave linears, norms and attention around the experts to torch.")
    ] = False,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
) -> None:
    """Generate text with a checkpoint of a Mixture-of-Experts model.

    Prompts come from --prompt, --prompts, --ids or, a line each, from standard input. The text of a single prompt
    appears as it is generated. A checkpoint without a tokenizer takes and gives token ids.

    Examples:

        tilecast generate ./mixtral --prompt "Once upon a time" --import mixtral.db

        tilecast generate ./mixtral --prompts questions.txt --batch 16 --json

        tilecast generate ./mixtral --gpu-experts 2 --expert-counts seen.json --prompt "Once upon a time"

        torchrun --nproc-per-node 2 -m tilecast generate ./mixtral --tp 2 --prompt "Once upon a time"
    """
    rank = launched_rank()
    output = Output(json_wanted=json_, rank=rank)
    sampling = _sampling(greedy, temperature, top_k, top_p, seed)
    chosen_policy = None if policy is None else parse_policy(policy, policy)
    if reproducible and chosen_policy == "fastest":
        raise UsageError("--reproducible and --policy fastest contradict each other; leave out one")
    chosen_dtype = None if dtype is None else _dtype(dtype)
    placement = parse_gpu_experts(gpu_experts, expert_counts, tp=tp, ep=ep, experts=experts)
    sources = {"--prompt": prompt, "--prompts": prompts, "--ids": ids}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are given, expected one of them")
    if not given and rank == 0 and sys.stdin.isatty():
        raise UsageError("no prompt; give --prompt, --prompts or --ids, or send lines to standard input")
    use_threads(threads)

    from tilecast.engine.agreement import process_group
    from tilecast.engine.checkpoint import inspect_checkpoint
    from tilecast.engine.generate import parse_ids
    from tilecast.engine.load import leave, load_model

    group = process_group()
    with group.guard():
        if rank == 0:
            # Before prompts are waited for; `load_model` has all ranks look at theirs.
            inspect_checkpoint(folder)
            parse_ids(ids or "")
        lines = _lines(prompt, prompts, ids) if rank == 0 else []
    with logged(output):
        loaded = load_model(
            folder, dtype=chosen_dtype, tp=tp, ep=ep, policy="reproducible" if reproducible else chosen_policy,
            table=table, group=group, experts=experts, gpu_experts=placement,
            experts_only=experts_only, on_stuck=end_process,
        )  # fmt: skip
        encoded = _shared(loaded, lines, as_ids=ids is not None)
        _run(loaded, lines, encoded, output, max_new_tokens=max_new_tokens, sampling=sampling, batch=batch,
             reproducible=reproducible)  # fmt: skip
        leave(loaded)


def _sampling(
    greedy: bool, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> Sampling:
    from tilecast.engine.generate import Sampling

    given = {"--temperature": temperature, "--top-p": top_p, "--top-k": top_k, "--seed": seed}
    asked = [name for name, value in given.items() if value is not None]
    if greedy and asked:
        raise UsageError(f"--greedy and {asked[0]} contradict each other; leave out one")
    warmth = temperature if temperature is not None else (1.0 if asked else 0.0)
    return Sampling(temperature=warmth, top_k=top_k or 0, top_p=1.0 if top_p is None else top_p, seed=seed or 0)


def _dtype(text: str) -> str:
    (name, *others) = parse_dtypes(text)
    if others or name not in DTYPES:
        raise UsageError(f"--dtype is {text!r:.40}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _lines(prompt: str | None, prompts: Path | None, ids: str | None) -> list[str]:
    """Return the prompts' texts; blank lines of files and of standard input are left out. Raises InputError."""
    if prompt is not None or ids is not None:
        return [prompt if prompt is not None else ids or ""]
    try:
        if prompts is None:
            data, where = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), "standard input"
        else:
            where = str(prompts)
            with prompts.open("rb") as file:
                data = file.read(MAX_PROMPT_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{prompts or 'standard input'} cannot be read: {error}") from error
    if len(data) > MAX_PROMPT_BYTES:
        raise InputError(f"{where} is larger than {MAX_PROMPT_BYTES >> 20} MiB")
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError(f"{where} holds no prompt, expected one on each line")
    return found


def _shared(loaded: Loaded, lines: list[str], *, as_ids: bool) -> list[list[int]]:
    """Return the prompts as rank 0 encodes them, on every rank: only it reads standard input."""
    from tilecast.engine.generate import encode, parse_ids

    with loaded.group.guard():
        encoded = [parse_ids(line) if as_ids else encode(loaded, line) for line in lines]
        sent = json.dumps(encoded).encode("ascii") if loaded.group.rank == 0 else None
        return [[int(token) for token in row] for row in json.loads(loaded.group.broadcast("prompts", sent))]


def _run(
    loaded: Loaded, lines: list[str], encoded: list[list[int]], output: Output, *, max_new_tokens: int,
    sampling: Sampling, batch: int, reproducible: bool,
) -> None:  # fmt: skip
    from tilecast.engine.generate import TextStream, decode, summary
    from tilecast.engine.generate import generate as run

    stream = TextStream(loaded.tokenizer)
    streaming = len(encoded) == 1 and not output.json_wanted and not output.quiet
    with loaded.group.guard():
        done = run(
            loaded, encoded, max_new_tokens=max_new_tokens, sampling=sampling, batch=batch, reproducible=reproducible,
            digests=reproducible and output.json_wanted,
            on_token=_writer(stream) if streaming else None, on_stuck=end_process,
        )  # fmt: skip
    if streaming:
        sys.stdout.write(f"{stream.end()}\n")
        sys.stdout.flush()
    else:
        for place, one in enumerate(done.outputs):
            output.line(f"[{place + 1}] {decode(loaded, one.ids)}")
    output.note(summary(done))
    if done.uncovered:
        output.warn(f"bits may depend on the batch, as {', '.join(done.uncovered)} ran as torch has it")
    output.emit(_json(loaded, lines, done))


def _writer(stream: TextStream) -> Callable[[int, int], None]:
    def write(_: int, token: int) -> None:
        sys.stdout.write(stream.push(token))
        sys.stdout.flush()

    return write


def _json(loaded: Loaded, lines: list[str], done: Generation) -> Json:
    from tilecast.engine.generate import decode

    outputs: list[Json] = []
    for line, one in zip(lines, done.outputs, strict=False):
        entry: dict[str, Json] = {
            "prompt": line, "prompt_ids": list(one.prompt), "ids": list(one.ids), "text": decode(loaded, one.ids),
            "stopped": one.stopped,
        }  # fmt: skip
        outputs.append(entry if one.logits_digest is None else {**entry, "logits_sha256": one.logits_digest})
    return {
        "experts": loaded.experts, "dtype": str(loaded.dtype).removeprefix("torch."), "tp": loaded.tp, "ep": loaded.ep,
        "placement": placement_json(loaded.model),
        "outputs": outputs, "prefill_tokens": done.prefill_tokens, "prefill_s": done.prefill_s,
        "prefill_tokens_per_s": done.prefill_per_s, "decode_tokens": done.decode_tokens, "decode_s": done.decode_s,
        "decode_tokens_per_s": done.decode_per_s,
        "uncovered": None if done.uncovered is None else list(done.uncovered),
    }  # fmt: skip

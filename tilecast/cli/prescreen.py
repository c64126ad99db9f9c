"""`tilecast prescreen`: compile a model's GPU configs without the GPU, and say which of them could run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilecast.canonical import Json
from tilecast.cli._exit import resumable
from tilecast.cli._layers import ShardedModel, sharded
from tilecast.cli._options import (
    DtypeOption,
    EpOption,
    JsonOption,
    LayerOption,
    OptionalModelArgument,
    TokensOption,
    TpOption,
    model_or_layer,
    parse_token_option,
)
from tilecast.cli._output import Output, add_row, duration, plural, table
from tilecast.cli._tables import config_text
from tilecast.errors import ConfigError, DeviceError
from tilecast.problem import ExpertGemm, TileConfig, tokens_text
from tilecast.settings import Settings

if TYPE_CHECKING:
    from tilecast.kernels.gpu.build import Build
    from tilecast.kernels.gpu.target import Target
    from tilecast.kernels.static import Report

TOKENS = (1, 16, 256, 4096)
CACHE_FOLDER = "static"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A config that a kernel proposes for a GEMM at some token count.

    reason is why it is turned away before anything is compiled, empty otherwise; builds what it compiles.
    """

    gemm: ExpertGemm
    tokens: int
    config: TileConfig
    reason: str = ""
    builds: tuple[Build, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A kernel that cannot run a GEMM at all, and why."""

    gemm: ExpertGemm
    kernel: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A proposal, the reports of its builds, why it cannot run (empty if it can), and whose code it shares."""

    proposal: Proposal
    reports: tuple[Report, ...]
    reason: str
    same_as: TileConfig | None = None


def prescreen(
    model: OptionalModelArgument = None,
    layer: LayerOption = None,
    tp: TpOption = 1,
    ep: EpOption = 1,
    target: Annotated[
        str, typer.Option("--target", metavar="TARGET", help="GPU to compile for: cuda:90, hip:gfx942 …")
    ] = "cuda:90",
    tokens: TokensOption = None,
    dtype: DtypeOption = None,
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", metavar="NAME", help="Only this kernel's configs.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            metavar="N",
            help="At most N configs per kernel, GEMM and token count.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, max=1024, metavar="N", help="Processes. Default: cores.", show_default=False),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Compile every GPU config of a model's layers and refuse those that cannot run, without a GPU.

    Reports are kept in the cache folder: the same command goes on where it stopped, and the second time only
    reads. Exits with 6 if no config is valid.

    Examples:

        tilecast prescreen mixtral-8x7b --tp 8 --target cuda:90

        tilecast prescreen qwen3-30b-a3b --target hip:gfx942 --tokens 1,256 --limit 20
    """  # fmt: skip
    from tilecast.kernels.gpu.target import parse_target
    from tilecast.kernels.static import analyse

    output = Output(json_wanted=json_)
    settings = Settings.from_environment()
    counts = parse_token_option(tokens, TOKENS)
    chosen = parse_target(target)
    split = sharded(model_or_layer(model, layer), tp=tp, ep=ep, dtype=dtype)
    split.explain(output)
    proposals, refusals = _propose(split, counts, chosen, kernel=kernel, limit=limit)
    builds = tuple(dict.fromkeys(build for proposal in proposals for build in proposal.builds))
    output.note(f"{plural(len(proposals), 'config')}, {plural(len(builds), 'different kernel')} for {chosen.name}")
    start = time.perf_counter()
    with resumable("reports made"), output.progress("compiling") as reporter:

        def advance(done: int, total: int) -> None:
            spent = time.perf_counter() - start
            remaining = spent / done * (total - done) if done else None
            reporter.update(done=done, total=total, text=f"{done} of {total} kernels", remaining_s=remaining)

        found = analyse(builds, chosen, workers=workers, cache=_cache(settings), progress=advance)
    seconds = time.perf_counter() - start
    judged = _judge(proposals, dict(zip(builds, found, strict=True)), chosen)
    _report(output, split, chosen, judged, refusals, kernels=len(builds), seconds=seconds)
    if not any(not each.reason for each in judged):
        raise DeviceError(_nothing(judged, refusals, chosen))


def _cache(settings: Settings) -> Path:
    return settings.cache_dir / CACHE_FOLDER


def _kernels(name: str | None) -> list[Any]:
    """Return the kernels that can be compiled without a device. Raises ConfigError for an unknown name."""
    from tilecast.kernels import registry

    every = [kernel for kernel in registry if kernel.device_kind == "cuda" and hasattr(kernel, "builds")]
    if name is None:
        return every
    chosen = [kernel for kernel in every if kernel.name == name]
    if not chosen:
        known = ", ".join(kernel.name for kernel in every) or "none"
        raise ConfigError(f"--kernel is {name!r:.80}, expected one that compiles for GPUs: {known}")
    return chosen


def _propose(
    split: ShardedModel, counts: tuple[int, ...], target: Target, *, kernel: str | None, limit: int | None
) -> tuple[list[Proposal], list[Refusal]]:
    from tilecast.kernels import registry

    environment = target.environment()
    proposals: list[Proposal] = []
    refusals: list[Refusal] = []
    for gemm in (gemm for layer in split.layers for gemm in layer.gemms):
        for each in _kernels(kernel):
            reason = each.rejects(gemm, environment)
            if reason is not None:
                refusals.append(Refusal(gemm=gemm, kernel=each.name, reason=reason))
                continue
            for tokens in counts:
                # As the tuner does: the default always races. It may be another kernel's, which brings it itself.
                found = [each.default(gemm, tokens, environment), *each.space(gemm, tokens, environment)]
                own = dict.fromkeys(config for config in found if config.kernel == each.name)
                for config in list(own)[:limit]:
                    reason = registry.invalid(gemm, config, environment)
                    builds = () if reason else each.builds(gemm, config, target, layout=each.layout(gemm, config))
                    proposals.append(
                        Proposal(gemm=gemm, tokens=tokens, config=config, reason=reason or "", builds=builds)
                    )
    return proposals, refusals


def _judge(proposals: list[Proposal], reports: dict[Build, Report], target: Target) -> list[Judged]:
    from tilecast.kernels.static import duplicates

    groups = duplicates(reports.values())
    # Equal code under different builds counts as one build, the first of its group.
    order = list(reports)
    first = {order[index]: order[group[0]] for group in groups for index in group}
    seen: dict[object, TileConfig] = {}
    judged = []
    for proposal in proposals:
        mine = tuple(reports[build] for build in proposal.builds)
        reason = proposal.reason or _reason(proposal, mine, target)
        same_as = None
        if not reason:
            code = tuple(first.get(build, build) for build in proposal.builds)
            earlier = seen.setdefault((proposal.gemm, proposal.tokens, code), proposal.config)
            same_as = None if earlier == proposal.config else earlier
        judged.append(Judged(proposal=proposal, reports=mine, reason=reason, same_as=same_as))
    return judged


def _reason(proposal: Proposal, reports: tuple[Report, ...], target: Target) -> str:
    from tilecast.kernels.static import verdict

    # A launch may be several kernels, and a combine has no products: one with tensor-core instructions will do.
    products = any(report.instructions for report in reports)
    needed = proposal.gemm.layer.dtype != "fp32" and not products
    return next((why for each in reports if (why := verdict(each, target, tensor_cores=needed))), "")


def _nothing(judged: list[Judged], refusals: list[Refusal], target: Target) -> str:
    reasons = [each.reason for each in judged] + [f"{refusal.kernel}: {refusal.reason}" for refusal in refusals]
    often = f"; most often: {Counter(reasons).most_common(1)[0][0]}" if reasons else ": no kernel compiles for GPUs"
    return f"no config is valid for {target.name}{often}"


def _report(
    output: Output,
    split: ShardedModel,
    target: Target,
    judged: list[Judged],
    refusals: list[Refusal],
    *,
    kernels: int,
    seconds: float,
) -> None:
    valid = [each for each in judged if not each.reason]
    same = sum(each.same_as is not None for each in valid)
    document: dict[str, Json] = {
        "command": "prescreen",
        "model": split.to_json(),
        "target": target.name,
        "refused_kernels": [
            {"layer": r.gemm.layer.digest, "gemm": r.gemm.name, "kernel": r.kernel, "reason": r.reason}
            for r in refusals
        ],
        "configs": [_judged_json(each) for each in judged],
        "summary": {
            "configs": len(judged), "valid": len(valid), "duplicates": same, "kernels": kernels, "seconds": seconds,
        },
    }  # fmt: skip
    output.emit(document)
    for refusal in refusals:
        output.show(f"{refusal.gemm.layer.label} {refusal.gemm.name}: not {refusal.kernel}: {refusal.reason}")
    for title, rows in _tables(judged):
        shown = table(
            title, ("config", "verdict", "shared KiB", "regs", "spill B", "MMA", "code KiB"),
            left=("config", "verdict", "MMA"),
        )  # fmt: skip
        for each in rows:
            add_row(shown, *_cells(each), style="dim" if each.reason else None)
        output.show(shown)
    output.show(
        f"{target.name}: {len(valid)} of {plural(len(judged), 'config')} valid, {same} of them with the same code as "
        f"another; {plural(kernels, 'kernel')} in {duration(seconds)}"
    )


def _tables(judged: list[Judged]) -> Iterator[tuple[str, list[Judged]]]:
    groups: dict[tuple[ExpertGemm, int], list[Judged]] = {}
    for each in judged:
        groups.setdefault((each.proposal.gemm, each.proposal.tokens), []).append(each)
    for (gemm, tokens), rows in groups.items():
        yield f"{gemm.layer.label} {gemm.name}, {tokens_text(tokens)}", rows


def _cells(each: Judged) -> tuple[str, ...]:
    verdict = each.reason or ("valid" if each.same_as is None else f"valid, same code as {config_text(each.same_as)}")
    known = [report for report in each.reports if not report.error]
    if not known:
        return config_text(each.proposal.config), verdict, "—", "—", "—", "—", "—"
    mma = dict.fromkeys(" ".join(name.split(" ")[:2]) for report in known for name in report.instructions)
    return (
        config_text(each.proposal.config),
        verdict,
        f"{max(report.shared_bytes for report in known) / 1024:.0f}",
        str(max(report.registers for report in known)),
        str(max(max(report.stack_bytes, report.spill_bytes) for report in known)),
        ", ".join(mma) or "—",
        f"{sum(report.code_bytes for report in known) / 1024:.1f}",
    )


def _judged_json(each: Judged) -> Json:
    proposal = each.proposal
    return {
        "layer": proposal.gemm.layer.digest,
        "gemm": proposal.gemm.name,
        "tokens": proposal.tokens,
        "config": proposal.config.to_json(),
        "valid": not each.reason,
        "reason": each.reason or None,
        "same_code_as": None if each.same_as is None else each.same_as.to_json(),
        "kernels": [
            {"module": build.module, "function": build.function, **report.to_json()}
            for build, report in zip(proposal.builds, each.reports, strict=True)
        ]
        if each.reports
        else [],
    }

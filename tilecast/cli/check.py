"""`tilecast check`: do all ranks run the same table, and return the same bits?"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tilecast.canonical import Json
from tilecast.cli._layers import ShardedModel, sharded
from tilecast.cli._options import (
    DtypeOption,
    JsonOption,
    LayerOption,
    OptionalModelArgument,
    PolicyOption,
    TableOption,
    ThreadsOption,
    TokensOption,
    TpOption,
    model_or_layer,
    parse_policy,
    parse_token_option,
)
from tilecast.cli._output import Output, Reporter, add_row, plural, table
from tilecast.cli._run import launched_rank, logged, use_threads
from tilecast.errors import AgreementError, CoverageError
from tilecast.problem import ExpertLayer, tokens_text
from tilecast.settings import Settings

if TYPE_CHECKING:
    import torch

    from tilecast.engine.group import Group
    from tilecast.engine.table_runtime import Runtime

TOKENS = (1, 4, 16, 64, 256)
ALONE = 4
"""How many tokens of a batch are run again alone."""


@dataclass(frozen=True, kw_only=True)
class Bits:
    """What one layer returned at one token count: the SHA-256 of the output's bytes, on every rank.

    `decided` says whether a decision of the table ran, `same_alone` whether some tokens of the batch had the
    same bits when they were run alone.
    """

    layer: str
    tokens: int
    decided: bool
    sha256: tuple[str, ...]
    same_alone: bool

    @property
    def same_on_all_ranks(self) -> bool:
        """Whether all ranks returned the same bits."""
        return len(set(self.sha256)) == 1


def check(
    model: OptionalModelArgument = None,
    layer: LayerOption = None,
    tp: TpOption = 1,
    tokens: TokensOption = None,
    dtype: DtypeOption = None,
    policy: PolicyOption = None,
    table_file: TableOption = None,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
) -> None:
    """Run a layer on every rank and compare tables and output bits.

    Under torchrun, when --tp equals the number of ranks the layer is split over them; otherwise every rank
    runs the same layer, the first of --tp shards. Exits with 5 if ranks differ, and with 4 if under
    `reproducible` a token alone gives other bits than in a batch.

    Examples:

        TM_GEMM_IMPORT=mixtral.db tilecast check mixtral-8x7b --tp 8

        torchrun --nproc-per-node 2 -m tilecast check mixtral-8x7b --tp 2
    """
    from tilecast.engine.agreement import process_group, startup

    output = Output(json_wanted=json_, rank=launched_rank())
    found = Settings.from_environment()
    # What is checked is the table as it is: nothing is tuned or written on the way.
    settings = replace(
        found,
        import_from=table_file or found.import_from,
        policy=parse_policy(policy, found.policy),
        export_to=None,
        tune=None,
        miss="default" if found.miss == "tune" else found.miss,
    )
    counts = parse_token_option(tokens, TOKENS)
    split = sharded(model_or_layer(model, layer), tp=tp, dtype=dtype)
    use_threads(threads)
    group = process_group()
    parallel = tp > 1 and group.world_size == tp
    rank = group.rank if parallel else 0
    mine = [part.layer for found in split.groups for part in found.shards if rank in part.ranks]
    unsharded = [part for found in split.model.layers for part in found.parts(found.layer)]
    pairs = list(zip(unsharded if parallel else mine, mine, strict=False))
    with logged(output, logging.WARNING):
        runtime = startup(mine, settings, group=group)
        with group.guard(), output.progress("checking") as reporter:
            bits = _checked(pairs, counts, runtime, group, reporter, parallel=parallel)
    _report(output, split, bits, runtime, ranks=group.world_size, parallel=parallel)
    _judge(bits, runtime)


def _checked(
    layers: Sequence[tuple[ExpertLayer, ExpertLayer]], counts: Sequence[int], runtime: Runtime, group: Group,
    reporter: Reporter, *, parallel: bool,
) -> list[Bits]:  # fmt: skip
    """Run each layer, whole and as this rank has it, at all token counts."""
    bits: list[Bits] = []
    for whole, local in layers:
        run = _runner(whole, runtime, group, parallel=parallel)
        for count in counts:
            reporter.update(
                done=len(bits), total=len(layers) * len(counts), text=f"{whole.label}, {tokens_text(count)}",
                remaining_s=None,
            )  # fmt: skip
            bits.append(_bits(run, whole, local, count, runtime, group))
    return bits


def _runner(layer: ExpertLayer, runtime: Runtime, group: Group, *, parallel: bool) -> Any:
    from tilecast.engine.bench import make_weights
    from tilecast.engine.experts import prepare_experts
    from tilecast.engine.parallel import TensorParallelExperts
    from tilecast.kernels.dtypes import TORCH_DTYPES

    weights = make_weights(layer)
    common: dict[str, Any] = {
        "top_k": layer.top_k,
        "activation": layer.activation,
        "gated": layer.gated,
        "bias13": weights.bias13,
        "bias2": weights.bias2,
        "dtype": TORCH_DTYPES[layer.dtype],
    }
    if parallel:
        return TensorParallelExperts(weights.w13, weights.w2, group=group, policy=runtime.policy, **common)
    return prepare_experts(weights.w13, weights.w2, runtime=runtime, **common)


def _bits(run: Any, whole: ExpertLayer, local: ExpertLayer, tokens: int, runtime: Runtime, group: Group) -> Bits:
    import torch

    from tilecast.engine.bench import make_operands

    operands = make_operands(whole, tokens, seed=tokens)
    with torch.no_grad():
        batch = run(operands.hidden, operands.ids, operands.scale)
        alone = True
        for row in sorted({place * (tokens - 1) // (ALONE - 1) for place in range(ALONE)}):
            one = slice(row, row + 1)
            single = run(operands.hidden[one], operands.ids[one], operands.scale[one])
            alone &= _sha256(single) == _sha256(batch[one])
    digests = group.gather(f"bits of {whole.label} at {tokens}", _sha256(batch).encode("ascii"))
    return Bits(
        layer=whole.label,
        tokens=tokens,
        decided=runtime.covers(local, tokens),
        sha256=tuple(seen.decode("ascii") for seen in digests),
        same_alone=alone,
    )


def _sha256(values: torch.Tensor) -> str:
    import torch

    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _report(
    output: Output, split: ShardedModel, bits: list[Bits], runtime: Runtime, *, ranks: int, parallel: bool
) -> None:
    digest = runtime.table.digest
    mode = "tensor parallel" if parallel else "the same layer on every rank"
    points: list[Json] = [{**asdict(point), "same_on_all_ranks": point.same_on_all_ranks} for point in bits]
    output.emit(
        {
            "command": "check",
            "model": split.to_json(),
            "ranks": ranks,
            "tensor_parallel": parallel,
            "policy": runtime.policy,
            "table_digest": digest,
            "points": points,
        }
    )
    who = "this process runs" if ranks == 1 else f"all {ranks} ranks run"
    what = f"table {digest[:12]} ({plural(len(runtime.table), 'decision')})" if len(runtime.table) else "no table"
    output.show(f"{who} {what}, {runtime.policy}, {mode}")
    shown = table(
        "Output bits",
        ("layer", "tokens", "decision", "SHA-256 of the output", "ranks equal", "alone = in batch"),
        left=("layer", "decision", "SHA-256 of the output"),
    )
    for point in bits:
        add_row(
            shown, point.layer, str(point.tokens), "tuned" if point.decided else "default", point.sha256[0][:16],
            _yes(point.same_on_all_ranks) if ranks > 1 else "one rank", _yes(point.same_alone),
        )  # fmt: skip
    output.show(shown)
    if ranks > 1 and all(point.same_on_all_ranks for point in bits):
        output.show(f"all {ranks} ranks {'run the same table and ' if len(runtime.table) else ''}return the same bits")


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _judge(bits: list[Bits], runtime: Runtime) -> None:
    for point in bits:
        if not point.same_on_all_ranks:
            odd = next(rank for rank, seen in enumerate(point.sha256) if seen != point.sha256[0])
            raise AgreementError(
                f"rank {odd} returned other bits than rank 0 for {point.layer} at {tokens_text(point.tokens)} "
                f"({point.sha256[odd][:12]} and {point.sha256[0][:12]}); use ranks with equal devices and thread counts"
            )
    for point in bits:
        if runtime.policy == "reproducible" and not point.same_alone:
            raise CoverageError(
                f"tokens of {point.layer} have other bits alone than among {point.tokens}, so the table's numerics "
                f"class does not hold here; tune this layer again on this device"
            )

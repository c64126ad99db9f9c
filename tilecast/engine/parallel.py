"""Expert layers over several ranks: shards of the weights, and sums whose order is the ranks' order.

No NCCL or gloo reduction is used: the order in which those add depends on message size and topology. Ranks
gather each other's float32 partial sums and every rank adds them in rank order, so all get the same bits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tilecast.engine.agreement import process_group
from tilecast.engine.experts import PreparedExperts, prepare_experts
from tilecast.engine.group import Group
from tilecast.engine.operands import check_inputs, layer_of
from tilecast.errors import AgreementError, ModelError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.stacks import Weights, cut_stack
from tilecast.models.sharding import check_cut, split
from tilecast.problem import ExpertGemm, ExpertLayer

SPINS = 200
"""How often a wait looks without sleeping: a sum over ranks usually takes some tens of microseconds."""


@dataclass(frozen=True, kw_only=True)
class ExpertShard:
    """One rank's part of a layer's plain weights, contiguous copies; biases are None or as in `shard_experts`."""

    w13: Weights
    w2: Weights
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None


def shard_experts(
    w13: Weights,
    w2: Weights,
    *,
    tp: int,
    rank: int,
    ep: int = 1,
    gated: bool = True,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
) -> ExpertShard:
    """Return what `rank` of tp * ep holds of w13 [E, 2I or I, H] and w2 [E, H, I].

    I is cut into `tp` parts, the gate's and the up projection's rows each, and E into `ep`; sizes differ by at
    most one, larger parts first; rank = ep_rank * tp + tp_rank. The down projection's bias must be added once,
    so only the first tensor-parallel rank keeps it and the others hold zeros. Quantised weights are cut with their
    scales and zero points. Raises ModelError for impossible numbers, among them a cut inside a group or a block that
    shares a scale; InputError for weights that do not fit each other.
    """
    # What is cut has the same numbers whatever the dtype of hidden states.
    dtype = TORCH_DTYPES["fp32"] if isinstance(w13, QuantizedStack) else None
    layer = layer_of(w13, w2, top_k=1, gated=gated, bias13=bias13, bias2=bias2, dtype=dtype)
    experts, intermediate = layer.experts, layer.intermediate
    for name, parts, total in (("tp", tp, intermediate), ("ep", ep, experts)):
        if not 1 <= parts <= total:
            raise ModelError(f"{name} is {parts}, expected 1 to {total}, the size that it splits")
    if not 0 <= rank < tp * ep:
        raise ModelError(f"rank is {rank}, expected 0 to {tp * ep - 1} (tp={tp} times ep={ep} ranks)")
    check_cut(layer, tp)
    ep_rank, tp_rank = divmod(rank, tp)
    chosen, columns = split(experts, ep)[ep_rank], split(intermediate, tp)[tp_rank]
    mine = slice(chosen.start, chosen.stop)
    starts = (0, intermediate) if gated else (0,)
    halves = [range(start + columns.start, start + columns.stop) for start in starts]

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[mine, part.start : part.stop] for part in halves], dim=1)

    down_bias = None
    if bias2 is not None:
        down_bias = bias2[mine].clone() if tp_rank == 0 else torch.zeros_like(bias2[mine])
    return ExpertShard(
        w13=rows(w13) if isinstance(w13, torch.Tensor) else cut_stack(w13, layer.up, mine, halves),
        w2=_columns(w2, layer.down, mine, columns),
        bias13=None if bias13 is None else rows(bias13),
        bias2=down_bias,
    )


def _columns(weights: Weights, gemm: ExpertGemm, experts: slice, columns: range) -> Weights:
    if isinstance(weights, QuantizedStack):
        return cut_stack(weights, gemm, experts, [range(gemm.n)], columns)
    return weights[experts, :, columns.start : columns.stop].clone(memory_format=torch.contiguous_format)


def local_ids(topk_ids: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Return global expert ids as ids into experts `first` to `first + count - 1`; the others as -1 (absent)."""
    shifted = topk_ids - first
    # Both bounds on the ids themselves: an absent -1 must not become another rank's expert.
    return shifted.masked_fill_((topk_ids < first) | (topk_ids >= first + count), -1)


def all_reduce_ordered(partial: torch.Tensor, group: Group | None = None) -> torch.Tensor:
    """Return the sum over ranks of a float32 `partial`, added in rank order: the same bits on every rank.

    `partial` must have the same shape on all ranks. Returns a fresh tensor. torch.distributed's default process
    group must exist (gloo is fine); `group` lets a rank that waits notice that another failed or died. Raises
    AgreementError then.
    """
    if not dist.is_initialized():
        return partial.clone()
    return ordered_sum(partial, dist.group.WORLD, group)


def ordered_sum(partial: torch.Tensor, ranks: dist.ProcessGroup | None, group: Group | None = None) -> torch.Tensor:
    """Do what `all_reduce_ordered` does among the ranks of one of torch.distributed's process groups."""
    count = dist.get_world_size(ranks)
    if count == 1 or partial.numel() == 0:
        return partial.clone()
    gathered = torch.empty((count, *partial.shape), dtype=partial.dtype, device=partial.device)
    try:
        work = dist.all_gather(list(gathered.unbind(0)), partial.contiguous(), group=ranks, async_op=True)
        _wait(work, group)
    except RuntimeError as error:
        # gloo reports a lost peer as a RuntimeError whose text names addresses, not ranks.
        if group is not None:
            group.fail(AgreementError("the connection between ranks broke, so one ended; start all ranks again"))
        raise AgreementError("the connection between ranks broke, so one ended; start all ranks again") from error
    total = gathered[0].clone()
    for rank in range(1, gathered.shape[0]):
        total += gathered[rank]
    return total


def _wait(work: dist.Work | None, group: Group | None) -> None:
    assert work is not None
    spins = 0
    while group is not None and not work.is_completed():
        spins += 1
        if spins > SPINS:
            group.check()
            time.sleep(0.0001)
    work.wait()


class TensorParallelExperts:
    """One expert layer over all ranks: tensor parallel (I split), expert parallel (E split), or both.

    Every rank calls it with the same hidden [..., H], topk_ids (global ids) and topk_weights, and gets the
    same bits. Each rank's partial is float32 and is rounded once, after the sum in rank order.
    """

    def __init__(
        self,
        w13: Weights,
        w2: Weights,
        *,
        top_k: int,
        tp: int | None = None,
        ep: int = 1,
        activation: str = "silu",
        gated: bool = True,
        bias13: torch.Tensor | None = None,
        bias2: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        policy: str | None = None,
        group: Group | None = None,
    ) -> None:
        """Keep this rank's part of the whole layer's plain weights; `tp` defaults to ranks / ep.

        Needs as many ranks as tp * ep. If any rank cannot hold its part, all raise the same error.
        """
        mine = group or process_group()
        with mine.guard():
            chosen_tp = mine.world_size // ep if tp is None else tp
            if chosen_tp * ep != mine.world_size:
                raise ModelError(f"tp={chosen_tp} times ep={ep} is not the number of ranks, {mine.world_size}")
            shard = shard_experts(w13, w2, tp=chosen_tp, ep=ep, rank=mine.rank, gated=gated, bias13=bias13, bias2=bias2)
            self._local: PreparedExperts = prepare_experts(
                shard.w13, shard.w2, top_k=top_k, activation=activation, gated=gated, bias13=shard.bias13,
                bias2=shard.bias2, global_experts=w2.shape[0], dtype=dtype, policy=policy,
            )  # fmt: skip
            # torch's rendezvous blocks for half an hour and notices no failure: nobody enters it before all can.
            mine.gather("experts ready", b"")
            ensure_process_group(mine)
        self._experts = split(w2.shape[0], ep)[mine.rank // chosen_tp]
        self._whole = w2.shape[0]
        self._group = mine

    @property
    def layer(self) -> ExpertLayer:
        """The layer as this rank sees it."""
        return self._local.layer

    def __call__(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Run the layer; a fresh tensor of hidden's shape and dtype. An error of any rank is raised on all."""
        with self._group.guard():
            rows, ids, weights = check_inputs(self._local.layer, hidden, topk_ids, topk_weights)
            if len(self._experts) != self._whole:
                ids = local_ids(ids, self._experts.start, len(self._experts))
            partial = self._local(rows, ids, weights, out_dtype=torch.float32)
            return all_reduce_ordered(partial, self._group).to(hidden.dtype).view(hidden.shape)


def ensure_process_group(group: Group) -> None:
    """Create torch.distributed's default process group (gloo) unless there is one, or only one rank."""
    if group.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", rank=group.rank, world_size=group.world_size)

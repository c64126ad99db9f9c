"""Which part of a layer each rank holds.

Ranks are ordered expert-parallel outside, tensor-parallel inside: rank = ep_rank * tp + tp_rank, so that the
ranks that share a token's partial sums are neighbours, which is where the fast links are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

from tilecast.errors import ModelError
from tilecast.problem import ExpertLayer, weight_format

MAX_RANKS = 1 << 16
SHOWN = 8
"""Values of tp that work which a message names."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of the different layers that a sharded layer falls into, and the ranks that run it (ascending)."""

    ranks: tuple[int, ...]
    layer: ExpertLayer


def split(total: int, parts: int) -> tuple[range, ...]:
    """Cut 0…total-1 into `parts` consecutive ranges, sizes differing by at most one, larger ones first."""
    size, larger = divmod(total, parts)
    ranges, start = [], 0
    for part in range(parts):
        stop = start + size + (part < larger)
        ranges.append(range(start, stop))
        start = stop
    return tuple(ranges)


def layer_for_rank(layer: ExpertLayer, rank: int, *, tp: int = 1, ep: int = 1) -> ExpertLayer:
    """Return the layer that `rank` of tp * ep runs. Raises ModelError."""
    _check(layer, tp, ep)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < tp * ep:
        raise ModelError(f"rank is {rank!r}, expected 0 to {tp * ep - 1} (tp={tp} times ep={ep} ranks)")
    ep_rank, tp_rank = divmod(rank, tp)
    intermediate, experts = _share(layer.intermediate, tp, tp_rank), _share(layer.experts, ep, ep_rank)
    return replace(layer, intermediate=intermediate, experts=experts)


def shard(layer: ExpertLayer, *, tp: int = 1, ep: int = 1) -> tuple[Shard, ...]:
    """Return the different layers that tp * ep ranks run, each with its ranks, ordered by first rank.

    Tensor parallelism splits I and expert parallelism E (`global_experts` and top-k stay). Where a split is
    uneven, the larger shards come first, and they are different layers: each is tuned for itself, see
    `uneven_note`. Raises ModelError if there are more ranks than columns or experts.
    """
    _check(layer, tp, ep)
    ranks: dict[ExpertLayer, list[int]] = {}
    for rank in range(tp * ep):
        ranks.setdefault(layer_for_rank(layer, rank, tp=tp, ep=ep), []).append(rank)
    return tuple(Shard(ranks=tuple(where), layer=part) for part, where in ranks.items())


def check_cut(layer: ExpertLayer, tp: int, *, word: int = 1) -> None:
    """Raise ModelError where `tp` ranks would cut I inside a group or a block of weights that shares a scale.

    Likewise for a word that `word` codes are packed into.
    """
    form = weight_format(layer.weight_format)
    shared = lcm(form.group or 1, form.rows or 1)
    unit = lcm(shared, word)
    if _aligned(layer, tp, unit):
        return
    counts = range(1, max(1, layer.intermediate // unit) + 1)
    working = [str(count) for count in counts if _aligned(layer, count, unit)]
    shown = f"{', '.join(working[:SHOWN])}{', …' if len(working) > SHOWN else ''}"
    what = f"{'block' if form.rows != 1 else 'group'} of {shared} that shares a scale"
    what = what if shared % word == 0 else f"word of {word} packed codes"
    raise ModelError(
        f"tp={tp} would cut the {layer.intermediate} columns of I inside a {what} ({layer.weight_format}); "
        f"tp that work: {shown}"
    )


def _aligned(layer: ExpertLayer, tp: int, unit: int) -> bool:
    return unit == 1 or all(part.start % unit == 0 for part in split(layer.intermediate, tp))


def uneven_note(shards: tuple[Shard, ...]) -> str | None:
    """Return one sentence that says which ranks run which layer, or None if all run the same."""
    if len(shards) == 1:
        return None
    parts = [f"{_ranks_text(part.ranks)} {part.layer.label}" for part in shards]
    return f"uneven shards are different layers, each tuned for itself: {'; '.join(parts)}"


def _share(total: int, parts: int, part: int) -> int:
    return total // parts + (part < total % parts)


def _ranks_text(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''}"


def _check(layer: ExpertLayer, tp: int, ep: int) -> None:
    for gemm in layer.gemms:
        if gemm.misfit is not None:
            raise ModelError(gemm.misfit)
    for name, value in (("tp", tp), ("ep", ep)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANKS:
            raise ModelError(f"{name} is {value!r}, expected an integer from 1 to {MAX_RANKS}")
    if tp * ep > MAX_RANKS:
        raise ModelError(f"tp={tp} times ep={ep} is {tp * ep} ranks, expected at most {MAX_RANKS}")
    if layer.intermediate < tp:
        raise ModelError(f"tp is {tp}, more than the {layer.intermediate} columns of I to split; use a smaller tp")
    if layer.experts < ep:
        raise ModelError(f"ep is {ep}, more than the {layer.experts} experts to split; use a smaller ep")
    if ep > 1 and layer.experts != layer.global_experts:
        raise ModelError(f"layer {layer.label} is split over experts already, expected an unsharded layer")
    check_cut(layer, tp)

"""What ranks do together when all goes well: first start, second start, uneven shards, sums."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from tests.engine.tables import inputs, weights
from tests.torchrun.small_kernel import small_registry
from tilecast.cache_store.bundle import export_table, import_table
from tilecast.cache_store.memory import MemoryStore
from tilecast.engine.agreement import process_group, startup
from tilecast.engine.experts import prepare_experts
from tilecast.engine.parallel import TensorParallelExperts, all_reduce_ordered, local_ids, shard_experts
from tilecast.engine.table_runtime import Runtime
from tilecast.evidence import TuningTable
from tilecast.models.sharding import layer_for_rank
from tilecast.problem import ExpertLayer
from tilecast.settings import Settings, TuneSettings

WHOLE = ExpertLayer(hidden=64, intermediate=95, experts=4, top_k=2, dtype="bf16")
"""95 columns divide by neither 2 nor 4: shards are uneven."""


def bits(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class Starts:
    """Starts one after the other in one process, as fresh processes would with the settings given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.group = process_group()
        self.rank = self.group.rank
        self.store = MemoryStore()
        self.seconds: list[float] = []
        self.layer = layer_for_rank(WHOLE, self.rank, tp=self.group.world_size)

    def __call__(
        self, *, tune: tuple[int, ...] | None = None, export: str | None = None, load: str | None = None
    ) -> Runtime:
        path = None if load is None else str(self.folder / load)
        # Only rank 0 has the file: the others are sent to one that is not there.
        seen = path if self.rank == 0 or path is None else "/nowhere/table.db"
        settings = Settings(
            cache_dir=self.folder / "cache",
            import_from=seen,
            export_to=None if export is None else str(self.folder / export),
            tune=None if tune is None else TuneSettings(tokens=tune),
        )
        store = self.store if self.rank == 0 else None
        begin = time.monotonic()
        started = startup([self.layer], settings, registry=small_registry(), store=store, budget_s=2)
        self.seconds.append(time.monotonic() - begin)
        return started


def run_layer(policy: str, tokens: int, ep: int = 1, dtype: str = "bf16") -> str:
    w, operands = weights(replace(WHOLE, dtype=dtype)), inputs(replace(WHOLE, dtype=dtype), tokens)
    layer = TensorParallelExperts(w.w13, w.w2, top_k=2, policy=policy, ep=ep)
    return bits(layer(*operands))


def sums() -> dict[str, object]:
    group = process_group()
    partial = torch.randn(5, 7, generator=torch.Generator().manual_seed(group.rank)) * 10.0 ** (3 * group.rank)
    parts = [
        torch.randn(5, 7, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (3 * rank)
        for rank in range(group.world_size)
    ]
    wanted = parts[0].clone()
    for part in parts[1:]:
        wanted += part
    # A large tensor takes another path through gloo.
    large = all_reduce_ordered(torch.full((1 << 20,), float(group.rank + 1)), group)
    return {
        "sum": bits(all_reduce_ordered(partial, group)),
        "wanted": bits(wanted),
        "large": sorted(set(large.tolist())),
        "empty": list(all_reduce_ordered(partial[:0], group).shape),
    }


def by_hand(tokens: int, dtype: str = "bf16", backward: bool = False) -> str:
    """The layer's bits from all shards run in this process and added in rank order, or `backward`."""
    world = process_group().world_size
    w, (hidden, ids, scales) = weights(replace(WHOLE, dtype=dtype)), inputs(replace(WHOLE, dtype=dtype), tokens)
    total: torch.Tensor | None = None
    for rank in reversed(range(world)) if backward else range(world):
        shard = shard_experts(w.w13, w.w2, tp=world, rank=rank)
        partial = prepare_experts(shard.w13, shard.w2, top_k=2)(hidden, ids, scales, out_dtype=torch.float32)
        total = partial if total is None else total + partial
    assert total is not None
    return bits(total.to(hidden.dtype))


def main(folder: Path) -> None:
    start = Starts(folder)
    group = start.group
    first = start(tune=(1, 4), export="first.db")
    measured = len(start.store.measurements())
    again = start(tune=(1, 4), load="first.db")
    untouched = len(start.store.measurements()) == measured
    wider = start(tune=(1, 4, 16), load="first.db", export="second.db")
    fresh_tokens = sorted({m.tokens for m in start.store.measurements()[measured:]})
    loaded = start(load="second.db")
    if group.rank == 0:
        # A table that covers one bucket only; the second start must tune just the others, on all ranks alike.
        partial = TuningTable(wider.table.environments, tuple(d for d in wider.table.decisions if d.bucket.tokens == 4))
        export_table(partial, folder / "partial.db")
    group.gather("written", b"")
    start.store = MemoryStore()
    filled = start(tune=(1, 4, 16), load="partial.db")
    refilled = sorted({m.tokens for m in start.store.measurements()})
    kept = [d.to_json() for d in filled.table.decisions if d.bucket.tokens == 4]
    start(load="second.db")
    report = {
        "layer": start.layer.label,
        "digests": [runtime.table.digest for runtime in (first, again, wider, loaded, filled)],
        "buckets": [[b.tokens for b in runtime.buckets(start.layer)] for runtime in (first, wider, filled)],
        "exported": [import_table(folder / name).digest for name in ("first.db", "second.db")],
        "untouched": untouched,
        "fresh_tokens": fresh_tokens,
        "refilled": refilled,
        "kept": kept == [d.to_json() for d in wider.table.decisions if d.bucket.tokens == 4],
        "ranks_measured": sorted({m.rank for m in start.store.measurements()}),
        "bits": [run_layer("reproducible", tokens) for tokens in (1, 4, 16, 40)],
        "by_hand": [by_hand(tokens) for tokens in (1, 4, 16, 40)],
        "others": [run_layer("reproducible", 64, dtype=dtype) for dtype in ("fp32", "fp16")],
        "others_by_hand": [by_hand(64, dtype) for dtype in ("fp32", "fp16")],
        "backward": by_hand(64, "fp32", backward=True),
        "seconds": start.seconds,
        "zero": run_layer("reproducible", 0),
        "expert_parallel": run_layer("reproducible", 16, ep=2),
        "sums": sums(),
        "local_ids": local_ids(torch.tensor([[-1, 0, 2, 3, 4, 1 << 40]]), 2, 2).tolist(),
    }
    (folder / f"rank{group.rank}.json").write_text(json.dumps(report))
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""From a model on the command line to the layers that its ranks run."""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.canonical import Json
from tilecast.cli._output import Output, plural
from tilecast.models import LayerGroup, Model, Shard, resolve, shard, uneven_note
from tilecast.problem import ExpertLayer


@dataclass(frozen=True, kw_only=True)
class ShardedGroup:
    """Equal layers of a model and the different layers that their ranks see."""

    indices: str
    count: int
    shards: tuple[Shard, ...]
    uneven: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardedModel:
    """A model split over tp * ep ranks."""

    model: Model
    tp: int
    ep: int
    groups: tuple[ShardedGroup, ...]

    @property
    def layers(self) -> tuple[ExpertLayer, ...]:
        """Every different layer that some rank runs, in order of first appearance."""
        return tuple(dict.fromkeys(part.layer for group in self.groups for part in group.shards))

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "name": self.model.name,
            "source": self.model.source,
            "tp": self.tp,
            "ep": self.ep,
            "layers": [
                {
                    "layer": part.layer.to_json(),
                    "label": part.layer.label,
                    "digest": part.layer.digest,
                    "ranks": list(part.ranks),
                    "layers": group.indices,
                    "count": group.count,
                }
                for group in self.groups
                for part in group.shards
            ],
        }

    def explain(self, output: Output) -> None:
        """Note what the ranks run, uneven shards named as the different layers they are."""
        ranks = "" if self.tp * self.ep == 1 else f" over tp={self.tp} ep={self.ep}"
        output.note(f"{self.model.name}{ranks}: {plural(self.model.moe_layers, 'MoE layer')}")
        for group in self.groups:
            for part in group.shards:
                noun = "layer" if group.count == 1 else "layers"
                output.note(f"  {noun} {group.indices}, {_ranks(part.ranks)}: {part.layer.label}")
            if group.uneven is not None:
                output.note(f"  {group.uneven}")
        for note in self.model.notes:
            output.note(f"  {note}")


def sharded(model: str, *, tp: int = 1, ep: int = 1, dtype: str | None = None) -> ShardedModel:
    """Resolve a model and split it. Raises ModelError."""
    resolved = resolve(model, dtype=dtype)
    groups = tuple(_sharded(group, tp, ep) for group in resolved.layers)
    return ShardedModel(model=resolved, tp=tp, ep=ep, groups=groups)


def _sharded(group: LayerGroup, tp: int, ep: int) -> ShardedGroup:
    shares = shard(group.layer, tp=tp, ep=ep)
    parts = tuple(Shard(ranks=share.ranks, layer=part) for share in shares for part in group.parts(share.layer))
    return ShardedGroup(indices=group.indices, count=group.count, shards=parts, uneven=uneven_note(shares))


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    whole = ranks == tuple(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]}–{ranks[-1]}" if whole else "ranks " + ",".join(map(str, ranks))

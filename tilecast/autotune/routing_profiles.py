"""Routing profiles: how a measurement spreads tokens over experts.

`uniform` makes every expert as likely; `zipf:S` makes the r-th most popular one r^-S as likely as the first; a
histogram is what serving recorded. A profile's name is part of every key, so it says all: a histogram's name holds
the digest of its counts.

Any of them may say how sparse the experts of relu layers are: `uniform+sparsity:0.9` for 90% dead neurons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tilecast.autotune.record import FORMAT, MAX_COUNT, Load, ServingRecord, read_json, read_record
from tilecast.canonical import Json, digest
from tilecast.errors import InputError
from tilecast.problem import ExpertLayer, check_int

if TYPE_CHECKING:
    import torch

KNOWN = "uniform, zipf:S such as zipf:1.2, or a file that TM_GEMM_RECORD wrote; with +sparsity:0.9 behind it or not"
SPARSITY = "+sparsity:"
_SHARE = re.compile(r"[01](\.\d{1,6})?")
_EXPONENT = re.compile(r"\d{1,2}(\.\d{1,6})?")
_HISTOGRAM = re.compile(r"histogram:[0-9a-f]{16}")
RANKING_SEED = 0x5EED
"""Decides which of a layer's experts are the popular ones under zipf."""
MAX_EXPERTS = 1 << 16
MOST_CHOSEN = 1 - 1e-4
"""An expert that every recorded token chose is drawn by nearly every token, as log(0) is no weight."""

Router = tuple[int, int, int]
"""Experts, global experts and top-k: layers that are equal in these can have the same histogram."""


@dataclass(frozen=True, kw_only=True)
class RoutingProfile:
    """How likely a token chooses each expert. Profiles of one name are equal.

    `exponent` is zipf's S. `loads` holds, by a layer's digest, what was recorded at each place of the model; `routers`
    the same by router, for layers of other sizes; `counts` is a plain histogram for any layer with that many experts.
    `sparsity` is the share of dead neurons in layers whose activation makes exact zeros, None where it is not known.
    """

    name: str = "uniform"
    exponent: float = field(default=0.0, compare=False)
    loads: Mapping[str, tuple[Load, ...]] = field(default_factory=dict, compare=False, repr=False)
    routers: Mapping[Router, tuple[Load, ...]] = field(default_factory=dict, compare=False, repr=False)
    counts: tuple[int, ...] = field(default=(), compare=False, repr=False)
    sparsity: float | None = field(default=None, compare=False)

    @property
    def is_uniform(self) -> bool:
        """Whether every expert is as likely."""
        return self.name.partition(SPARSITY)[0] == "uniform"

    def with_sparsity(self, share: str) -> RoutingProfile:
        """Return the same profile with a share of dead neurons, a decimal from 0 to 1. Raises InputError."""
        if not _SHARE.fullmatch(share) or float(share) > 1:
            raise InputError(f"sparsity is {share!r:.60}, expected a decimal from 0 to 1, as in uniform+sparsity:0.9")
        name = self.name.partition(SPARSITY)[0]
        # One share, one name.
        return replace(self, name=f"{name}{SPARSITY}{Decimal(share).normalize():f}", sparsity=float(share))

    def probabilities(self, layer: ExpertLayer) -> torch.Tensor:
        """Return float64 [global experts] that sum to 1: how likely a slot goes to each; this rank's come first.

        Raises InputError if this is a histogram that says nothing of the layer.
        """
        import torch

        if self.is_uniform:
            return torch.full((layer.global_experts,), 1 / layer.global_experts, dtype=torch.float64)
        if self.exponent:
            return torch.softmax(self._zipf(layer), 0)
        if self.counts:
            if len(self.counts) != layer.global_experts:
                raise InputError(
                    f"routing {self.name} has counts of {len(self.counts)} experts, but {layer.label} chooses among "
                    f"{layer.global_experts}"
                )
            counts = torch.tensor(self.counts, dtype=torch.float64)
            return counts / counts.sum()
        return self._recorded(layer)

    def log_weights(self, layer: ExpertLayer) -> torch.Tensor:
        """Return float64 [global experts]: what Gumbel noise is added to for a draw of top-k distinct experts.

        Zipf's popularity is the weight itself. A histogram counts how often an expert was among the top k, which
        draws without replacement even out: with exponential clocks of rates w of which the first k to ring win, an
        expert is among them with about 1 - exp(-w·t), so w = -log(1 - m) gives back a recorded rate m (exact for
        many experts, within 1% for 8; for top-1 the rate itself is exact). Raises as `probabilities` does.
        """
        if self.exponent:
            return self._zipf(layer)
        chances = self.probabilities(layer)
        if self.is_uniform or layer.top_k == 1:
            return chances.log()
        rates = (chances * layer.top_k).clamp(max=MOST_CHOSEN)
        return (-(-rates).log1p()).log()

    def to_json(self) -> dict[str, Json]:
        """Return all there is to know, for other ranks and processes."""
        return {"name": self.name, "content": _content(self.loads, self.routers, self.counts)}

    @classmethod
    def from_json(cls, value: object) -> RoutingProfile:
        """Build from what `to_json` gave. Raises InputError."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise InputError("routing profile: expected an object with a name")
        if not value["name"].startswith("histogram:"):
            return parse_profile(value["name"])
        content = cast(dict[str, object], value["content"])
        name, _, share = value["name"].partition(SPARSITY)

        def loads(seen: object) -> tuple[Load, ...]:
            return tuple(Load(tuple(slots), absent) for *slots, absent in cast(list[list[int]], seen))

        profile = cls(
            name=name,
            loads={key: loads(seen) for key, seen in cast(dict[str, object], content["layers"]).items()},
            routers={
                cast(Router, tuple(map(int, key.split(",")))): loads(seen)
                for key, seen in cast(dict[str, object], content["routers"]).items()
            },
            counts=tuple(cast(list[int], content["counts"])),
        )
        return profile.with_sparsity(share) if share else profile

    def _zipf(self, layer: ExpertLayer) -> torch.Tensor:
        """Return -S·log(rank) of every expert.

        Popularity is dealt out over the ranks of expert parallelism in turn, and this rank is the first one: it has
        the most popular expert, and is the one that the others wait for.
        """
        import torch

        every, own = layer.global_experts, layer.experts
        stride = max(1, every // own)
        mine = torch.arange(own) * stride
        left = torch.ones(every, dtype=torch.bool)
        left[mine] = False
        generator = torch.Generator().manual_seed(RANKING_SEED)
        order = torch.cat(
            [part[torch.randperm(len(part), generator=generator)] for part in (mine, left.nonzero()[:, 0])]
        )
        return -self.exponent * (order + 1).to(torch.float64).log()

    def _recorded(self, layer: ExpertLayer) -> torch.Tensor:
        """Return the mean over the places of the model, experts ordered by popularity where there are several.

        Places differ in who is popular: summed expert by expert they would look nearly uniform.
        """
        import torch

        loads = self.loads.get(layer.digest) or self.routers.get(_router(layer))
        if not loads:
            raise InputError(
                f"routing {self.name} has no counts for {layer.label}, nor for another layer of as many experts and "
                f"the same top-k; record it (TM_GEMM_RECORD) or take another profile"
            )
        total = torch.zeros(layer.global_experts, dtype=torch.float64)
        for load in loads:
            slots = torch.tensor(load.slots, dtype=torch.float64)
            chances = torch.zeros_like(total)
            chances[: layer.experts] = slots.sort(descending=True).values if len(loads) > 1 else slots
            if layer.global_experts > layer.experts:
                # Where the slots of other ranks went was not seen.
                chances[layer.experts :] = load.absent / (layer.global_experts - layer.experts)
            total += chances / chances.sum()
        return total / len(loads)


UNIFORM = RoutingProfile()


def as_profile(routing: str | RoutingProfile) -> RoutingProfile:
    """Return the profile that a name, or a profile, stands for. Raises InputError."""
    return parse_profile(routing) if isinstance(routing, str) else routing


def parse_profile(text: str) -> RoutingProfile:
    """Return the profile of a name: `uniform` or `zipf:S`. Raises InputError, also for a histogram's name alone."""
    text, sparse, share = text.partition(SPARSITY)
    if sparse:
        return parse_profile(text).with_sparsity(share)
    if text == "uniform":
        return UNIFORM
    kind, colon, value = text.partition(":")
    if kind == "zipf" and colon:
        if not _EXPONENT.fullmatch(value) or not float(value):
            raise InputError(
                f"routing profile is {text!r:.60}: zipf's exponent must be a decimal above 0, as in zipf:1.2"
            )
        # One exponent, one name.
        return RoutingProfile(name=f"zipf:{Decimal(value).normalize():f}", exponent=float(value))
    if _HISTOGRAM.fullmatch(text):
        raise InputError(f"routing profile {text} is known by name only; give the file that it was read from")
    raise InputError(f"routing profile is {text!r:.60}, expected {KNOWN}")


def load_profile(text: str) -> RoutingProfile:
    """Return the profile of a name or of a file of recorded counts. Raises InputError."""
    text, sparse, share = text.partition(SPARSITY)
    if sparse:
        return load_profile(text).with_sparsity(share)
    path = Path(text)
    named = text == "uniform" or text.startswith("zipf") or _HISTOGRAM.fullmatch(text)
    if named and not path.is_file():
        return parse_profile(text)
    if not path.is_file():
        raise InputError(f"routing profile is {text!r:.200}, neither a known name nor a file; expected {KNOWN}")
    parsed = read_json(path, "routing histogram")
    if isinstance(parsed, dict) and parsed.get("format") == FORMAT:
        return histogram_of(read_record(path), str(path))
    if isinstance(parsed, dict) and set(parsed) == {"counts"} and isinstance(parsed["counts"], list):
        return plain_histogram(parsed["counts"], str(path))
    raise InputError(f'{path}: expected a file that TM_GEMM_RECORD wrote, or {{"counts": [slots of every expert]}}')


def histogram_of(record: ServingRecord, source: str = "record") -> RoutingProfile:
    """Return the profile that serving recorded. Raises InputError if no layer routed a slot."""
    loads: dict[str, tuple[Load, ...]] = {}
    routers: dict[Router, tuple[Load, ...]] = {}
    for seen in record.layers:
        used = tuple(load for load in seen.loads if _has_slots(load, seen.layer))
        if used:
            loads[seen.layer.digest] = used
            routers[_router(seen.layer)] = (*routers.get(_router(seen.layer), ()), *used)
    if not loads:
        raise InputError(f"{source} counts no slots of any expert, so it is no routing profile")
    # Other ranks' files come in any order; the name must not depend on it.
    loads = {key: tuple(sorted(found, key=_order)) for key, found in loads.items()}
    routers = {key: tuple(sorted(found, key=_order)) for key, found in routers.items()}
    return RoutingProfile(name=_name(loads, ()), loads=loads, routers=routers)


def plain_histogram(counts: list[int], source: str = "counts") -> RoutingProfile:
    """Return the profile with these slots per expert, for every layer of as many. Raises InputError."""
    if not 1 <= len(counts) <= MAX_EXPERTS:
        raise InputError(f"{source} has counts of {len(counts)} experts, expected 1 to {MAX_EXPERTS}")
    for count in counts:
        check_int(f"{source}: slots of an expert", count, 0, MAX_COUNT)
    if not any(counts):
        raise InputError(f"{source} counts no slots of any expert, so it is no routing profile")
    return RoutingProfile(name=_name({}, tuple(counts)), counts=tuple(counts))


def _has_slots(load: Load, layer: ExpertLayer) -> bool:
    # Absent slots of a layer that has all experts went nowhere, and say nothing.
    return any(load.slots) or (load.absent > 0 and layer.global_experts > layer.experts)


def _router(layer: ExpertLayer) -> Router:
    return layer.experts, layer.global_experts, layer.top_k


def _order(load: Load) -> tuple[tuple[int, ...], int]:
    return load.slots, load.absent


def _name(loads: Mapping[str, tuple[Load, ...]], counts: tuple[int, ...]) -> str:
    # Routers' loads are the layers' ones.
    return f"histogram:{digest(_content(loads, {}, counts))[:16]}"


def _content(
    loads: Mapping[str, tuple[Load, ...]], routers: Mapping[Router, tuple[Load, ...]], counts: tuple[int, ...]
) -> dict[str, Json]:
    def rows(found: tuple[Load, ...]) -> Json:
        return [[*load.slots, load.absent] for load in found]

    return {
        "layers": {key: rows(found) for key, found in loads.items()},
        "routers": {",".join(map(str, key)): rows(found) for key, found in routers.items()},
        "counts": list(counts),
    }

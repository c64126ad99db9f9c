"""Whole expert layers, from hidden states and routing to the output: Tilecast, default and tuned, and its peers.

Every contestant is compared with float64 on sampled tokens first, then captured, then timed in interleaved rounds
on cold caches, each round routed afresh. What is on record of a point is one part: a restart goes on behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.clock import Clock, Timed, clock_for, free_memory
from benchmarks.gpu.device import Limits, limits_of, reading
from benchmarks.gpu.peers import FixedOperands, GpuPeer, default_peers
from benchmarks.gpu.record import OutOfTime, Record, Setup
from benchmarks.gpu.shapes import Shape, find_shape, layer_tokens
from tilecast.autotune.gate import MAX_ERROR_RATIO, error_ratio
from tilecast.autotune.plan import make_plan
from tilecast.autotune.seeds import hash_seed
from tilecast.autotune.tuner import tune
from tilecast.cache_store.store import open_store
from tilecast.engine.bench import Operands, make_operands, make_weights, work
from tilecast.engine.experts import PreparedExperts, prepare_experts
from tilecast.engine.peers import LayerWeights
from tilecast.engine.runtime import default_registry
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import environment_for
from tilecast.evidence import TuningTable, percentile
from tilecast.kernels import sort_slots
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.reference import reference_layer
from tilecast.problem import ExpertLayer

TUNED, DEFAULT = "tilecast tuned", "tilecast default"
OURS = (TUNED, DEFAULT)
CHECKED_TOKENS = 16
BIT_TOKENS = 4
"""Tokens of a batch that are run alone and must give the same bits."""
POINT_S = 25.0
"""A point is not begun with less time left."""
SLOWEST, FEWEST = 10.0, 3
"""A contestant so many times slower than the fastest gets this many samples only."""


@dataclass(kw_only=True)
class Contestant:
    """One way to run the layer at one token count, and how it went."""

    name: str
    call: Callable[[], torch.Tensor] | None = None
    timed: Timed | None = None
    status: str = "ok"
    detail: str = ""
    error_ratio: float | None = None
    samples_us: list[float] = field(default_factory=list)

    @property
    def racing(self) -> bool:
        return self.status == "ok" and self.call is not None

    def fail(self, status: str, detail: str) -> None:
        self.status, self.detail, self.call, self.timed = status, detail, None, None
        self.samples_us.clear()

    def guarded(self, step: Callable[[], None], clock: Clock) -> None:
        """Run a step; what it raises becomes this contestant's status, unless the device is broken after it."""
        try:
            step()
            clock.synchronize()
        except Exception as error:  # whatever another library raises
            line = str(error).strip().splitlines() or [""]
            self.fail("runtime_error", f"{type(error).__name__}: {line[0]}")
            if not clock.healthy():
                raise

    def to_json(self) -> dict[str, Any]:
        taken = self.samples_us
        return {
            "name": self.name,
            "status": self.status,
            "detail": self.detail,
            "error_ratio": self.error_ratio,
            "graph": None if self.timed is None else self.timed.graph,
            "not_captured": "" if self.timed is None else self.timed.note,
            **{f"p{q}_us": percentile(taken, q) if taken else None for q in (20, 50, 80)},
            "samples_us": taken,
        }


def run(setup: Setup, record: Record) -> dict[str, Any]:
    """Tune one layer, then time it at every token count."""
    shape = find_shape(record.unit, tiny=setup.tiny)
    clock = clock_for(setup.device, tiny=setup.tiny)
    tuned = record.part(
        "tuned", lambda: tuned_table(setup, shape), needs_s=min(30.0, setup.tune_s), healthy=clock.healthy
    )
    table = TuningTable.from_json(tuned["result"]["table"]) if tuned["status"] == "ok" else None
    bench: list[LayerBench] = []
    points = []
    for tokens in layer_tokens(tiny=setup.tiny):

        def measure(tokens: int = tokens) -> dict[str, Any]:
            if not bench:
                # Made at the first point that is not on record yet: a finished layer needs no weights.
                bench.append(LayerBench(setup, shape.layer, clock, table))
            return bench[0].point(tokens)

        points.append(record.part(f"T{tokens}", measure, needs_s=POINT_S, healthy=clock.healthy))
    if all(point["status"] != "ok" for point in points):
        raise RuntimeError(f"no point could be measured; the first:\n{points[0]['error']}")
    return {
        "title": shape.title,
        "layer": shape.layer.to_json(),
        "tuning": {key: tuned[key] for key in ("status", "error", "seconds")},
        "environment": environment_for(setup.device).to_json(),
        "points": [point["result"] for point in points if point["status"] == "ok"],
        "failures": [part["error"] for part in (tuned, *points) if part["status"] != "ok"],
    }


def tuned_table(setup: Setup, shape: Shape) -> dict[str, Any]:
    """Tune a layer within its budget; measurements stay in the store, so that a cut tuning goes on.

    Raises OutOfTime if the run's time did not allow for the whole budget.
    """
    # A third of the budget on top is what deciding with its class check may take.
    affordable = setup.seconds_left / 1.33 - 5.0
    budget_s = min(setup.tune_s, affordable)
    if budget_s <= 0:
        raise OutOfTime
    plan = make_plan([shape.layer], layer_tokens(tiny=setup.tiny), environment_for(setup.device))
    setup.out.mkdir(parents=True, exist_ok=True)
    with open_store(setup.out / "tuning.db") as store:
        table = tune(plan, store, default_registry(), budget_s=budget_s)
    if affordable < setup.tune_s:
        raise OutOfTime
    return {"budget_s": budget_s, "table": table.to_json()}


class LayerBench:
    """One layer's weights on the device, and everything that runs on them."""

    def __init__(
        self,
        setup: Setup,
        layer: ExpertLayer,
        clock: Clock,
        table: TuningTable | None,
        peers: Sequence[GpuPeer] | None = None,
    ) -> None:
        self.setup, self.layer, self.clock = setup, layer, clock
        self.limits = limits_of(setup)
        self.weights = on_device(make_weights(layer), clock.device)
        self.peers = default_peers() if peers is None else peers
        self.runtimes: dict[str, Runtime] = {}
        self.ours: dict[str, PreparedExperts] = {}
        for name, known in ((TUNED, table), (DEFAULT, TuningTable())):
            if known is not None:
                self.runtimes[name] = _runtime(setup, known)
                self.ours[name] = self._prepared(self.runtimes[name])

    def _prepared(self, runtime: Runtime) -> PreparedExperts:
        layer, weights = self.layer, self.weights
        return prepare_experts(
            weights.w13, weights.w2, top_k=layer.top_k, activation=layer.activation, gated=layer.gated,
            bias13=weights.bias13, bias2=weights.bias2, global_experts=layer.global_experts, runtime=runtime,
        )  # fmt: skip

    @torch.inference_mode()
    def point(self, tokens: int) -> dict[str, Any]:
        """Check, capture and time every contestant at one token count."""
        start = time.monotonic()
        clocks_before = reading(self.setup.device)
        first = make_operands(self.layer, tokens, hash_seed(0, tokens, 1 << 20))
        fixed = FixedOperands(self.layer, first, self.clock.device)
        contestants = self._enter(fixed, tokens)
        self._check(contestants, fixed)
        bits = {name: self._bits(experts, fixed) for name, experts in self.ours.items() if _racing(contestants, name)}
        for contestant in contestants:
            self._capture(contestant)
        works = self._race(contestants, fixed, tokens)
        active, flops, size = (sum(values) / len(values) for values in zip(*works, strict=True))
        found = {
            "tokens": tokens,
            "active_experts": active,
            "flops": flops,
            "bytes": size,
            "weight_bytes": active / self.layer.experts * sum(gemm.weight_bytes() for gemm in self.layer.gemms),
            "configs": {name: self._configs(name, tokens) for name in self.ours},
            "bits": bits,
            "clocks_before": clocks_before,
            "clocks_after": reading(self.setup.device),
            "contestants": [contestant.to_json() for contestant in contestants],
            "seconds": time.monotonic() - start,
        }
        found["derived"] = derive(found, self.limits)
        contestants.clear()
        free_memory(self.setup.device)
        return found

    def _enter(self, fixed: FixedOperands, tokens: int) -> list[Contestant]:
        contestants = [Contestant(name=name, call=_bound(experts, fixed)) for name, experts in self.ours.items()]
        for peer in self.peers:
            contestant = Contestant(name=peer.name)
            contestants.append(contestant)
            reason = peer.unavailable(self.layer, tokens)
            if reason is not None:
                contestant.fail("unavailable", reason)
                continue

            def prepare(peer: GpuPeer = peer, contestant: Contestant = contestant) -> None:
                contestant.call = peer.prepare(self.layer, self.weights)(fixed)

            contestant.guarded(prepare, self.clock)
        return contestants

    def _check(self, contestants: list[Contestant], fixed: FixedOperands) -> None:
        """Compare every contestant with float64 on some tokens, the first and the last among them."""
        tokens = fixed.ids.shape[0]
        rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS)).long().unique().to(fixed.ids.device)
        exact, torch_values = expected(self.layer, self.weights, fixed, rows)
        longest = max(self.layer.hidden, self.layer.intermediate)

        def compare(contestant: Contestant) -> None:
            assert contestant.call is not None, "only what races is compared"
            out = contestant.call()
            if out.shape != fixed.hidden.shape or not bool(torch.isfinite(out).all()):
                contestant.fail("wrong_result", f"output {tuple(out.shape)} has the wrong shape or is not finite")
                return
            contestant.error_ratio = error_ratio(out[rows], exact, torch_values, longest)
            if not contestant.error_ratio <= MAX_ERROR_RATIO:
                detail = f"error is {contestant.error_ratio:.3g} times that of torch in {self.layer.dtype}"
                contestant.fail("wrong_result", detail)

        for contestant in [c for c in contestants if c.racing]:
            contestant.guarded(lambda c=contestant: compare(c), self.clock)  # type: ignore[misc]

    def _bits(self, experts: PreparedExperts, fixed: FixedOperands) -> dict[str, int]:
        """Count the sampled tokens that give alone the bits that they gave in the batch."""
        tokens = fixed.ids.shape[0]
        rows = torch.linspace(0, tokens - 1, min(tokens, BIT_TOKENS)).long().unique().tolist()
        batch = experts(fixed.hidden, fixed.ids, fixed.scale)
        equal = 0
        for row in rows:
            one = slice(row, row + 1)
            alone = experts(fixed.hidden[one].clone(), fixed.ids[one].clone(), fixed.scale[one].clone())
            equal += torch.equal(alone.view(torch.uint8), batch[one].contiguous().view(torch.uint8))
        return {"checked": len(rows), "equal": equal}

    def _capture(self, contestant: Contestant) -> None:
        call = contestant.call
        if not contestant.racing or call is None:
            return

        def prepare() -> None:
            contestant.timed = self.clock.prepare(call)

        contestant.guarded(prepare, self.clock)

    def _race(
        self, contestants: list[Contestant], fixed: FixedOperands, tokens: int
    ) -> list[tuple[float, float, float]]:
        """Sample in interleaved rounds; returns (active experts, FLOPs, bytes) of each round's routing."""
        works = []
        for turn in range(self.setup.rounds):
            routing = make_routing(self.layer, tokens, hash_seed(0, tokens, turn))
            fixed.route(routing.ids, routing.scale)
            works.append(work(self.layer, routing.ids))
            start = turn % len(contestants)
            for contestant in contestants[start:] + contestants[:start]:
                if contestant.racing and not _hopeless(contestant, contestants):
                    contestant.guarded(lambda c=contestant: self._sample(c, fixed), self.clock)  # type: ignore[misc]
        return works

    def _sample(self, contestant: Contestant, fixed: FixedOperands) -> None:
        assert contestant.timed is not None, "only what was captured is timed"
        contestant.samples_us.append(self.clock.sample(contestant.timed, touch=fixed.tensors))

    def _configs(self, name: str, tokens: int) -> dict[str, Any]:
        entry = self.runtimes[name].lookup(self.layer, tokens)
        return {"up": entry.up.to_json(), "down": entry.down.to_json(), "hit": entry.hit}


def derive(point: dict[str, Any], limits: Limits | None) -> dict[str, Any]:
    """Return TFLOP/s, GB/s of active weights, the share of the roofline and the ratio to the best peer."""
    times = {c["name"]: c["p50_us"] for c in point["contestants"] if c["p50_us"]}
    peers = {name: time_us for name, time_us in times.items() if name not in OURS}
    best_peer = min(peers, key=lambda name: peers[name]) if peers else None
    limit_us, bound = limits.time_us(point["bytes"], point["flops"]) if limits else (None, None)
    return {
        "limit_us": limit_us,
        "bound": bound,
        "best_peer": best_peer,
        "contestants": {
            name: {
                "tflop_s": point["flops"] / time_us / 1e6,
                "weights_gb_s": point["weight_bytes"] / time_us / 1e3,
                "roofline_share": limit_us / time_us if limit_us else None,
                "best_peer_over_this": peers[best_peer] / time_us if best_peer else None,
            }
            for name, time_us in times.items()
        },
    }


def make_routing(layer: ExpertLayer, tokens: int, seed: int) -> Operands:
    """Return operands whose ids and weights are used; the hidden states of all rounds are the same."""
    narrow = ExpertLayer.from_json({**layer.to_json(), "hidden": 1})
    return make_operands(narrow, tokens, seed)


def on_device(weights: LayerWeights, device: torch.device) -> LayerWeights:
    """Return the weights on a device."""
    moved = {name: None if value is None else value.to(device) for name, value in vars(weights).items()}
    return LayerWeights(**moved)


def expected(
    layer: ExpertLayer, weights: LayerWeights, fixed: FixedOperands, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some tokens' results in float64 and by torch in the layer's dtype, both as float64."""
    route = sort_slots(fixed.ids[rows].contiguous(), layer.experts)
    exact, torch_values = (
        reference_layer(
            layer, fixed.hidden[rows], weights.w13, weights.w2, route, fixed.scale[rows], weights.bias13,
            weights.bias2, dtype,
        ).double()
        for dtype in (torch.float64, TORCH_DTYPES[layer.dtype])
    )  # fmt: skip
    return exact, torch_values


def _runtime(setup: Setup, table: TuningTable) -> Runtime:
    return Runtime(table, environment=environment_for(setup.device), registry=default_registry())


def _bound(experts: PreparedExperts, fixed: FixedOperands) -> Callable[[], torch.Tensor]:
    return lambda: experts(fixed.hidden, fixed.ids, fixed.scale)


def _racing(contestants: list[Contestant], name: str) -> bool:
    return any(c.name == name and c.racing for c in contestants)


def _hopeless(contestant: Contestant, contestants: list[Contestant]) -> bool:
    if len(contestant.samples_us) < FEWEST:
        return False
    best = min(min(other.samples_us) for other in contestants if other.samples_us)
    return min(contestant.samples_us) > SLOWEST * best

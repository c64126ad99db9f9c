"""Times an expert layer on a table against the default configs and against what users have today.

All contestants run in one process, in interleaved rounds of rotating order. Within a round they get the same
operands; each round is routed afresh. Before every sample the last-level cache is flushed by reading through
more memory than it holds, and the activations are then touched: weights come from memory, as in a model whose
other layers ran in between, and activations are warm, as their producer has just written them.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from tilecast.autotune.clock import Clock, clock_for
from tilecast.autotune.draws import uniform_ids
from tilecast.autotune.gate import MAX_ERROR_RATIO, error_ratio
from tilecast.autotune.seeds import hash_seed
from tilecast.autotune.workload import device_of, normal_stack, synchronise, weight_stack
from tilecast.engine.bench_contestant import MIN_ROUNDS, Contestant, hopeless, reporting
from tilecast.engine.bench_placed import BenchedPlacement
from tilecast.engine.bench_result import DEFAULT, OURS, BenchResult, Point, Timing, best_peaks
from tilecast.engine.experts import PreparedExperts, prepare_experts
from tilecast.engine.peers import PEERS, Bound, LayerWeights, Peer, Prepared, refused
from tilecast.engine.placed_choice import Shares
from tilecast.engine.runtime import default_registry
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import Environment, cpu_environment, here
from tilecast.errors import UsageError
from tilecast.evidence import TuningTable
from tilecast.kernels.cpu.peak import Peaks, measure_peaks
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.reference import reference_layer
from tilecast.kernels.routing import ordered_sum, sort_slots
from tilecast.kernels.work import UNKNOWN_SPARSITY, SkipsZeros
from tilecast.problem import DTYPES, ExpertLayer, TileConfig, check_int, tokens_text

__all__ = [
    "DEFAULT",
    "OURS",
    "BenchResult",
    "Operands",
    "Point",
    "Timing",
    "bench_layer",
    "make_operands",
    "make_weights",
    "work",
]

FLUSH_FACTOR = 4
MIN_FLUSH_BYTES = 64 << 20
"""The flush reads this many times the last-level cache, and at least so much where its size is unknown."""
CHECKED_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What one call of the layer gets: hidden [T, H], ids int32 [T, k], routing weights float32 [T, k]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    scale: torch.Tensor


Progress = Callable[[str], None]
"""Is told in one line what is being timed."""


def bench_layer(
    layer: ExpertLayer,
    tokens: Sequence[int],
    *,
    table: TuningTable | None = None,
    policy: str = "reproducible",
    peers: Sequence[Peer] = PEERS,
    rounds: int = 20,
    budget_s: float = 120.0,
    threads: int = 0,
    seed: int = 0,
    peaks: Peaks | None = None,
    progress: Progress | None = None,
    placed: Sequence[Shares] = (),
) -> BenchResult:
    """Time one layer at some token counts on `threads` threads (0: as many as torch uses now).

    `table` (None: an empty one) is looked up under `policy`; tuning is the caller's business. Sampling stops
    after `rounds`, or when a point's share of `budget_s` is spent, but not before every contestant has
    `MIN_ROUNDS` samples. A contestant that cannot run, fails, or is wrong against float64 gets no time and
    says why. `peaks` None: the machine's limits are read before, between and after the points, about a second
    each time, and the best readings count. Memory: the plain weights, and one more copy for each contestant that
    packs them. `placed` are placements of the layer's experts on this device and the CPU, timed beside it, each with
    one more copy.
    Raises InputError for token counts or rounds below 1, and what validating a table raises.
    """
    for count in tokens:
        check_int("tokens", count, 1)
    check_int("rounds", rounds, 1)
    if not tokens:
        raise UsageError("no token counts to time, expected at least one")
    with _threads(threads) as used, torch.no_grad():
        environment = here()
        readings = [peaks or _fresh_peaks(used)]
        bench = _Bench(layer, environment, table or TuningTable(), policy, readings[0], seed)
        bench.place(placed)
        deadline = time.monotonic() + budget_s
        points = []
        for place, count in enumerate(tokens):
            if progress is not None:
                progress(f"{layer.label}, {tokens_text(count)}, {policy}")
            share_s = (deadline - time.monotonic()) / (len(tokens) - place)
            points.append(bench.point(count, peers, rounds, share_s))
            readings.append(peaks or _fresh_peaks(used))
    limits = best_peaks(readings)
    return BenchResult(
        environment=environment,
        threads=used,
        read_gb_s=limits.read_gb_s,
        fma_gflop_s=limits.fma_gflop_s,
        dot_bf16_gflop_s=limits.dot_bf16_gflop_s,
        points=tuple(point.with_peaks(limits) for point in points),
    )


class _Bench:
    """One layer's weights and Tilecast's two contestants on them, prepared once for all token counts."""

    def __init__(
        self, layer: ExpertLayer, environment: Environment, table: TuningTable, policy: str, peaks: Peaks, seed: int
    ) -> None:
        self.layer, self.policy, self.peaks, self.seed = layer, policy, peaks, seed
        self.device = device_of(environment)
        self.clock: Clock | None = None if self.device.type == "cpu" else clock_for(self.device, environment.llc_bytes)
        self.weights = make_weights(layer, seed, self.device)
        self.runtime = Runtime(table, environment=environment, registry=default_registry(), policy=policy)
        without = Runtime(TuningTable(), environment=environment, registry=default_registry(), policy=policy)
        self.ours = {OURS: self._prepared(self.runtime), DEFAULT: self._prepared(without)}
        places = [environment] if self.device.type == "cpu" else [environment, cpu_environment()]
        self.flushed = [_flushed(place.llc_bytes, device_of(place)) for place in places]
        self.placements: tuple[BenchedPlacement, ...] = ()

    def place(self, placed: Sequence[Shares]) -> None:
        """Have the layer timed with its experts on two devices, too."""
        self.placements = tuple(BenchedPlacement(shares, self.weights, self.runtime, self.device) for shares in placed)

    def _prepared(self, runtime: Runtime) -> PreparedExperts:
        layer, weights = self.layer, self.weights
        return prepare_experts(
            weights.w13, weights.w2, top_k=layer.top_k, activation=layer.activation, gated=layer.gated,
            bias13=weights.bias13, bias2=weights.bias2, global_experts=layer.global_experts, runtime=runtime,
            dtype=TORCH_DTYPES[layer.dtype],
        )  # fmt: skip

    def point(self, tokens: int, peers: Sequence[Peer], rounds: int, share_s: float) -> Point:
        """Check and time every contestant at one token count."""
        deadline = time.monotonic() + share_s
        contestants = [Contestant(name=name, bind=_binder(experts)) for name, experts in self.ours.items()]
        contestants += [self._enter(peer, tokens) for peer in peers]
        groups = [placement.enter(_binder(self.ours[OURS])) for placement in self.placements]
        everyone = [*contestants, *itertools.chain(*groups)]
        self._check(everyone, tokens)
        routed = self._race(everyone, tokens, rounds, deadline)
        ids = [uniform_ids(self.layer, tokens, hash_seed(self.seed, tokens, turn)) for turn in range(len(routed))]
        active, flops, size = (sum(values) / len(values) for values in zip(*routed, strict=True))
        entry = self.runtime.lookup(self.layer, tokens)
        dot = "bf16" in (dict(entry.up.params).get("dot"), dict(entry.down.params).get("dot"))
        return Point(
            layer=self.layer,
            tokens=tokens,
            policy=self.policy,
            up=entry.up,
            down=entry.down,
            hit=entry.hit,
            active_experts=active,
            flops=flops,
            bytes=size,
            dot=dot,
            limit_us=math.inf,
            bound="memory",
            timings=tuple(contestant.timing() for contestant in contestants),
            placed=tuple(
                placement.point(group, tokens, ids) for placement, group in zip(self.placements, groups, strict=True)
            ),
        ).with_peaks(self.peaks)

    def _enter(self, peer: Peer, tokens: int) -> Contestant:
        contestant = Contestant(name=peer.name, gemms_only=peer.gemms_only)
        reason = refused(peer, self.layer, tokens, self.device.type)
        if reason is not None:
            contestant.fail("unavailable", reason)
            return contestant
        with reporting(contestant):
            contestant.bind = peer.prepare(self.layer, self.weights, tokens)
        return contestant

    def _check(self, contestants: list[Contestant], tokens: int) -> None:
        """Run every contestant once; whole layers are compared with float64 on some tokens."""
        operands = make_operands(self.layer, tokens, hash_seed(self.seed, tokens, 1 << 20), self.device)
        count = min(tokens, CHECKED_TOKENS)
        rows = torch.arange(tokens) if count == tokens else torch.linspace(0, tokens - 1, count).long()
        rows = rows.to(self.device)
        exact, torch_values = _expected(self.layer, self.weights, operands, rows)
        longest = max(self.layer.hidden, self.layer.intermediate)
        for contestant in [c for c in contestants if c.racing]:
            with reporting(contestant):
                out = _call(contestant, operands)()
                if contestant.gemms_only or contestant.share:
                    continue
                if out.shape != operands.hidden.shape or not bool(torch.isfinite(out).all()):
                    contestant.fail("wrong_result", f"output {tuple(out.shape)} has the wrong shape or is not finite")
                    continue
                contestant.error_ratio = error_ratio(out[rows], exact, torch_values, longest)
                if contestant.error_ratio > MAX_ERROR_RATIO:
                    detail = f"error is {contestant.error_ratio:.3g} times that of torch in {self.layer.dtype}"
                    contestant.fail("wrong_result", detail)

    def _race(
        self, contestants: list[Contestant], tokens: int, rounds: int, deadline: float
    ) -> list[tuple[float, float, float]]:
        """Sample in interleaved rounds; returns (active experts, FLOPs, bytes) of each round's routing."""
        routed = []
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and time.monotonic() > deadline:
                break
            operands = make_operands(self.layer, tokens, hash_seed(self.seed, tokens, turn), self.device)
            entry = self.runtime.lookup(self.layer, tokens)
            routed.append(left_to_do(self.layer, operands.ids, (entry.up, entry.down), self.runtime.environment))
            start = turn % len(contestants)
            for contestant in contestants[start:] + contestants[:start]:
                if contestant.racing and not hopeless(contestant, contestants):
                    with reporting(contestant):
                        contestant.samples_us.append(self._sample(contestant, operands))
        return routed

    def _sample(self, contestant: Contestant, operands: Operands) -> float:
        """Return the µs of one call on cold weights and, on the CPU, warm activations."""
        call = _call(contestant, operands)
        if self.clock is not None and not contestant.by_host:
            return self.clock.time([lambda: _discard(call)])
        for tensor in (*self.flushed, operands.hidden, operands.ids, operands.scale):
            tensor.sum()
        synchronise(self.device)
        enabled = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter_ns()
            call()
            synchronise(self.device)
            return (time.perf_counter_ns() - start) / 1e3
        finally:
            if enabled:
                gc.enable()


def make_weights(layer: ExpertLayer, seed: int = 0, device: torch.device | None = None) -> LayerWeights:
    """Return random weights of a layer, scaled so that activations keep their size; the same on every device."""
    dtype = TORCH_DTYPES[layer.dtype]
    (w13, bias13), (w2, bias2) = (
        (
            weight_stack(gemm, hash_seed(seed, place), device),
            normal_stack((layer.experts, gemm.n), dtype, 0.5, hash_seed(seed, place, 1), device)
            if layer.bias
            else None,
        )
        for place, gemm in enumerate(layer.gemms)
    )
    return LayerWeights(w13=w13, w2=w2, bias13=bias13, bias2=bias2)


def make_operands(layer: ExpertLayer, tokens: int, seed: int, device: torch.device | None = None) -> Operands:
    """Return one call's operands, the same on every device; another seed gives other routing."""
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(hash_seed(seed, 5))
    scale = torch.rand(tokens, layer.top_k, generator=generator) + 0.1
    return Operands(
        hidden=normal_stack((tokens, layer.hidden), TORCH_DTYPES[layer.dtype], 1.0, hash_seed(seed, 3), device),
        ids=uniform_ids(layer, tokens, seed).to(device),
        scale=(scale / ordered_sum(scale)).to(device),
    )


def work(layer: ExpertLayer, ids: torch.Tensor) -> tuple[float, float, float]:
    """Return (active experts, FLOPs, bytes) that a routing (integers [T, k]) asks of a layer.

    Bytes are the weights of the active experts, the rows in and out, and the intermediate once.
    """
    present = ids[(ids >= 0) & (ids < layer.experts)]
    rows, active = present.numel(), int((torch.bincount(present.flatten().long(), minlength=1) > 0).sum())
    elements = 2 * ids.shape[0] * layer.hidden + rows * layer.intermediate
    size = sum(gemm.weight_bytes(active) for gemm in layer.gemms) + elements * DTYPES[layer.dtype]
    return float(active), float(sum(gemm.flops(rows) for gemm in layer.gemms)), float(size)


def left_to_do(
    layer: ExpertLayer, ids: torch.Tensor, configs: tuple[TileConfig, TileConfig], environment: Environment
) -> tuple[float, float, float]:
    """Return `work`, less the weights and products that configs of up and down leave out.

    Random operands leave half of the gates dead; with dReLU half of the other factor is, too.
    """
    active, flops, size = work(layer, ids)
    present = ids[(ids >= 0) & (ids < layer.experts)].long()
    counts = torch.bincount(present, minlength=layer.experts).tolist()
    for gemm, config in zip(layer.gemms, configs, strict=True):
        kernel = default_registry()[config.kernel]
        if isinstance(kernel, SkipsZeros):
            alive = (1 - UNKNOWN_SPARSITY) ** (2 if gemm.name == "down" and layer.activation == "drelu" else 1)
            done = kernel.work(gemm, config, environment, counts, 1 - alive)
            size -= gemm.weight_bytes(int(active)) - done.weight_bytes
            flops -= gemm.flops(present.numel()) - done.useful_flops
    return active, flops, size


def _flushed(llc_bytes: int, device: torch.device) -> torch.Tensor:
    """Return what is read through so that a cache of this size holds nothing else."""
    return torch.ones(max(FLUSH_FACTOR * llc_bytes, MIN_FLUSH_BYTES) // 8, dtype=torch.int64, device=device)


def _binder(experts: PreparedExperts) -> Prepared:
    return lambda hidden, ids, scale: partial(experts, hidden, ids, scale)


def _call(contestant: Contestant, operands: Operands) -> Bound:
    assert contestant.bind is not None, "only what races is called"
    return contestant.bind(operands.hidden, operands.ids, operands.scale)


def _discard(call: Bound) -> None:
    call()


def _expected(
    layer: ExpertLayer, weights: LayerWeights, operands: Operands, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of some tokens in float64 and by torch in the layer's dtype, both as float64."""
    route = sort_slots(operands.ids[rows], layer.experts)
    exact, torch_values = (
        reference_layer(
            layer, operands.hidden[rows], weights.w13, weights.w2, route, operands.scale[rows], weights.bias13,
            weights.bias2, dtype,
        ).double()
        for dtype in (torch.float64, TORCH_DTYPES[layer.dtype])
    )  # fmt: skip
    return exact, torch_values


def _fresh_peaks(threads: int) -> Peaks:
    """Measure the machine's limits anew: a reading is too low whenever something else is running."""
    measure_peaks.cache_clear()
    return measure_peaks(threads)


@contextmanager
def _threads(wanted: int) -> Iterator[int]:
    """Use `wanted` threads (0: as many as now) in torch, and so in the kernels, and put the number back after."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield wanted or before
    finally:
        torch.set_num_threads(before)

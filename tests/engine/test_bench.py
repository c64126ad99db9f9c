"""The benchmark and its contestants: right results, honest marks, and figures that add up. No times are judged."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch

from tilecast.engine.bench import bench_layer, left_to_do, make_operands, make_weights, work
from tilecast.engine.bench_result import DEFAULT, OURS, BenchResult, Point, Timing
from tilecast.engine.peers import PEERS, LayerWeights, OneDnnGemms, Peer, Prepared, TransformersExperts, find_peers
from tilecast.environment import cpu_environment
from tilecast.errors import InputError, UsageError
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.peak import Peaks
from tilecast.kernels.cpu.screen_work import open_share
from tilecast.kernels.cpu.sparse import SparseExperts
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.reference import reference_layer
from tilecast.kernels.routing import sort_slots
from tilecast.problem import ExpertLayer, TileConfig

LAYER = ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2)
PEAKS = Peaks(threads=1, read_gb_s=1e3, fma_gflop_s=1e4, dot_bf16_gflop_s=1e4)
WHOLE_LAYER_PEERS = [peer for peer in PEERS if not peer.gemms_only]
LAYERS = [
    LAYER,
    dataclasses.replace(LAYER, hidden=33, intermediate=47),
    dataclasses.replace(LAYER, bias=True, activation="swiglu_oai"),
    dataclasses.replace(LAYER, gated=False, activation="relu2"),
    dataclasses.replace(LAYER, activation="gelu_tanh"),
    dataclasses.replace(LAYER, experts=4, global_experts=9),
]


class Broken:
    """A peer that fails in one of the ways that a peer can."""

    gemms_only = False

    def __init__(self, how: str) -> None:
        self.name = self.how = how

    def available(self, layer: ExpertLayer, tokens: int = 1, device: str = "cpu") -> str | None:
        return "never installed" if self.how == "absent" else None

    def prepare(self, layer: ExpertLayer, weights: LayerWeights, tokens: int = 1) -> Prepared:
        if self.how == "fails to prepare":
            raise MemoryError("no room")
        return lambda hidden, ids, scale: partial(self.run, hidden)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.how == "fails to run":
            raise RuntimeError("first line\nsecond line")
        if self.how == "unwritten":
            return torch.full_like(hidden, torch.nan)
        if self.how == "misshapen":
            return hidden[:, :-1]
        return torch.zeros_like(hidden)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
@pytest.mark.parametrize("peer", WHOLE_LAYER_PEERS, ids=lambda peer: peer.name)
def test_peers_compute_the_layer_or_say_why_not(peer: Peer, layer: ExpertLayer, dtype: str) -> None:
    layer = dataclasses.replace(layer, dtype=dtype)
    reason = peer.available(layer, 9)
    if reason is not None:
        assert reason.strip() and "\n" not in reason
        return
    weights, given = make_weights(layer), make_operands(layer, 9, seed=1)
    with torch.no_grad():
        out = peer.prepare(layer, weights, 9)(given.hidden, given.ids, given.scale)()
    route = sort_slots(given.ids, layer.experts)
    exact = reference_layer(
        layer, given.hidden, weights.w13, weights.w2, route, given.scale, weights.bias13, weights.bias2
    )
    assert out.dtype == TORCH_DTYPES[dtype]
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}[dtype]
    assert float((out.double() - exact).norm() / exact.norm()) < tolerance


def test_peers_leave_the_operands_as_they_were() -> None:
    layer = dataclasses.replace(LAYER, dtype="fp32")
    weights, given = make_weights(layer), make_operands(layer, 9, seed=1)
    before = [tensor.clone() for tensor in (given.hidden, given.ids, given.scale, weights.w13, weights.w2)]
    for peer in PEERS:
        if peer.available(layer, 9) is None:
            peer.prepare(layer, weights, 9)(given.hidden, given.ids, given.scale)()
    after = (given.hidden, given.ids, given.scale, weights.w13, weights.w2)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_prepacked_gemms_are_the_layers_products() -> None:
    layer, peer = dataclasses.replace(LAYER, dtype="fp32", experts=1, global_experts=1, top_k=1), OneDnnGemms()
    if (reason := peer.available(layer)) is not None:
        pytest.skip(reason)
    weights, given = make_weights(layer), make_operands(layer, 5, seed=1)
    bound = peer.prepare(layer, weights, 5)(given.hidden, given.ids, given.scale)
    assert isinstance(bound, partial)
    (_, packed_up), (rows, _) = bound.args[0]
    up_only = OneDnnGemms._run([(given.hidden, packed_up)])
    torch.testing.assert_close(up_only, given.hidden @ weights.w13[0].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bound(), rows @ weights.w2[0].T, rtol=1e-4, atol=1e-4)


def test_copying_a_weight_per_slot_is_refused_before_memory_is_spent() -> None:
    big = ExpertLayer(hidden=4096, intermediate=14336, experts=8, top_k=2)
    assert "GiB" in str(TransformersExperts("batched_mm").available(big, 4096))


def test_peers_are_found_by_name() -> None:
    assert [peer.name for peer in find_peers(["torch loop", "transformers eager", "torch loop"])] == [
        "torch loop",
        "transformers eager",
    ]
    with pytest.raises(UsageError, match="no peer is named 'tourch loop'; known: torch loop, "):
        find_peers(["tourch loop"])


def bench(layer: ExpertLayer, tokens: list[int], peers: list[Peer], rounds: int = 2) -> BenchResult:
    return bench_layer(layer, tokens, peers=peers, rounds=rounds, budget_s=20, threads=1, peaks=PEAKS)


def test_bench_times_ours_the_default_and_peers() -> None:
    threads = torch.get_num_threads()
    result = bench(dataclasses.replace(LAYER, dtype="fp32"), [1, 7], list(find_peers(["torch loop"])))
    assert torch.get_num_threads() == threads
    assert result.contestants == (OURS, DEFAULT, "torch loop")
    assert [point.tokens for point in result.points] == [1, 7]
    for point in result.points:
        assert not point.hit, "an empty table covers nothing"
        assert all(timing.status == "ok" and len(timing.samples_us) == 2 for timing in point.timings)
        assert all(timing.error_ratio is not None and timing.error_ratio <= 2 for timing in point.timings)
    parsed = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [s["against"] for s in parsed["summaries"]] == ["limit", "best peer", DEFAULT, "torch loop"]


@pytest.mark.parametrize("layer", LAYERS[1:], ids=lambda layer: layer.label)
def test_bench_runs_every_kind_of_layer(layer: ExpertLayer) -> None:
    (point,) = bench(layer, [5], list(find_peers(["torch loop"])), rounds=1).points
    assert [timing.status for timing in point.timings] == ["ok"] * 3


@pytest.mark.parametrize(
    ("how", "status", "detail"),
    [
        ("absent", "unavailable", "never installed"),
        ("fails to prepare", "runtime_error", "MemoryError: no room"),
        ("fails to run", "runtime_error", "RuntimeError: first line"),
        ("unwritten", "wrong_result", "not finite"),
        ("misshapen", "wrong_result", "wrong shape"),
        ("zeros", "wrong_result", "times that of torch"),
    ],
)
def test_a_contestant_that_fails_has_no_time_and_says_why(how: str, status: str, detail: str) -> None:
    (point,) = bench(LAYER, [3], [Broken(how)], rounds=1).points
    timing = point.timing(how)
    assert timing is not None and timing.status == status and detail in timing.detail
    assert timing.samples_us == () and timing.p50_us is None
    assert point.speedup(how) is None and point.speedup() is None
    assert point.p50_us() is not None, "the others' race goes on"


def test_wrong_arguments_are_refused_before_anything_is_built() -> None:
    with pytest.raises(InputError, match="tokens is 0"):
        bench(LAYER, [0], [])
    with pytest.raises(InputError, match="rounds is 0"):
        bench(LAYER, [1], [], rounds=0)
    with pytest.raises(UsageError, match="no token counts"):
        bench(LAYER, [], [])


def test_rounds_are_routed_afresh_and_repeatably() -> None:
    layer = dataclasses.replace(LAYER, experts=64, global_experts=64)
    first, again, other = (make_operands(layer, 8, seed).ids for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(row.unique().numel() == layer.top_k for row in first)


def test_work_counts_present_slots_and_each_active_expert_once() -> None:
    ids = torch.tensor([[0, 3], [3, -1], [9, 3]], dtype=torch.int32)
    active, flops, size = work(LAYER, ids)
    assert active == 2
    assert flops == 2 * 4 * 3 * 64 * 96
    assert size == 2 * (2 * 3 * 64 * 96) + 2 * (2 * 3 * 64 + 4 * 96)


def test_work_of_nothing_is_moving_the_rows() -> None:
    assert work(LAYER, torch.full((3, 2), -1)) == (0.0, 0.0, 2.0 * 2 * 3 * 64)


def test_what_sparse_configs_leave_out_is_not_counted() -> None:
    layer = dataclasses.replace(LAYER, intermediate=128, activation="drelu")
    ids, here = torch.tensor([[0, 1], [0, 2]]), cpu_environment()
    dense, sparse = MoeGemm(), SparseExperts()
    both = [(kernel.default(layer.up, 2, here), kernel.default(layer.down, 2, here)) for kernel in (dense, sparse)]
    assert left_to_do(layer, ids, both[0], here) == work(layer, ids)
    up_config, down_config = both[1]
    gates = up_config.with_params(layout="gate16")
    active, flops, size = left_to_do(layer, ids, (gates, down_config), here)
    neuron = 2 * layer.hidden
    # Of expert 0, with two rows, what is alive in one of them; of experts 1 and 2 what is alive in one.
    up, down = (1 - 0.5**2) + 2 * 0.5, (1 - 0.75**2) + 2 * 0.25
    saved = (6 - up - down) * layer.intermediate * neuron
    assert active == 3 and size == pytest.approx(work(layer, ids)[2] - saved)
    assert flops == pytest.approx(2 * 4 * layer.intermediate * layer.hidden * (1 + 0.5 + 0.25))
    # A screen reads codes and scales in place of the gates, and the gates that it leaves open.
    screened = left_to_do(layer, ids, (up_config.with_params(layout="screen128"), down_config), here)[2]
    left_open = open_share(0.5)
    gate = (1 - (1 - left_open) ** 2) + 2 * left_open - 3
    columns = -(-layer.intermediate // 64) * 64
    codes = 3 * columns * layer.hidden * (1 + 2 / 128)
    assert screened - size == pytest.approx(codes + gate * layer.intermediate * neuron)


def point_of(tokens: int, **p50_us: float) -> Point:
    config = TileConfig("some.kernel")
    names = {"ours": OURS, "default": DEFAULT, "target": "gemms alone"}
    timings = [
        Timing(name=names.get(name, name), samples_us=(time,), gemms_only=name == "target")
        for name, time in p50_us.items()
    ]
    return Point(
        layer=LAYER, tokens=tokens, policy="fastest", up=config, down=config, hit=True, active_experts=2.0, flops=4e6,
        bytes=1e6, dot=False, limit_us=50.0, bound="memory",
        timings=(*timings, Timing(name="absent", status="unavailable")),
    )  # fmt: skip


def result_of(*points: Point) -> BenchResult:
    return BenchResult(
        environment=cpu_environment(), threads=2, read_gb_s=20.0, fma_gflop_s=200.0, dot_bf16_gflop_s=200.0,
        points=points,
    )  # fmt: skip


def test_figures_of_a_point() -> None:
    point = point_of(4, ours=100.0, default=150.0, slow=400.0, quick=80.0, target=60.0)
    assert point.gflop_s() == 40.0 and point.gb_s() == 10.0 and point.share() == 0.5
    assert point.speedup() == 0.8, "the best peer: neither the default nor the target"
    assert point.speedup("slow") == 4.0 and point.speedup("gemms alone") == 0.6
    assert point.speedup("absent") is None and point.speedup("slow", "absent") == 4.0


def test_a_limit_that_was_exceeded_is_said_to_be_none() -> None:
    """20 GB/s make 1 MB take 50 µs: 40 µs cannot be, unless the reading of 20 GB/s was too low."""
    assert not point_of(1, ours=60.0).limit_exceeded
    point = point_of(1, ours=60.0, quick=40.0)
    assert point.limit_exceeded and point.to_json()["limit_exceeded"] is True
    assert result_of(point).share_summary() is None, "a share of what is no limit is not summed up"


def test_limits_are_this_machines_unless_given() -> None:
    measured = bench_layer(LAYER, [1], peers=(), rounds=1, budget_s=5, threads=1)
    assert 0.1 < measured.read_gb_s < 1e4 and measured.fma_gflop_s > 0.1
    (point,) = measured.points
    assert point.limit_us == pytest.approx(
        measured.peaks.limit_us(bytes_read=point.bytes, flops=point.flops, dot=point.dot)
    )
    assert bench(LAYER, [1], [], rounds=1).peaks == PEAKS


def test_better_readings_of_the_peaks_hold_for_every_point() -> None:
    low = result_of(point_of(1, ours=40.0))
    high = dataclasses.replace(result_of(point_of(8, ours=40.0)), read_gb_s=50.0, fma_gflop_s=100.0)
    merged = low.merged(high)
    assert (merged.read_gb_s, merged.fma_gflop_s) == (50.0, 200.0)
    assert [(point.limit_us, point.bound) for point in merged.points] == [(20.0, "memory")] * 2
    assert low.points[0].limit_exceeded and not any(point.limit_exceeded for point in merged.points)


def test_summaries_over_points() -> None:
    result = result_of(point_of(1, ours=100.0, slow=400.0)).merged(result_of(point_of(8, ours=100.0, slow=100.0)))
    summary = result.summary("slow")
    assert summary is not None and summary.points == 2
    assert summary.geometric_mean == pytest.approx(2.0) and summary.worst == 1.0
    assert summary.worst_point == "E4 H64 I96 top2 bf16, 8 tokens, fastest"
    assert result.summary("absent") is None
    share = result.share_summary()
    assert share is not None and share.geometric_mean == pytest.approx(0.5)

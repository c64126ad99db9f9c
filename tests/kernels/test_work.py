"""What kernels say that a launch does: bytes, operations and programs, counted by hand."""

import dataclasses

import pytest

from tests.cases import SMALL
from tilecast import environment as environments
from tilecast.autotune.prescreen import prescreen
from tilecast.engine.runtime import default_registry
from tilecast.environment import cpu_environment
from tilecast.kernels.cpu._codes import codes_of
from tilecast.kernels.cpu._screen import GROUP
from tilecast.kernels.cpu.isa import CROSS
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.onednn import KERNEL as ONEDNN
from tilecast.kernels.cpu.screen_work import open_share
from tilecast.kernels.cpu.sparse import SCREEN, SparseExperts
from tilecast.kernels.cpu.work import (
    INTEGER_PIPES,
    LIMB_ISSUE,
    LIVE_UP_EFFICIENCY,
    Shape,
    pair_cycles,
    row_blocks,
    step_cycles,
    word_cycles,
)
from tilecast.kernels.gpu.target import TARGETS, parse_target
from tilecast.kernels.gpu.work import column_tiles, efficiency, resident_programs
from tilecast.kernels.work import Predictable, Work
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig, weight_format

CPU = cpu_environment()
LAYER = ExpertLayer(hidden=2048, intermediate=512, experts=4, top_k=2)
FP32 = dataclasses.replace(LAYER, dtype="fp32")
BASE = {
    "mr": 6, "nv": 2, "unroll": 4, "layout": "panel16", "stage": 0, "prefetch": 0, "block_n": 64, "block_k": 0,
    "dot": "fma", "threads": 0,
}  # fmt: skip
H100 = parse_target("cuda:90")
GROUPED = {
    "block_m": 64, "block_n": 128, "block_k": 64, "group_m": 8, "num_warps": 4, "num_stages": 4, "swap": 0,
}  # fmt: skip


def llvm_work(gemm: ExpertGemm, counts: list[int], **changes: int | str) -> Work:
    return MoeGemm(CROSS["avx2"]).work(gemm, TileConfig("llvm.moe_gemm", {**BASE, **changes}), CPU, counts)


def gpu_work(gemm: ExpertGemm, counts: list[int], kernel: str = "triton.moe_gemm", **changes: int) -> Work:
    params = {**GROUPED, **changes}
    return default_registry()[kernel].work(gemm, TileConfig(kernel, params), H100.environment(), counts)  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows, most", [(1, 6), (6, 6), (7, 6), (16, 5), (17, 5), (256, 6)])
def test_rows_are_cut_as_the_kernel_cuts_them(rows: int, most: int) -> None:
    blocks = row_blocks(rows, most)
    by_kernel = [(i + 1) * rows // -(-rows // most) - i * rows // -(-rows // most) for i in range(-(-rows // most))]
    assert sorted(blocks.elements()) == sorted(by_kernel)


def test_cycles_of_register_tiles() -> None:
    def cycles(rows: int, nv: int, source: str = "f32") -> float:
        shape = Shape(source=source, dot=False, lanes=8, registers=16, prefetched=0.0, l2_chunk=False)
        return step_cycles(rows, nv, shape)

    assert cycles(6, 2) == 6  # twelve sums on two units
    assert cycles(1, 1) == 4  # one chain waits for itself
    assert cycles(6, 2, "pairs") > cycles(6, 2) + 1, "widening takes the registers of a sixth row"
    assert cycles(5, 2, "pairs") == 5
    assert cycles(3, 4) > 6, "four vectors held for three rows are a register too many"
    assert cycles(1, 8) == (8 + 1) / 2, "one row takes them from memory, two loads a cycle"


def test_active_experts_are_read_once_and_only_present_rows_are_computed() -> None:
    work = llvm_work(FP32.up, [3, 0, 0, 9])
    assert work.weight_bytes == FP32.up.weight_bytes(2)
    assert work.useful_flops == work.flops == FP32.up.flops(12)
    assert work.programs == 2 * FP32.up.n // 64
    assert work.largest == pytest.approx(max(3, 9) / 12 / (FP32.up.n // 64), rel=0.3)
    assert 0 < work.efficiency <= 1


def test_a_last_block_of_columns_is_as_narrow_as_it_is() -> None:
    layer = dataclasses.replace(LAYER, intermediate=192)
    narrow, wide = (llvm_work(layer.up, [16] * 4, block_n=block_n) for block_n in (64, 256))
    assert (narrow.programs, wide.programs) == (4 * 6, 4 * 2)
    assert wide.efficiency == pytest.approx(narrow.efficiency)
    assert wide.largest == pytest.approx(256 / 384 / 4)


def test_no_rows_are_no_work() -> None:
    for work in (llvm_work(FP32.up, [0, 0]), gpu_work(LAYER.up, [0]), ONEDNN.work(
        FP32.up, TileConfig("onednn.linear", {"prepack": "no", "row_block": 0}), CPU, [])
    ):  # fmt: skip
        assert (work.flops, work.memory_bytes, work.programs, work.padding) == (0, 0, 0, 0)


def test_a_block_of_rows_beyond_256_reads_weights_again_unless_the_cache_holds_them() -> None:
    small = dataclasses.replace(CPU, llc_bytes=1 << 20)
    config = TileConfig("llvm.moe_gemm", BASE)
    kernel = MoeGemm(CROSS["avx2"])
    once, twice = (kernel.work(FP32.up, config, small, [rows]).weight_bytes for rows in (256, 257))
    assert (once, twice) == (FP32.up.weight_bytes(1), FP32.up.weight_bytes(2))


def test_prefetching_hides_reading_and_staging_costs_cycles() -> None:
    plain, ahead = llvm_work(LAYER.up, [4] * 4, mr=5), llvm_work(LAYER.up, [4] * 4, mr=5, prefetch=4)
    assert ahead.overlap > plain.overlap
    staged = llvm_work(LAYER.up, [4] * 4, mr=5, stage=1)
    transposed = llvm_work(LAYER.up, [4] * 4, mr=5, stage=1, layout="plain")
    assert transposed.efficiency < staged.efficiency < plain.efficiency


def test_library_blocks_are_padded() -> None:
    def work(block: int) -> Work:
        config = TileConfig("onednn.linear", {"prepack": "no", "row_block": block})
        return ONEDNN.work(LAYER.up, config, CPU, [5, 0, 16])

    assert (work(0).padding, work(0).programs) == (0, 2)
    assert work(16).padding == 1 - 21 / 32
    assert work(4).programs == 2 + 4
    assert work(1).launches > work(4).launches


def test_tiles_of_a_gpu_are_whole_and_weights_stay_in_its_cache() -> None:
    work = gpu_work(LAYER.up, [65, 1, 0, 0])
    assert work.programs == 3 * column_tiles(LAYER.up, TileConfig("triton.moe_gemm", GROUPED))
    assert work.padding == 1 - 66 / (3 * 64)
    assert work.weight_bytes == LAYER.up.weight_bytes(2)
    large = ExpertLayer(hidden=8192, intermediate=8192, experts=2, top_k=1)
    assert gpu_work(large.up, [256, 0], group_m=1).weight_bytes == large.up.weight_bytes(4)
    assert gpu_work(large.up, [256, 0], group_m=4).weight_bytes == large.up.weight_bytes(1)


def test_split_k_makes_programs_and_traffic() -> None:
    whole = gpu_work(LAYER.up, [8] * 4, block_m=16)
    params = {name: value for name, value in {**GROUPED, "block_m": 16, "chunk": 512}.items() if name != "swap"}
    config = TileConfig("triton.moe_split_k", params)
    split = default_registry()["triton.moe_split_k"].work(LAYER.up, config, H100.environment(), [8] * 4)  # type: ignore[attr-defined]
    assert split.programs == 4 * whole.programs
    assert split.flops == whole.flops
    assert split.latency_steps == whole.latency_steps / 4
    assert split.out_bytes > whole.out_bytes
    assert split.launches == 2


def test_large_tiles_feed_the_matrix_unit_and_fill_the_sm() -> None:
    def config(**changes: int) -> TileConfig:
        return TileConfig("triton.moe_gemm", {**GROUPED, **changes})

    best = config(block_m=128, block_n=256, num_warps=8)
    assert efficiency(LAYER.up, best, H100) == 1
    assert efficiency(LAYER.up, config(block_n=64), H100) < 0.8
    assert efficiency(LAYER.up, config(block_m=16), H100) < 0.62
    assert resident_programs(LAYER.up, best, H100) == 1
    assert resident_programs(LAYER.up, config(block_m=16, block_n=32, num_stages=3), H100) > 4


def test_decode_walks_a_tokens_experts() -> None:
    kernel = default_registry()["triton.moe_decode"]
    params = {"block_m": 16, "block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4, "swap": 0}
    config = TileConfig(kernel.name, params)
    up, down = (kernel.work(gemm, config, H100.environment(), [1, 1, 0, 0]) for gemm in LAYER.gemms)  # type: ignore[attr-defined]
    assert up.programs == 2 * LAYER.up.n // 64
    assert down.programs == LAYER.hidden // 64
    assert down.latency_steps == 2 * LAYER.intermediate / 128 / 3
    assert down.weight_bytes == LAYER.down.weight_bytes(2)


@pytest.mark.parametrize("where", ["cpu", *(target.name for target in TARGETS)])
def test_every_candidate_says_what_it_does(where: str) -> None:
    registry = default_registry()
    environment = CPU if where == "cpu" else parse_target(where).environment()
    for layer in (dataclasses.replace(SMALL, hidden=512, intermediate=256), FP32):
        for gemm in layer.gemms:
            for candidate in prescreen(gemm, 8, environment, registry).candidates:
                kernel = registry[candidate.config.kernel]
                assert isinstance(kernel, Predictable)
                work = kernel.work(gemm, candidate.config, environment, [5, 0, 1, 10])
                assert work.flops >= work.useful_flops * 0.999, candidate.config.label
                assert work.weight_bytes >= gemm.weight_bytes(3), candidate.config.label
                assert 0 < work.efficiency <= 1, candidate.config.label
                assert 0 < work.memory_efficiency <= 1, candidate.config.label
                assert 0 <= work.largest <= 1 and work.resident >= 1, candidate.config.label


def test_a_better_description_leaves_decisions_valid(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "kernels" / "cpu"
    folder.mkdir(parents=True)
    (folder / "launched.py").write_text("1")
    monkeypatch.setattr(environments, "PACKAGE", tmp_path)
    before = environments.kernel_source_digest.__wrapped__("cpu")
    for path in (folder, folder.parent):
        (path / "work.py").write_text("2")
    assert environments.kernel_source_digest.__wrapped__("cpu") == before
    (folder / "launched.py").write_text("3")
    assert environments.kernel_source_digest.__wrapped__("cpu") != before


@pytest.mark.parametrize("dead", [0.0, 0.9, 1.0])
def test_dead_neurons_are_not_read(dead: float) -> None:
    kernel, dense = SparseExperts(CROSS["avx2"]), MoeGemm(CROSS["avx2"])
    layer = dataclasses.replace(LAYER, activation="relu")
    for gemm in layer.gemms:
        config, like = kernel.default(gemm, 64, CPU), dense.default(gemm, 1, CPU)
        gates = 0.5 if gemm.name == "up" else 0.0
        for counts in ([1, 0, 1, 0], [3, 0, 2, 0]):
            whole = dense.work(gemm, like, CPU, counts)
            found = kernel.work(gemm, config, CPU, counts, dead)
            alive = sum(1 - dead**count for count in counts if count) / 2
            assert found.weight_bytes == pytest.approx(whole.weight_bytes * (gates + (1 - gates) * alive))
            assert found.useful_flops == pytest.approx(whole.useful_flops * (gates + (1 - gates) * (1 - dead)))
            assert 0 < found.efficiency <= 1 and 0 < found.memory_efficiency <= 1
    assert kernel.work(layer.up, kernel.default(layer.up, 1, CPU), CPU, [0, 0]).flops == 0


@pytest.mark.parametrize("dead", [0.0, 0.9, 1.0])
def test_of_screened_gates_codes_are_read_and_rows_that_stay_open(dead: float) -> None:
    kernel = SparseExperts(CROSS["avx2"])
    gemm = dataclasses.replace(LAYER, activation="relu").up
    config = kernel.default(gemm, 1, CPU)
    assert config["layout"] == SCREEN
    gates, ups = (gemm.weight_bytes(2) / 2,) * 2
    left_open = open_share(dead)
    assert left_open == pytest.approx({0.0: 1.0, 0.9: 0.2, 1.0: 0.0}[dead], abs=0.01)
    found = kernel.work(gemm, config, CPU, [1, 0, 1, 0], dead)
    wanted = gates * ((1 + 2 / GROUP) / 2 + left_open) + ups * (1 - dead)
    assert found.weight_bytes == pytest.approx(wanted)
    assert kernel.work(gemm, config, CPU, [3, 0, 1, 0], dead).weight_bytes >= found.weight_bytes
    assert kernel.work(gemm, config, CPU, [0, 0], dead).flops == 0


def test_an_open_gate_row_costs_what_a_live_row_costs() -> None:
    gemm = dataclasses.replace(LAYER, activation="relu").up
    kernel = SparseExperts(CROSS["avx2"])
    config = kernel.default(gemm, 1, CPU)
    cycles, flops = {}, {}
    for dead in (0.0, 0.9, 1.0):
        done = kernel.work(gemm, config, CPU, [1, 0, 1, 0], dead)
        cycles[dead], flops[dead] = done.flops / done.efficiency, done.flops
    # With all dead, codes are screened and nothing else is done.
    rates = [(flops[dead] - flops[1.0]) / (cycles[dead] - cycles[1.0]) for dead in (0.0, 0.9)]
    assert rates == pytest.approx([LIVE_UP_EFFICIENCY] * 2)


def test_products_of_4_bit_codes_are_counted() -> None:
    codes = codes_of(weight_format("awq_g128"), chain=256, scale="fp16", panel=16, dtype="bf16", byte_pairs=True)
    a_vector = "two masks, a shift, six products and additions a vector, and two loads; six of the row"
    assert word_cycles(1, 2, codes, 0.0) == (2 * 3 + 24 + 4 + 6) / LIMB_ISSUE, a_vector
    assert word_cycles(4, 1, codes, 0.0) > 2 * word_cycles(1, 1, codes, 0.0)
    assert word_cycles(1, 2, dataclasses.replace(codes, byte_pairs=False), 0.0) > word_cycles(1, 2, codes, 0.0)


def test_products_of_pairs_are_counted() -> None:
    form = weight_format("int4_g128")
    codes = codes_of(form, chain=256, scale="fp16", panel=16, dtype="bf16", byte_pairs=True, short=True)
    assert pair_cycles(6, 2, codes, True, 0.0) == 24 / INTEGER_PIPES, "a product and an addition for each sum"
    assert pair_cycles(1, 8, codes, False, 0.0) == (16 + 14) / INTEGER_PIPES, "seven shifts and masks a word of 8 codes"
    dense = dataclasses.replace(LAYER, dtype="bf16")
    layer = dataclasses.replace(dense, weight_format="int4_g128")
    kernel = MoeGemm(CROSS["avx2"])
    whole, few = ([64] * 4, [1] * 4)
    for gemm, same in zip(layer.gemms, dense.gemms, strict=True):
        config = kernel.default(gemm, 1024, CPU)
        assert config["dot"] == "int16" and config["stage"] == 1
        fast = kernel.work(gemm, config, CPU, whole)
        assert fast.efficiency > 1 > kernel.work(same, kernel.default(same, 1024, CPU), CPU, whole).efficiency
        unstaged = config.with_params(stage=0, unroll=1)
        assert kernel.work(gemm, unstaged, CPU, whole).efficiency < fast.efficiency
        assert kernel.work(gemm, unstaged, CPU, few).efficiency > kernel.work(gemm, config, CPU, few).efficiency

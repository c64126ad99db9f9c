"""The generator on instruction sets that this machine may lack, its object cache, and sorting in compiled code."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cases import SMALL, assert_both_gemms, operands
from tilecast.environment import cpu_environment
from tilecast.kernels import routing
from tilecast.kernels.cpu import jit
from tilecast.kernels.cpu._variant import Variant
from tilecast.kernels.cpu.columns import padded_columns
from tilecast.kernels.cpu.isa import CROSS, Isa, host_isa
from tilecast.kernels.cpu.layouts import column_order, pack_bias
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.peak import measure_peaks
from tilecast.kernels.cpu.sorting import sort_slots
from tilecast.kernels.cpu.tiles import tile_shapes
from tilecast.problem import ExpertLayer
from tilecast.settings import Settings

HERE = cpu_environment()


def variant(isa: Isa, **changes: object) -> Variant:
    base = Variant(
        gemm="up", dtype="bf16", out="bf16", activation="silu", gated=True, bias=False, mr=4, nv=2, unroll=2,
        panel=2 * isa.lanes, max_nv=2, stage=False, prefetch=1, dot="", lanes=isa.lanes, fma=isa.fma,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("avx512_bf16", {"dot": "native"}, "vdpbf16ps"),
        ("avx512_bf16", {"dot": "native", "stage": True, "panel": 0}, "vdpbf16ps"),
        ("avx512", {}, "vfmadd231ps"),
        ("avx512", {"dtype": "fp16", "out": "fp16"}, "vcvtph2ps"),
        ("avx2", {}, "vfmadd231ps"),
        ("avx2", {"dtype": "fp16", "out": "fp16"}, "vcvtph2ps"),
        ("sse2", {}, "mulps"),
        ("neon", {}, "fmla"),
    ],
)
def test_compiles_for_cpus_that_are_not_here(name: str, changes: dict[str, object], wanted: str) -> None:
    assembly = jit.compile_assembly(variant(CROSS[name], **changes), CROSS[name])
    assert wanted in assembly
    if name == "sse2":
        assert "fma" not in assembly, "a call into the C library for each product"


@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16"])
def test_inner_loop_of_the_default_tile_keeps_its_sums_in_registers(name: str) -> None:
    isa = CROSS[name]
    mr, nv = tile_shapes(isa, 256, 64, "bf16")[0]
    dot = "native" if isa.dot_bf16 else ""
    assembly = jit.compile_assembly(variant(isa, mr=mr, nv=nv, max_nv=nv, unroll=4, dot=dot), isa)
    body = assembly[assembly.index(f"micro_{mr}x{nv}:") :].split(".Lfunc_end")[0]
    loops = [part for part in body.split("\n.LBB") if part.count("fmadd") + part.count("dpbf16") >= 4 * mr * nv]
    assert loops, "no unrolled loop was found"
    vector_spills = [line for part in loops for line in part.splitlines() if "mm" in line and "(%rsp)" in line]
    assert not vector_spills


@pytest.mark.parametrize("lanes", [4, pytest.param(16, marks=pytest.mark.long)])
@pytest.mark.parametrize("dot", ["", "emulated"])
def test_other_lane_counts_give_the_same_numbers(lanes: int, dot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM splits or joins vectors that the CPU lacks, so the code of wider and narrower CPUs runs here too."""
    here = host_isa()
    registers = 32 if lanes == 16 else 16
    isa = dataclasses.replace(here, name=f"lanes{lanes}", lanes=lanes, registers=registers, dot_bf16=bool(dot))
    kernel = MoeGemm(isa)
    layer = dataclasses.replace(SMALL, dtype="bf16", hidden=600, intermediate=70, bias=True)
    given = operands(layer, 21, "absent")
    if dot:
        original = Variant.__init__

        def emulate(self: Variant, **fields: object) -> None:
            original(self, **{**fields, "dot": dot if fields["dot"] else ""})  # type: ignore[arg-type]

        monkeypatch.setattr(Variant, "__init__", emulate)
    for layout in ("panel16", "panel32", "plain"):
        like = kernel.default(layer.up, 21, HERE).with_params(layout=layout)
        config = kernel.default(layer.up, 21, HERE, like=like)
        if kernel.invalid(layer.up, config, HERE) is None:
            assert config["dot"] == ("bf16" if dot else "fma")
            assert_both_gemms(kernel, config, given)


@pytest.mark.skipif(not host_isa().dot_bf16, reason="this CPU has no bf16 dot product")
def test_the_dot_product_of_this_cpu_is_exact_enough() -> None:
    kernel = MoeGemm()
    layer = dataclasses.replace(SMALL, dtype="bf16", hidden=600, intermediate=70)
    assert_both_gemms(kernel, kernel.default(layer.up, 21, HERE), operands(layer, 21))


def test_gate_and_up_columns_alternate_by_vectors() -> None:
    layer = ExpertLayer(hidden=8, intermediate=10, experts=1, top_k=1)
    order = column_order(layer.up, 4)
    assert order[:8].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert order[16:24].tolist() == [8, 9, -1, -1, 18, 19, -1, -1]
    assert sorted(row for row in order.tolist() if row >= 0) == list(range(20))
    assert len(order) == padded_columns(layer.up, 4) == 64
    bias = pack_bias(torch.arange(20.0)[None], layer.up, 4)
    assert bias[0, 16:24].tolist() == [8, 9, 0, 0, 18, 19, 0, 0]


# The object cache --------------------------------------------------------------------------


def objects(folder: Path) -> list[Path]:
    return sorted((folder / "kernels").glob("*.o"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILECAST_CACHE_DIR", str(tmp_path))
    assert Settings.from_environment().cache_dir == tmp_path
    return tmp_path


def fresh_variant(mr: int) -> Variant:
    return variant(host_isa(), mr=mr, nv=1, max_nv=1, unroll=1, panel=16)


def build(v: Variant) -> int:
    return jit.load_variant.__wrapped__(v)


def test_objects_are_kept_and_read_again(cache: Path) -> None:
    assert build(fresh_variant(1))
    (first,) = objects(cache)
    before = first.stat().st_mtime_ns
    assert build(fresh_variant(1))
    assert objects(cache) == [first] and first.stat().st_mtime_ns == before
    assert build(fresh_variant(2))
    assert len(objects(cache)) == 2


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_object_is_made_again(cache: Path, damage: bytes | None) -> None:
    assert build(fresh_variant(1))
    (path,) = objects(cache)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]) if damage is None else damage)
    assert build(fresh_variant(1))
    assert len(path.read_bytes()) == len(good)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TILECAST_CACHE_DIR", str(blocked))
    assert build(fresh_variant(1))


def test_another_process_gives_the_same_bits(tmp_path: Path) -> None:
    code = (
        "import hashlib, torch\n"
        "from tests.cases import ODD, operands, run_up\n"
        "from tilecast.environment import cpu_environment\n"
        "from tilecast.kernels.cpu.moe_gemm import MoeGemm\n"
        "k = MoeGemm(); given = operands(ODD, 13)\n"
        "out = run_up(k, k.default(ODD.up, 13, cpu_environment()), given)\n"
        "print(hashlib.sha256(out.view(torch.int16).numpy().tobytes()).hexdigest())\n"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=120)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65


# Sorting and peaks ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 8), (1, 2, 8), (13, 2, 1), (100, 8, 128), (700, 3, 5)])
def test_compiled_sort_equals_torchs(dtype: torch.dtype, tokens: int, top_k: int, experts: int) -> None:
    ids = torch.randint(-2, experts + 3, (tokens, top_k), generator=torch.Generator().manual_seed(5)).to(dtype)
    mine, expected = sort_slots(ids, experts), routing.sort_slots(ids, experts)
    present = int(expected.offsets[-1])
    assert torch.equal(mine.offsets, expected.offsets)
    assert torch.equal(mine.slots[:present], expected.slots[:present])
    outside = (ids < 0) | (ids >= experts)
    assert torch.equal(mine.ids, ids.to(torch.int32).masked_fill(outside, -1))


def test_compiled_sort_does_not_wrap_large_ids() -> None:
    layout = sort_slots(torch.tensor([[2**40, 2**32, 1]]), 4)
    assert layout.ids.tolist() == [[-1, -1, 1]] and int(layout.offsets[-1]) == 1


def test_peaks_are_measured() -> None:
    peaks = measure_peaks(1)
    assert peaks.threads == 1 and peaks.read_gb_s > 0.1 and peaks.fma_gflop_s > 0.1
    assert peaks.limit_us(bytes_read=peaks.read_gb_s * 1e9, flops=0) == pytest.approx(1e6)
    assert peaks.limit_us(bytes_read=0, flops=2 * peaks.fma_gflop_s * 1e9) == pytest.approx(2e6)

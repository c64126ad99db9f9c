"""Static analysis: what the compiler makes of builds, and what is concluded from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tilecast.canonical import Json
from tilecast.errors import InputError
from tilecast.kernels import static
from tilecast.kernels.assembly import machine_code, ptxas_usage, read_gcn, read_ptx
from tilecast.kernels.compilers import Compilers
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.target import Target, parse_target
from tilecast.kernels.static import Report, analyse, duplicates, verdict
from tilecast.settings import child_environment

pytest.importorskip("triton", reason="Triton is not installed")
MODULE = "tests.kernels.gpu.static_kernels"
H100 = parse_target("cuda:90")
GOOD = Report(
    build="b", target="cuda:90", registers=168, threads=128, shared_bytes=1 << 16,
    instructions={"wgmma m64n64k16 f32.bf16.bf16": 4}, machine_code="m",
)  # fmt: skip


def multiply(m: int = 64, n: int = 64, k: int = 64, *, stages: int = 3, warps: int = 4, scaled: bool = False) -> Build:
    return Build(
        module=MODULE, function="multiply", signature=(("a", "*bf16"), ("b", "*bf16"), ("c", "*bf16")),
        constants=(("K", 4096), ("BLOCK_M", m), ("BLOCK_N", n), ("BLOCK_K", k), ("SCALED", scaled)),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def copy(function: str = "copy", unused: int = 0) -> Build:
    return Build(
        module=MODULE, function=function, signature=(("source", "*bf16"), ("target", "*bf16"), ("count", "i32")),
        constants=(("BLOCK", 256), ("UNUSED", unused)), num_warps=4, num_stages=1,
    )  # fmt: skip


BROKEN = Build(
    module=MODULE, function="broken", signature=(("source", "*bf16"),), constants=(("BLOCK", 64),),
    num_warps=4, num_stages=1,
)  # fmt: skip
HOPPER = {
    "plain": multiply(),
    "wide": multiply(128, 128, warps=8),
    "scaled": multiply(scaled=True),
    "spills": multiply(64, 256, stages=2, scaled=True),
    "starved": replace(multiply(stages=2), options=(("maxnreg", 40),)),
    "large": multiply(stages=15),
    "copy": copy(),
    "copy again": copy("copy_again"),
    "copy, another constant": copy(unused=1),
    "broken": BROKEN,
}


@pytest.fixture(scope="module")
def hopper() -> dict[str, Report]:
    """Reports for sm_90; `plain` is asked for twice."""
    steps: list[tuple[int, int]] = []
    found = analyse(
        [*HOPPER.values(), HOPPER["plain"]], H100, workers=1, progress=lambda done, total: steps.append((done, total))
    )
    assert found[-1] is found[0], "equal builds are compiled once"
    assert steps == [(done, len(HOPPER)) for done in range(len(HOPPER) + 1)]
    return dict(zip(HOPPER, found, strict=False))


def test_a_hopper_kernel_is_described(hopper: dict[str, Report]) -> None:
    wide = hopper["wide"]
    assert wide.mma_kinds == ("wgmma",)
    assert list(wide.instructions) == ["wgmma m64n128k16 f32.bf16.bf16"]
    assert (wide.mma_k, wide.threads, wide.error) == (16, 256, "")
    assert wide.shared_bytes == 3 * 2 * 128 * 64 * 2
    assert wide.loop_copies == {"cp.async": 8}, "256 threads copy 2 × 16 KiB a step, 16 bytes each"
    assert 64 <= wide.registers <= 255
    assert wide.code_bytes > 1000
    assert wide.compile_seconds > 0
    assert verdict(wide, H100, tensor_cores=True) is None


def test_a_product_that_is_scaled_rounds_once_more_a_step(hopper: dict[str, Report]) -> None:
    assert hopper["plain"].loop_float_ops == 0
    # Without fusion a multiplication and an addition for each of 64 × 64 / 128 values of a thread.
    assert hopper["scaled"].loop_float_ops == 2 * 64 * 64 // 128


def test_a_kernel_that_spills_is_refused(hopper: dict[str, Report]) -> None:
    spills = hopper["spills"]
    assert spills.registers == 255
    assert spills.spill_bytes > static.MAX_SPILL_BYTES
    reason = verdict(spills, H100, tensor_cores=True)
    assert reason is not None
    assert "spills" in reason
    assert verdict(spills, H100, tensor_cores=True, max_spill_bytes=1 << 20) is None


def test_too_much_shared_memory_is_refused_with_both_numbers(hopper: dict[str, Report]) -> None:
    assert hopper["large"].shared_bytes == 15 * 2 * 64 * 64 * 2
    reason = verdict(hopper["large"], H100, tensor_cores=True)
    assert reason is not None
    assert str(15 * 2 * 64 * 64 * 2) in reason
    assert str(227 * 1024) in reason


def test_a_gemm_without_tensor_cores_is_refused(hopper: dict[str, Report]) -> None:
    assert hopper["copy"].instructions == {}
    assert hopper["copy"].mma_k == 0
    reason = verdict(hopper["copy"], H100, tensor_cores=True)
    assert reason is not None
    assert "wgmma or mma.sync" in reason
    assert verdict(hopper["copy"], H100, tensor_cores=False) is None


def test_a_kernel_that_does_not_compile_is_a_report(hopper: dict[str, Report]) -> None:
    assert "no_such_name" in hopper["broken"].error
    assert "\n" not in hopper["broken"].error
    assert "no_such_name" in str(verdict(hopper["broken"], H100, tensor_cores=False))


def test_what_ptxas_refuses_is_a_report_with_its_words(hopper: dict[str, Report]) -> None:
    assert "ptxas" in hopper["starved"].error
    assert "register" in hopper["starved"].error


def test_equal_code_under_other_names_is_found(hopper: dict[str, Report]) -> None:
    names = list(HOPPER)
    groups = duplicates(hopper.values())
    assert [[names[index] for index in group] for group in groups] == [["copy", "copy again", "copy, another constant"]]


def test_duplicates_are_equal_launches() -> None:
    other_memory, failed = replace(GOOD, shared_bytes=1), replace(GOOD, error="no")
    assert duplicates([GOOD, other_memory, failed, GOOD, failed]) == ((0, 3),)
    assert duplicates([GOOD, replace(GOOD, target="cuda:80")]) == ()


def test_registers_of_all_threads_must_fit() -> None:
    reason = verdict(replace(GOOD, registers=129, threads=512), H100, tensor_cores=True)
    assert reason is not None
    assert "69632" in reason
    assert "65536" in reason
    assert verdict(replace(GOOD, registers=128, threads=512), H100, tensor_cores=True) is None
    assert verdict(replace(GOOD, registers=512, threads=256), parse_target("gfx942"), tensor_cores=True) is None
    assert verdict(replace(GOOD, registers=512, threads=512), parse_target("gfx942"), tensor_cores=True) is not None


def test_tensor_memory_must_fit() -> None:
    blackwell = parse_target("cuda:100")
    assert verdict(replace(GOOD, tensor_columns=512), blackwell, tensor_cores=True) is None
    assert "1024" in str(verdict(replace(GOOD, tensor_columns=1024), blackwell, tensor_cores=True))


KINDS = {
    "cuda:80": ("mma.sync", 16), "cuda:100": ("tcgen05.mma", 16), "cuda:120": ("mma.sync", 16),
    "hip:gfx942": ("mfma", 16), "hip:gfx950": ("mfma", 32),
}  # fmt: skip


def test_every_generation_uses_its_own_instruction_and_a_death_is_a_report(tmp_path: Path) -> None:
    targets = [parse_target(name) for name in KINDS]
    jobs: list[Json] = [{"build": _for(target).to_json(), "target": target.name} for target in targets]
    killer = replace(copy(), module="tests.kernels.gpu.static_killer")
    jobs.insert(1, {"build": killer.to_json(), "target": "cuda:90"})
    with Compilers(1) as compilers:
        found = {index: (facts, kept) for index, facts, kept in compilers.run(jobs)}
        folder = compilers._folder
        assert folder.exists()
    assert not folder.exists(), "the compilers left files behind"
    facts, kept = found.pop(1)
    assert "signal 9" in facts["error"]
    assert not kept
    reports = [Report(build="b", target="t", **facts) for _, (facts, _) in sorted(found.items())]
    for target, report in zip(targets, reports, strict=True):
        assert report.error == "", target.name
        assert (*report.mma_kinds, report.mma_k) == KINDS[target.name], target.name
        assert verdict(report, target, tensor_cores=True) is None, target.name
        assert report.threads == 4 * target.warp_size
        assert report.loop_float_ops == 0


def _for(target: Target) -> Build:
    # 16-bit tiles of 16 columns, as the kernels ask for on AMD.
    options = (("matrix_instr_nonkdim", 16), ("kpack", 1)) if target.kind == "hip" else ()
    return replace(multiply(stages=2), options=options)


class Counting:
    """Stands where the compiling processes would, and counts: answers every job with the same facts."""

    compiled = 0
    kept = True

    def __init__(self, count: int) -> None:
        assert count >= 1

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, jobs: Sequence[Json]) -> Iterator[tuple[int, dict[str, Any], bool]]:
        for index in reversed(range(len(jobs))):
            type(self).compiled += 1
            yield index, {"registers": 40 + index, "instructions": {"wgmma m64n8k16 f32": 1}}, self.kept


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    kind = type("_Counting", (Counting,), {"compiled": 0})
    monkeypatch.setattr(static, "Compilers", kind)
    return kind


def test_what_was_compiled_is_not_compiled_again(counting: type[Counting], tmp_path: Path) -> None:
    builds = [multiply(), copy()]
    first = analyse(builds, H100, cache=tmp_path)
    assert [report.registers for report in first] == [40, 41]
    assert counting.compiled == 2
    assert analyse(builds, H100, cache=tmp_path) == first
    assert counting.compiled == 2
    analyse(builds, parse_target("cuda:80"), cache=tmp_path)
    assert counting.compiled == 4, "another target is another report"
    analyse([multiply(stages=4)], H100, cache=tmp_path)
    assert counting.compiled == 5


@pytest.mark.parametrize("damage", ["", "{", "[" * 100000, "truncated", "number", "key", "\udcff"])
def test_a_damaged_report_is_compiled_again(counting: type[Counting], tmp_path: Path, damage: str) -> None:
    first = analyse([copy()], H100, cache=tmp_path)
    (path,) = tmp_path.glob("*/*.json")
    text = path.read_text()
    changed = {
        "truncated": text[: len(text) // 2],
        "number": text.replace('"registers": 40', '"registers": 41'),
        "key": text.replace('"target": "cuda:90"', '"target": "cuda:80"', 1),
    }.get(damage, damage)
    assert changed != text
    path.write_bytes(changed.encode("utf-8", "surrogateescape"))
    assert analyse([copy()], H100, cache=tmp_path) == first
    assert counting.compiled == 2
    assert analyse([copy()], H100, cache=tmp_path) == first
    assert counting.compiled == 2


def test_a_death_is_not_kept(counting: type[Counting], tmp_path: Path) -> None:
    counting.kept = False
    analyse([copy()], H100, cache=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_another_triton_or_kernel_source_is_another_report(
    counting: type[Counting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analyse([copy()], H100, cache=tmp_path)
    monkeypatch.setattr(static, "gpu_toolchain", lambda: {"triton": "99.0"})
    analyse([copy()], H100, cache=tmp_path)
    assert counting.compiled == 2
    monkeypatch.setattr(static, "_source_digest", lambda module: "another")
    analyse([copy()], H100, cache=tmp_path)
    assert counting.compiled == 3


def test_a_folder_that_cannot_be_written_costs_only_time(counting: type[Counting], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert len(analyse([copy()], H100, cache=tmp_path / "file")) == 1


def test_reports_survive_json() -> None:
    assert Report.from_json(json.loads(json.dumps(GOOD.to_json()))) == GOOD
    for field, value in (("registers", "many"), ("instructions", {"wgmma": 1.5}), ("spill_bytes", None)):
        with pytest.raises(InputError, match=field):
            Report.from_json({**GOOD.to_json(), field: value})


def test_nothing_to_compile_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(static, "Compilers")
    assert analyse([], H100) == []


def test_the_innermost_loop_with_products_counts() -> None:
    text = """
        add.rn.f32 %f1, %f2, %f3;
    $outer: // =>This Loop Header
        mul.rn.bf16x2 %r1, %r2, %r3;
    $inner:
        @%p1 bra $skip;
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r1, %r2}], [%r3];
        cp.async.wait_group 2;
    $skip:
        fma.rn.ftz.f32 %f1, %f2, %f3, %f4; add.s32 %r1, %r2, %r3; // add.f32
        mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 { %f1 }, { %r1 }, { %r2 }, { %f2 };
        @%p2 bra.uni $inner;
    $wait:
        bra $wait;
        @%p3 bra $outer;
    """
    found = read_ptx(text)
    assert found.mma == {"mma.sync m16n8k32 f32.e4m3.e4m3.f32": 1}
    assert (found.mma_k, found.float_ops) == (32, 1)
    assert found.copies == {"cp.async": 1, "cp.async.bulk.tensor": 1}


def test_amd_loops_may_begin_in_their_middle() -> None:
    text = """
        v_add_f32 v1, v2, v3
        s_branch .LBB0_3
    .LBB0_2: ; in Loop: Header=BB0_3
        v_mfma_f32_16x16x32_bf16 a[0:3], v[0:3], v[4:7], a[0:3]
        v_pk_mul_f32 v[0:1], v[2:3], v[4:5] ; v_add_f32
    .LBB0_3:
        buffer_load_dwordx4 v1, s[0:3], 0 offen lds
        v_add_u32 v1, v2, v3
        s_cbranch_execz .LBB0_2
        v_exp_f32_e32 v1, v2
        s_branch .LBB0_2
    """
    found = read_gcn(text)
    assert found.mma == {"mfma m16n16k32 f32.bf16": 1}
    assert (found.mma_k, found.float_ops, found.copies) == (32, 2, {"load_lds": 1})


def test_what_is_no_code_is_refused() -> None:
    with pytest.raises(ValueError, match="ELF"):
        machine_code(b"MZ")
    with pytest.raises(ValueError, match="section table"):
        machine_code(b"\x7fELF\x02\x01" + b"\0" * 40)
    with pytest.raises(ValueError, match="ptxas"):
        ptxas_usage("ptxas info : 0 bytes gmem")


COMPILE = """
import contextlib, io, sys, triton
from triton.backends.compiler import GPUTarget
from tests.kernels.gpu.test_static import multiply
from tilecast.kernels._compile import source_of
build, log = multiply(stages=2), io.StringIO()
with contextlib.redirect_stdout(log):
    made = triton.compile(source_of(build), target=GPUTarget("cuda", 90, 32), options=build.triton_options)
open(sys.argv[1], "wb").write(made.asm["cubin"])
print(triton.knobs.nvidia.cuobjdump.path)
print(log.getvalue())
"""


def test_registers_and_code_agree_with_nvidias_own_tools(tmp_path: Path) -> None:
    cubin, root = tmp_path / "kernel.cubin", Path(__file__).parents[3]
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TRITON_DUMP_PTXAS_LOG": "1", "PYTHONPATH": str(root)}
    made = subprocess.run(
        [sys.executable, "-c", COMPILE, str(cubin)],
        env=child_environment(variables, without=("TRITON_INTERPRET",)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    tool, _, log = made.stdout.partition("\n")
    usage = ptxas_usage(log)
    seen = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert f"REG:{usage['registers']} STACK:{usage['stack_bytes']} " in seen
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code_bytes, _ = machine_code(cubin.read_bytes())
    addresses = [int(found, 16) for found in re.findall(r"/\*([0-9a-f]{4,5})\*/ ", sass)]
    assert code_bytes == max(addresses) + 16

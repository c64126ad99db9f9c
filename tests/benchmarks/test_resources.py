"""The published table of compiled resources: from the files, about the defaults that are, and nothing that spills."""

from __future__ import annotations

import pytest

from benchmarks import resources
from tilecast.kernels.gpu.defaults import default_config
from tilecast.kernels.gpu.target import TARGETS, Target, parse_target
from tilecast.kernels.static import MAX_SPILL_BYTES, Report


def test_page_holds_the_tables_of_the_files() -> None:
    page = resources.PAGE.read_text()
    assert resources.with_tables(page, resources.tables(resources.read_results())) == page


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_files_are_about_today_s_defaults_which_compile_without_spills(target: Target) -> None:
    rows = resources.read_results()[f"{target.kind}-{target.arch}"]["rows"]
    defaults = [
        default_config(gemm, tokens, target)
        for layer in resources.layers().values()
        for tokens in resources.TOKENS
        for gemm in layer.gemms
    ]
    assert [row["config"] for row in rows] == [{"kernel": c.kernel, **dict(c.params)} for c in defaults]
    for row in rows:
        assert not row["error"] and row["spill_bytes"] <= MAX_SPILL_BYTES and row["instructions"], row


def test_expected_tiles_of_certain_routing() -> None:
    layer = next(iter(resources.layers().values()))
    one = resources.expected_tiles(layer, 1, 16)
    assert one == pytest.approx((2.0, 2.0))
    many, active = resources.expected_tiles(layer, 1000, 1)
    assert many == pytest.approx(2000.0) and active == pytest.approx(8.0)


def test_shared_memory_bounds_small_tiles() -> None:
    def bound(block_m: int, block_n: int, width: int) -> float | None:
        report = Report(build="", target="cuda:90", instructions={f"wgmma m64n{width}k16 f32.bf16.bf16": 4})
        return resources.tensor_core_bound(block_m, block_n, report)

    assert [bound(64, 128, 128), bound(128, 128, 128), bound(128, 256, 256)] == [0.67, 0.8, 1.0]
    assert resources.tensor_core_bound(16, 64, Report(build="", target="cuda:90")) is None


def test_an_sm_holds_what_its_scarcest_resource_allows() -> None:
    hopper = parse_target("cuda:90")

    def resident(registers: int, shared: int, threads: int) -> int:
        report = Report(build="", target="cuda:90", registers=registers, shared_bytes=shared, threads=threads)
        return resources.resident_programs(report, hopper)

    assert [resident(172, 1 << 10, 256), resident(32, 72 << 10, 128), resident(16, 0, 128)] == [1, 3, 16]

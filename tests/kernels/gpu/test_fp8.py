"""fp8 weights on fp8 tensor cores: rows are rounded as the oracle rounds them, one row and 128 of K at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests.cases import Operands, error, operands, run_down, run_up
from tests.tensor_core import tensor_core
from tilecast.kernels import registry
from tilecast.kernels.gpu.fp8 import Fp8, rounded_block, rounding_build
from tilecast.kernels.gpu.grouped import Grouped
from tilecast.kernels.gpu.target import TARGETS, Target, parse_target
from tilecast.kernels.reference import reference_down, reference_up, rounded_rows
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import FP8_ROWS, numerics_class
from tilecast.problem import ExpertLayer, TileConfig

triton = pytest.importorskip("triton")

KERNEL = Fp8()
SWAPPED = TileConfig(
    Fp8.name,
    {"block_m": 16, "block_n": 64, "block_k": 128, "group_m": 4, "num_warps": 4, "num_stages": 3, "swap": 1},
)
PLAIN = SWAPPED.with_params(block_m=64, swap=0)
HERE = parse_target("cuda:90").environment()
LAYER = ExpertLayer(hidden=200, intermediate=131, experts=3, top_k=2, weight_format="fp8_block128", bias=True)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter"
)


@pytest.fixture(autouse=True)
def model() -> Iterator[None]:
    with tensor_core(16, 25):
        yield


def errors(config: TileConfig, given: Operands, activations: str) -> list[float]:
    """Errors of both GEMMs against the oracle on rows as they are, or rounded."""
    present = given.route.slots[: int(given.route.offsets[-1])].long()
    up, down = run_up(KERNEL, config, given), run_down(KERNEL, config, given)
    first = reference_up(given.layer, given.hidden, given.up.data, given.route, given.up.bias, activations=activations)
    second = reference_down(
        given.layer, given.intermediate, given.down.data, given.route, given.topk_weights, given.down.bias,
        activations=activations,
    )  # fmt: skip
    return [error(up[present], first[present]), error(down, second)]


@interpreted
@pytest.mark.parametrize("name", KERNEL.formats)
@pytest.mark.parametrize("config", [PLAIN, SWAPPED], ids=["plain", "swapped"])
def test_matches_the_oracle_that_rounds_rows(name: str, config: TileConfig) -> None:
    layer = dataclasses.replace(LAYER, weight_format=name, dtype="fp16" if name == "fp8_channel" else "bf16")
    given = operands(layer, 3, "uniform")
    for gemm in layer.gemms:
        assert registry.invalid(gemm, config, HERE) is None
    # Sums within the unit keep 13 fraction bits, the result 8 (bf16) or 11.
    assert max(errors(config, given, FP8_ROWS)) < 2**-8
    # Rounding a row to e4m3 moves elements by up to 2**-4, and the result by a few percent.
    assert all(2**-7 < each < 2**-4 for each in errors(config, given, ""))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [128, 200, 2304])
def test_rows_are_rounded_as_the_oracle_rounds_them(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-3], [1.0], [300.0]])
    rows[1, :128], rows[2, 7] = 0, 3e4
    rows = rows.to(dtype)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    groups = -(-width // 128)
    build = rounding_build(dataclasses.replace(LAYER, hidden=width, dtype=name).up)
    codes = torch.empty(3, groups * 128, dtype=torch.float8_e4m3fn)
    scales = torch.empty(3, groups)
    build.launch((3, -(-groups // rounded_block(groups))), rows.device, rows, codes, scales)
    spread = scales.repeat_interleave(128, dim=1)
    assert torch.equal((codes.double() * spread.double())[:, :width], rounded_rows(rows, FP8_ROWS))
    assert not codes.float()[:, width:].any()


@interpreted
def test_a_row_has_the_bits_it_has_alone_and_nan_stays_in_its_row() -> None:
    given = operands(dataclasses.replace(LAYER, top_k=1), 5)
    whole = run_up(KERNEL, SWAPPED, given)
    assert torch.isfinite(whole).all()
    broken = given.hidden.clone()
    broken[2, 5] = torch.nan
    others = run_up(KERNEL, SWAPPED, dataclasses.replace(given, hidden=broken))
    kept = torch.arange(5) != 2
    assert others[2].isnan().all() and torch.equal(others[kept], whole[kept])
    alone = dataclasses.replace(
        given, route=sort_slots(given.route.ids[3:4], 3), hidden=given.hidden[3:4], topk_weights=given.topk_weights[3:4]
    )
    assert torch.equal(run_up(KERNEL, SWAPPED, alone)[0], whole[3])


@interpreted
def test_tiles_give_the_same_bits_within_a_class() -> None:
    given = operands(LAYER, 4)
    first = [run(KERNEL, SWAPPED, given) for run in (run_up, run_down)]
    other = SWAPPED.with_params(block_m=32, block_n=128, num_warps=8)
    for gemm in LAYER.gemms:
        assert numerics_class(KERNEL, gemm, other, HERE) == numerics_class(KERNEL, gemm, SWAPPED, HERE)
        classes = {numerics_class(KERNEL, gemm, config, HERE) for config in (SWAPPED, PLAIN)}
        grouped = TileConfig(Grouped.name, dict(PLAIN.params))
        assert len({*classes, numerics_class(Grouped(), gemm, grouped, HERE)}) == 3
        assert KERNEL.numerics(gemm, PLAIN, HERE)["activations"] == FP8_ROWS
    for run, expected in zip((run_up, run_down), first, strict=True):
        assert torch.equal(run(KERNEL, other, given).view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_only_targets_that_multiply_e4m3_take_it(target: Target) -> None:
    environment = target.environment()
    reason = KERNEL.rejects(LAYER.up, environment)
    assert (reason is None) == (target.arch in ("89", "90", "100", "120", "gfx950"))
    assert "not fp8" in str(KERNEL.rejects(dataclasses.replace(LAYER, weight_format="int8_channel").up, environment))
    if reason is not None:
        assert "do not multiply e4m3" in reason
        assert Grouped().rejects(LAYER.up, environment) is None, "the weights have a kernel all the same"
        return
    assert "fp32" in str(KERNEL.rejects(dataclasses.replace(LAYER, dtype="fp32").up, environment))
    low = PLAIN.with_params(block_m=16, num_stages=2)
    refused = KERNEL.invalid(LAYER.up, low, environment)
    assert (refused is not None) == (target.mma[0] in ("wgmma", "tcgen05")), refused
    if target.mma[0] in ("wgmma", "tcgen05"):
        tokens = (1, 64, 4096)
        same = {numerics_class(KERNEL, LAYER.up, KERNEL.default(LAYER.up, t, environment), environment) for t in tokens}
        assert len(same) == 1, "one class for every number of tokens"


def test_work_counts_the_launch_that_rounds() -> None:
    gemm = dataclasses.replace(LAYER, hidden=1024, intermediate=512, bias=False).up
    wide = TileConfig(Grouped.name, dict(PLAIN.params))
    rounded, kept = KERNEL.work(gemm, PLAIN, HERE, [64, 3, 0]), Grouped().work(gemm, wide, HERE, [64, 3, 0])
    assert rounded.launches == kept.launches + 1
    assert rounded.row_bytes > kept.row_bytes and rounded.weight_bytes == kept.weight_bytes
    assert rounded.efficiency > kept.efficiency

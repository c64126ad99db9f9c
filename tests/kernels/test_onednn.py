"""`onednn.linear` against the float64 oracle, its reasons, and what it must not let in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import cases
from tests.cases import CASES, ODD, SMALL, Case, Operands, assert_both_gemms, operands
from tilecast.environment import Environment, cpu_environment
from tilecast.errors import ConfigError, DeviceError
from tilecast.kernels.cpu.onednn import KERNEL, ONEDNN
from tilecast.kernels.cpu.onednn_launch import cannot_prepack_here
from tilecast.kernels.spec import PLAIN, Kernel, numerics_class
from tilecast.problem import ExpertLayer, TileConfig


def config_of(prepack: str = "no", row_block: int = 0) -> TileConfig:
    return TileConfig(KERNEL.name, {"prepack": prepack, "row_block": row_block})


def run_up(config: TileConfig, given: Operands) -> torch.Tensor:
    return cases.run_up(KERNEL, config, given)


def run_down(config: TileConfig, given: Operands, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return cases.run_down(KERNEL, config, given, out_dtype)


def usable_configs(layer: ExpertLayer) -> list[TileConfig]:
    everything = [config_of(prepack, block) for prepack in ("no", "yes") for block in (0, 1, 4, 16)]
    return [config for config in everything if KERNEL.invalid(layer.up, config, cpu_environment()) is None]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_gemms_are_as_exact_as_torch(case: Case, dtype: str) -> None:
    layer = dataclasses.replace(case.layer, dtype=dtype)
    given = operands(layer, case.tokens, case.routing)
    for config in usable_configs(layer):
        assert_both_gemms(KERNEL, config, given)


def test_partial_sum_in_float32_is_not_rounded() -> None:
    given = operands(dataclasses.replace(ODD, dtype="bf16"), 11)
    partial = run_down(config_of(), given, out_dtype=torch.float32)
    assert not torch.equal(partial, partial.bfloat16().float())
    assert torch.equal(partial.bfloat16(), run_down(config_of(), given))


def test_padding_rows_do_not_reach_real_rows() -> None:
    """With an infinite weight a zero padding row turns into NaN; real rows with it must stay their own."""
    given = operands(dataclasses.replace(SMALL, dtype="fp32", activation="relu"), 3)
    given.up.data[:, 0, 0] = torch.inf
    plain, padded = run_up(config_of(), given), run_up(config_of(row_block=16), given)
    assert torch.equal(plain.isfinite(), padded.isfinite())
    columns = torch.arange(SMALL.intermediate) > 0
    assert padded[:, columns].isfinite().all()


def test_weights_that_need_gradients_leave_no_graph() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="fp32"), 4)
    given.up.data.requires_grad_(True)
    assert not run_up(config_of(), given).requires_grad


def test_autocast_and_narrow_float32_do_not_change_bits() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="fp32"), 8)
    expected = run_up(config_of(), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run_up(config_of(), given), expected)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(run_up(config_of(), given), expected)
        assert torch.get_float32_matmul_precision() == "medium", "the caller's setting was not put back"
    finally:
        torch.set_float32_matmul_precision(before)


def environment_with(**changes: object) -> Environment:
    base = Environment(
        device_kind="cpu", device="some CPU", arch="x86_64", features="avx2,f16c,fma", units=2, llc_bytes=1 << 25,
        kernel_source="0" * 64, torch="2.13.0", compiler="0.50.0", threads=2,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "features", "missing"),
    [
        ("fp32", "avx2", None),
        ("bf16", "avx2,fma", "avx512bw and avx512vl"),
        ("bf16", "avx512bw,avx512f,avx512vl", None),
        ("fp16", "avx512_bf16,avx512bw,avx512vl", "avx512_fp16"),
        ("fp16", "avx512_fp16", None),
    ],
)
def test_prepacking_is_refused_by_feature(dtype: str, features: str, missing: str | None) -> None:
    gemm = dataclasses.replace(SMALL, dtype=dtype).up
    environment = environment_with(features=features)
    reason = KERNEL.invalid(gemm, config_of("yes"), environment)
    assert (reason is None) if missing is None else (reason is not None and missing in reason)
    assert KERNEL.invalid(gemm, config_of("no"), environment) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_packing_agrees_with_what_is_said_about_this_machine(dtype: str) -> None:
    """A config that is called valid here packs; one that is refused ends in a DeviceError, never a crash."""
    given = operands(dataclasses.replace(SMALL, dtype=dtype), 2)
    if KERNEL.invalid(given.layer.up, config_of("yes"), cpu_environment()) is None:
        packed = KERNEL.pack(given.up, ONEDNN)
        assert packed.layout == ONEDNN and len(packed.data) == SMALL.experts
    else:
        with pytest.raises(DeviceError, match="prepack=no"):
            KERNEL.pack(given.up, ONEDNN)


def test_prepacking_float32_works_wherever_onednn_does() -> None:
    assert (cannot_prepack_here("fp32") is None) == torch.backends.mkldnn.is_available()


def test_packing_leaves_the_plain_weights_as_they_were() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="fp32"), 2)
    before = given.up.data.clone()
    assert KERNEL.pack(given.up, PLAIN) is given.up
    KERNEL.pack(given.up, ONEDNN)
    assert torch.equal(given.up.data, before)


def test_wrong_layouts_are_errors() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="fp32"), 2)
    with pytest.raises(ConfigError, match="no weight layout 'panels'"):
        KERNEL.pack(given.up, "panels")
    packed = KERNEL.pack(given.up, ONEDNN)
    with pytest.raises(ConfigError, match="packs plain weights"):
        KERNEL.pack(packed, ONEDNN)
    out = torch.empty(4, SMALL.intermediate)
    with pytest.raises(ConfigError, match="reads layout 'plain'"):
        KERNEL.up(config_of(), given.hidden, packed, given.route, out)


@pytest.mark.parametrize(
    "params",
    [
        {"prepack": "no"},
        {"prepack": "maybe", "row_block": 0},
        {"prepack": "no", "row_block": 3},
        {"prepack": "no", "row_block": 0, "threads": 2},
    ],
)
def test_parameters_outside_the_domain_have_a_reason(params: dict[str, int | str]) -> None:
    assert KERNEL.invalid(SMALL.up, TileConfig(KERNEL.name, params), cpu_environment())


def test_other_devices_are_rejected() -> None:
    assert KERNEL.rejects(SMALL.up, environment_with()) is None
    assert "cuda" in str(KERNEL.rejects(SMALL.up, environment_with(device_kind="cuda")))


@pytest.mark.parametrize("tokens", [1, 16, 256, 8192])
def test_space_is_ordered_unique_and_inside_the_domain(tokens: int) -> None:
    environment = environment_with(features="avx512bw,avx512vl")
    found = list(KERNEL.space(SMALL.up, tokens, environment))
    assert found == list(KERNEL.space(SMALL.up, tokens, environment))
    assert len(set(found)) == len(found)
    assert KERNEL.default(SMALL.up, tokens, environment) in found
    assert all(KERNEL.invalid(SMALL.up, config, environment) is None for config in found)


def test_default_like_keeps_layout_and_class() -> None:
    kernel: Kernel = KERNEL
    environment = cpu_environment()
    like = config_of("yes", 16)
    assert kernel.default(SMALL.up, 64, environment, like=like) == like
    assert kernel.default(SMALL.up, 64, environment, like=TileConfig("other.kernel")) == config_of()


def test_every_config_and_shape_is_a_class_of_its_own_and_claims_no_invariance() -> None:
    environment = cpu_environment()
    gemms = [SMALL.up, SMALL.down, ODD.up, dataclasses.replace(SMALL, dtype="fp32").up]
    configs = [config_of(prepack, block) for prepack in ("no", "yes") for block in (0, 4)]
    classes = {numerics_class(KERNEL, gemm, config, environment) for gemm in gemms for config in configs}
    assert len(classes) == len(gemms) * len(configs)
    assert not any(KERNEL.batch_invariant(gemm, config) for gemm in gemms for config in configs)

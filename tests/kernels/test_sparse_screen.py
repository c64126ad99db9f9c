"""The screen of `llvm.sparse_experts`: what it proves dead is dead in the dense kernel, whatever the numbers."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given as draws
from hypothesis import settings
from hypothesis import strategies as st

from tests.cases import ODD, SMALL, Operands, operands, run_up
from tests.kernels.test_sparse import DENSE, HERE, KERNEL, LONG, dense_config, same_bits, sparse
from tilecast.errors import InputError
from tilecast.kernels import registry
from tilecast.kernels.cpu._screen import GROUP, LARGEST_STEP
from tilecast.kernels.cpu._screened import ScreenedUp
from tilecast.kernels.cpu._sparse import SparseVariant
from tilecast.kernels.cpu._variant import Variant
from tilecast.kernels.cpu.isa import CROSS
from tilecast.kernels.cpu.jit import optimised
from tilecast.kernels.cpu.screens import screen_of
from tilecast.kernels.cpu.sparse import GATES, NEURONS, SCREEN
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.spec import PLAIN, stack_bytes
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

PLAIN_LAYER = ExpertLayer(hidden=300, intermediate=70, experts=2, top_k=1, activation="relu", dtype="fp32", bias=True)


def config_of(gemm: ExpertGemm, **changes: int) -> TileConfig:
    base = KERNEL.default(gemm, 1, HERE)
    assert base["layout"] == SCREEN
    return base.with_params(block_n=64, **changes)


def assert_dense_bits(given: Operands, **changes: int) -> torch.Tensor:
    """Compare up with the dense kernel, NaN for NaN; return what it made."""
    expected = run_up(DENSE, dense_config(given.layer.up), given)
    got = run_up(KERNEL, config_of(given.layer.up, **changes), given)
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bits(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
    return got


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_bits_are_the_dense_kernels(share: float, dtype: str) -> None:
    for activation in ("relu", "drelu"):
        layer = dataclasses.replace(LONG, dtype=dtype, activation=activation, bias=True)
        assert_dense_bits(sparse(operands(layer, 6, "absent"), share))


@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_bits_are_the_dense_kernels_at_any_size_of_batch(tokens: int) -> None:
    for layer in (ODD, SMALL):
        given = operands(dataclasses.replace(layer, dtype="bf16", activation="drelu", bias=True), tokens)
        assert_dense_bits(sparse(given, 0.8))


def test_every_config_gives_the_same_bits() -> None:
    # Chains that fill vectors, and some that are left over.
    layer = dataclasses.replace(SMALL, hidden=2304 + 40, dtype="bf16", activation="relu")
    given = sparse(operands(layer, 5), 0.7)
    for changes in ({"neurons": 1, "ahead": 0, "threads": 1}, {"neurons": 8, "block_n": 1024}, {"neurons": 2}):
        config = config_of(layer.up).with_params(**changes)
        assert KERNEL.invalid(layer.up, config, HERE) is None
        assert same_bits(run_up(KERNEL, config, given), run_up(DENSE, dense_config(layer.up), given))


def strange(given: Operands) -> Operands:
    """Give rows and weights numbers that screens may stumble over."""
    hidden, gates = given.hidden, given.up.data[:, : given.layer.intermediate]
    tiny = torch.finfo(hidden.dtype).smallest_normal
    hidden[0, 3] = 0.9 * torch.finfo(hidden.dtype).max
    hidden[1] = tiny / 4
    hidden[2] = 0
    hidden[3] = -0.0
    hidden[4, 7], hidden[5, 7], hidden[6, 7] = math.inf, -math.inf, math.nan
    hidden[7, 1:] = tiny
    hidden[8] = 1
    gates[:, 0], gates[:, 1], gates[:, 2] = 0, -0.0, -0.01
    gates[:, 3], gates[:, 4] = tiny / 2, -tiny / 2
    gates[:, 5, 2], gates[:, 6, 2], gates[:, 7, 2] = math.inf, -math.inf, math.nan
    gates[:, 8] = -0.5 * torch.finfo(hidden.dtype).max
    gates[:, 9, 11] = -1000
    return given


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bias", [False, True])
def test_strange_numbers_leave_the_gate_open(dtype: str, bias: bool) -> None:
    layer = dataclasses.replace(PLAIN_LAYER, dtype=dtype, bias=bias)
    given = strange(operands(layer, 12))
    if given.up.bias is not None:
        given.up.bias[:, 20], given.up.bias[:, 21], given.up.bias[:, 22] = math.inf, -math.inf, math.nan
    assert assert_dense_bits(given).isnan().any()


def gates_of(given: Operands) -> torch.Tensor:
    """Return the gates [T, I] of one expert's layer, without bias, in the dense kernel's own chains."""
    layer = dataclasses.replace(given.layer, gated=False, activation="identity", bias=False)
    stack = dataclasses.replace(
        given.up, gemm=layer.up, data=given.up.data[:, : layer.intermediate].contiguous(), bias=None, plans={}
    )
    return run_up(DENSE, dense_config(layer.up), dataclasses.replace(given, layer=layer, up=stack))


def near_zero(seed: int = 0, hidden: int = 300) -> tuple[Operands, torch.Tensor]:
    """Return one row whose gates, with their bias, are an ulp of the gate above zero, zero, or one below; and which."""
    layer = dataclasses.replace(PLAIN_LAYER, experts=1, hidden=hidden, intermediate=257)
    given = operands(layer, 1)
    given.hidden.copy_(torch.randn(given.hidden.shape, generator=torch.Generator().manual_seed(seed)))
    gates = gates_of(given)[0]
    side = torch.arange(len(gates)) % 3 - 1
    up = torch.nextafter(gates, torch.tensor(-math.inf)), gates, torch.nextafter(gates, torch.tensor(math.inf))
    bias = -torch.stack(up)[(1 + side), torch.arange(len(gates))]
    assert given.up.bias is not None
    given.up.bias[0, : len(gates)] = bias
    return given, side


def test_gates_within_an_ulp_of_zero_are_computed() -> None:
    given, side = near_zero()
    made = assert_dense_bits(given)[0]
    assert torch.equal(made != 0, side < 0), "the case has gates on both sides of zero"


def test_a_screen_without_its_bound_is_caught() -> None:
    """The negative control: what the bound is for shows."""
    given, _ = near_zero()
    config = config_of(given.layer.up)
    packed = KERNEL.pack(given.up, SCREEN)
    packed.data.bounds.zero_()
    out = torch.full((1, given.layer.intermediate), math.nan)
    KERNEL.up(config, given.hidden, packed, given.route, out)
    assert not same_bits(out, run_up(DENSE, dense_config(given.layer.up), given))


@settings(max_examples=40, deadline=None)
@draws(
    seed=st.integers(0, 2**31), hidden=st.integers(1, 700), dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
    spread=st.floats(0, 12), outlier=st.sampled_from([0.0, 1e2, 1e5]), shift=st.floats(-3, 3),
)  # fmt: skip
def test_what_is_proven_dead_is_dead(
    seed: int, hidden: int, dtype: str, spread: float, outlier: float, shift: float
) -> None:
    """Weights and rows of wide exponents, biases near the gates: a live neuron taken for dead has other bits."""
    layer = dataclasses.replace(PLAIN_LAYER, hidden=hidden, dtype=dtype)
    given = operands(layer, 5)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (given.hidden, given.up.data):
        exponents = (torch.rand(tensor.shape, generator=generator) - 0.5) * spread
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * exponents.exp2() / 16)
    given.hidden[0, seed % hidden] = min(outlier, 6e4)
    width = layer.intermediate
    assert given.up.bias is not None
    size = (given.up.data[:, :width].float().norm(dim=2) * given.hidden.float().norm(dim=1).mean()) / hidden**0.5
    given.up.bias[:, :width] = shift * torch.rand(size.shape, generator=generator) * size
    assert_dense_bits(given)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_bounds_hold_in_float64(dtype: str) -> None:
    """The proof's steps by themselves: codes, a row's integers, and what the two leave out."""
    generator = torch.Generator().manual_seed(3)
    for hidden, spread in ((4096, 0.0), (530, 4.0), (1, 0.0)):
        draw, exponents = (torch.randn(64, hidden, generator=generator) for _ in range(2))
        draw *= (exponents * spread).exp2()
        rows = (draw / hidden**0.5).to(TORCH_DTYPES[dtype])
        codes, scales, bounds = screen_of(rows)
        groups = scales.shape[1]
        x = torch.zeros(groups * GROUP, dtype=torch.float64)
        x[:hidden] = (torch.randn(hidden, generator=generator) * 3).to(TORCH_DTYPES[dtype])
        unit = x.view(groups, GROUP).abs().amax(1) / LARGEST_STEP
        integers = (x.view(groups, GROUP) / unit[:, None]).round()
        parts = (codes.double().view(64, groups, GROUP) * integers).sum(2) * unit
        screened = (parts * scales.double()).sum(1)
        norms = unit * (integers.square().sum(1).sqrt() + 6)
        bound = (scales.double() * (bounds[:, :1] * norms + bounds[:, 1:] * unit)).sum(1)
        off = (rows.double() @ x[:hidden] - screened).abs()
        assert codes.abs().max() <= 127
        assert (off < bound).all()
        if dtype != "fp32" and hidden == 1:
            continue
        assert (off > bound / 1000).any(), "the bound is far from what is left out"


def test_gates_that_are_clearly_dead_are_not_read() -> None:
    layer = ExpertLayer(hidden=1024, intermediate=1000, experts=1, top_k=1, activation="relu", dtype="bf16")
    given = operands(layer, 1)
    given.up.data[:, : layer.intermediate] -= 1.28 / 1024**0.5 * given.hidden / given.hidden.norm()
    dead = gates_of(given)[0] <= 0
    packed = KERNEL.pack(given.up, SCREEN)
    packed.data.gate[0, dead] = math.nan
    out = torch.empty(1, layer.intermediate, dtype=torch.bfloat16)
    KERNEL.up(config_of(layer.up), given.hidden, packed, given.route, out)
    expected = run_up(DENSE, dense_config(layer.up), given)
    opened = out.isnan()[0]
    assert same_bits(out[:, ~opened], expected[:, ~opened])
    assert 0.85 < dead.float().mean() < 0.95
    assert 0 < opened.float().mean() < 0.15


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_layout_is_undone_bit_for_bit(dtype: str) -> None:
    for layer in (ODD, SMALL, LONG):
        given = operands(dataclasses.replace(layer, dtype=dtype, activation="relu"), 1)
        packed = KERNEL.pack(given.up, SCREEN)
        assert same_bits(KERNEL.unpack(packed).data, given.up.data)
    large = operands(ExpertLayer(hidden=2048, intermediate=256, experts=1, top_k=1, activation="relu", dtype=dtype), 1)
    more = KERNEL.pack(large.up, SCREEN).data.nbytes / large.up.data.nbytes - 1
    codes = 1 / (2 * large.up.data.itemsize)
    assert codes < more < codes + 0.04, "codes are what it takes more"


def test_other_weights_are_told_in_one_line() -> None:
    given = operands(dataclasses.replace(ODD, activation="relu", dtype="bf16"), 2)
    config, packed = config_of(given.layer.up), KERNEL.pack(given.up, SCREEN)
    out = torch.empty(6, 47, dtype=torch.bfloat16)
    for data, told in (
        (packed.data.gate, "expected a ScreenedStack"),
        (dataclasses.replace(packed.data, scales=packed.data.scales.float()), "scales in layout screen128"),
        (dataclasses.replace(packed.data, codes=packed.data.codes[:, :1]), "codes in layout"),
    ):  # fmt: skip
        wrong = dataclasses.replace(packed, data=data, plans={})
        with pytest.raises(InputError, match=re.escape(told)):
            KERNEL.up(config, given.hidden, wrong, given.route, out)
    assert "has no tile" in (KERNEL.invalid(given.layer.up, config.with_params(mr=2), HERE) or "")


@pytest.mark.parametrize(("name", "product"), [("avx512", "vpmaddwd"), ("sse2", "pmaddwd"), ("neon", "smull")])
def test_it_compiles_for_every_instruction_set(name: str, product: str) -> None:
    isa = CROSS[name]
    dense = Variant(
        gemm="up", dtype="bf16", out="bf16", activation="relu", gated=False, bias=True, mr=1, nv=1, max_nv=1, unroll=1,
        panel=isa.lanes, stage=False, dot="", prefetch=0, lanes=isa.lanes, fma=isa.fma,
    )  # fmt: skip
    variant = SparseVariant(dense=dense, neurons=4, ahead=1, screen=True)
    module, machine = optimised(lambda m: ScreenedUp(m, variant).build(), isa)
    assert product in str(machine.emit_assembly(module))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layer", [LONG, dataclasses.replace(LONG, hidden=64, intermediate=40)])
def test_what_a_stack_takes_is_known_before_it_is_packed(layer: ExpertLayer, dtype: str) -> None:
    given = operands(dataclasses.replace(layer, dtype=dtype), 1)
    for weights, layouts in ((given.up, (*GATES, SCREEN)), (given.down, (NEURONS,))):
        for layout in layouts:
            assert stack_bytes(KERNEL, weights.gemm, layout) == KERNEL.pack(weights, layout).data.nbytes
        assert stack_bytes(KERNEL, weights.gemm, PLAIN) == weights.gemm.weight_bytes() == weights.data.nbytes


@pytest.mark.parametrize(("dtype", "more"), [("bf16", 1 / 6), ("fp16", 1 / 6), ("fp32", 1 / 12)])
def test_a_screen_counts_in_what_a_layer_may_take(dtype: str, more: float) -> None:
    layer = ExpertLayer(hidden=4096, intermediate=1792, experts=8, top_k=2, dtype=dtype, activation="drelu")
    for one, wanted in ((layer, 1 + more), (dataclasses.replace(layer, activation="silu"), 1.0)):
        taken = sum(registry.largest_stack(gemm, HERE) for gemm in one.gemms)
        # Neurons begin a cache line or two further apart.
        assert taken / sum(gemm.weight_bytes() for gemm in one.gemms) == pytest.approx(wanted, abs=0.015)

"""`llvm.sparse_experts`: the oracle, and the dense kernel's bits at every share of zeros."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from tests.cases import CASES, ODD, SMALL, Case, Operands, assert_both_gemms, operands, run_down, run_up
from tilecast.autotune.measure import Prepared
from tilecast.environment import cpu_environment
from tilecast.errors import ConfigError, InputError
from tilecast.kernels import registry
from tilecast.kernels.cpu.isa import CROSS
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.sparse import NAME, NEURONS, SparseExperts
from tilecast.kernels.spec import PLAIN, numerics_class, outside_domain
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

KERNEL, DENSE = SparseExperts(), MoeGemm()
HERE = cpu_environment()
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LONG = ExpertLayer(hidden=530, intermediate=519, experts=3, top_k=2, activation="relu")


def dense_config(gemm: ExpertGemm) -> TileConfig:
    """A config of the class, compiled sooner than the default."""
    base = DENSE.default(gemm, 1, HERE)
    return base.with_params(dot="fma", mr=1, nv=1, unroll=1, prefetch=0, block_n=64, layout="panel16")


def config_of(gemm: ExpertGemm) -> TileConfig:
    """A config without a screen (`test_sparse_screen` has that), compiled sooner than the default."""
    base = KERNEL.default(gemm, 1, HERE).with_params(neurons=2, mr=1, nv=1, unroll=1, prefetch=0)
    return base if gemm.name == "down" else base.with_params(layout="gate16")


def sparse(given: Operands, share: float) -> Operands:
    """Make `share` of the gates and of the intermediate dead: a hidden state that is all positive, gates below it."""
    generator = torch.Generator().manual_seed(11)
    width, layer = given.layer.intermediate, given.layer
    if layer.gated:
        dead = torch.rand(layer.experts, width, generator=generator) < share
        given.hidden.abs_()
        gates = given.up.data[:, :width]
        gates.copy_(torch.where(dead[..., None], -gates.abs(), gates.abs() if share < 1 else -gates.abs()))
        if given.up.bias is not None:
            given.up.bias[:, :width] = 0
    zero = torch.rand(given.intermediate.shape, generator=generator) < share
    sign = torch.where(torch.rand(zero.shape, generator=generator) < 0.5, 0.0, -0.0).to(given.intermediate.dtype)
    given.intermediate.copy_(torch.where(zero & ~given.intermediate.isnan(), sign, given.intermediate))
    return given


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype]))


def assert_dense_bits(given: Operands, up: TileConfig | None = None, down: TileConfig | None = None) -> torch.Tensor:
    """Compare both GEMMs with the dense kernel, poison included; return the intermediate that up made."""
    layer = given.layer
    expected = run_up(DENSE, dense_config(layer.up), given)
    if layer.gated:
        assert same_bits(run_up(KERNEL, up or config_of(layer.up), given), expected)
    # A rank's partial sum: what rounding would hide shows, too.
    wanted = run_down(DENSE, dense_config(layer.down), given, torch.float32)
    got = run_down(KERNEL, down or config_of(layer.down), given, torch.float32)
    assert not got.isnan().any()
    assert same_bits(got, wanted)
    return expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_bits_are_the_dense_kernels(share: float, dtype: str) -> None:
    for activation in ("relu", "relu2", "drelu"):
        layer = dataclasses.replace(LONG, dtype=dtype, activation=activation, bias=True)
        given = sparse(operands(layer, 6, "absent"), share)
        rows = assert_dense_bits(given)
        zeros = float((rows[given.route.slots[: int(given.route.offsets[-1])].long()] == 0).float().mean())
        assert abs(zeros - share) < 0.1 if activation == "relu" else zeros >= share - 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_bits_are_the_dense_kernels_at_any_size_of_batch(tokens: int, dtype: str) -> None:
    for layer in (ODD, SMALL):
        given = operands(dataclasses.replace(layer, dtype=dtype, activation="drelu", bias=True), tokens)
        assert_dense_bits(sparse(given, 0.8))


@pytest.mark.parametrize("dtype", ["bf16"])
def test_ungated_layers_gain_in_down_alone(dtype: str) -> None:
    layer = dataclasses.replace(LONG, dtype=dtype, gated=False, activation="relu2", bias=True)
    assert "every row" in (KERNEL.rejects(layer.up, HERE) or "")
    assert KERNEL.rejects(layer.down, HERE) is None
    assert_dense_bits(sparse(operands(layer, 9), 0.9))


def of_down(**changes: int) -> TileConfig:
    return KERNEL.default(LONG.down, 1, HERE).with_params(**changes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_config_gives_the_same_bits(dtype: str) -> None:
    layer = dataclasses.replace(LONG, dtype=dtype)
    given = sparse(operands(layer, 7), 0.7)
    base = config_of(layer.up)
    ups = [
        base.with_params(neurons=1, ahead=0, block_n=128, threads=1),
        base.with_params(neurons=2, ahead=1, block_n=1024, mr=2, nv=2, layout="gate64", threads=2),
        base.with_params(neurons=8, ahead=1, block_n=64, mr=3, nv=4, layout="gate32"),
    ]
    downs = [of_down(neurons=1, ahead=0, block_n=128, threads=1), of_down(neurons=2), of_down(neurons=8, block_n=256)]
    for up, down in zip(ups, downs, strict=True):
        for gemm, config in ((layer.up, up), (layer.down, down)):
            assert KERNEL.invalid(gemm, config, HERE) is None
            dense = numerics_class(DENSE, gemm, dense_config(gemm), HERE)
            assert numerics_class(KERNEL, gemm, config, HERE) == dense
        assert_dense_bits(given, up, down)


RELU_CASES = [
    dataclasses.replace(case, layer=dataclasses.replace(case.layer, activation="drelu"))
    for case in CASES
    if case.layer.gated
]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", RELU_CASES, ids=lambda case: case.name)
def test_both_gemms_are_as_exact_as_torch(case: Case, dtype: str) -> None:
    layer = dataclasses.replace(case.layer, dtype=dtype)
    given = operands(layer, case.tokens, case.routing)
    up, down = (config_of(gemm) for gemm in layer.gemms)
    assert_both_gemms(KERNEL, up, given, down=down)


def test_defaults_run() -> None:
    layer = dataclasses.replace(LONG, dtype="bf16")
    for tokens in (1, 9):
        up, down = (KERNEL.default(gemm, tokens, HERE) for gemm in layer.gemms)
        assert_dense_bits(sparse(operands(layer, tokens), 0.9), up, down)


def test_what_launches_need_can_be_compiled_before() -> None:
    """The tuner compiles many configs at once by it."""
    kernel, given = SparseExperts(), operands(LONG, 2)
    assert isinstance(kernel, Prepared)
    config = kernel.default(given.layer.down, 2, HERE)
    weights = kernel.pack(given.down, NEURONS)
    kernel.prepare(config, weights, torch.float32)
    (plan,) = weights.plans.values()
    out = torch.empty(2, given.layer.hidden)
    kernel.down(config, given.intermediate, weights, given.route, given.topk_weights, out)
    assert list(weights.plans.values()) == [plan], "the launch made a plan of its own"
    with pytest.raises(ConfigError, match="reads layout neurons"):
        kernel.prepare(config, given.down, torch.float32)


def test_another_order_of_adding_gives_other_bits() -> None:
    """The negative control: comparisons with the dense kernel can fail."""
    layer = dataclasses.replace(LONG, dtype="fp32")
    given = sparse(operands(layer, 5), 0.5)
    config = config_of(layer.down)
    forward = run_down(KERNEL, config, given)
    backward = dataclasses.replace(
        given,
        intermediate=given.intermediate.flip(1).contiguous(),
        down=dataclasses.replace(given.down, data=given.down.data.flip(2).contiguous(), plans={}),
    )
    assert not same_bits(run_down(KERNEL, config, backward), forward)


def test_dead_neurons_hide_infinite_weights() -> None:
    """What a dead neuron's weights are never shows: up by both kernels' definition, down by being left out."""
    layer = dataclasses.replace(ODD, dtype="fp32", activation="relu")
    given = operands(layer, 6)
    config = config_of(layer.up)
    given.hidden.abs_()
    clean = run_up(KERNEL, config, given)
    given.up.data[:, 3] = -given.up.data[:, 3].abs()
    given.up.data[:, layer.intermediate + 3] = torch.inf
    dirty = run_up(KERNEL, config, given)
    assert same_bits(dirty, run_up(DENSE, dense_config(layer.up), given))
    assert (dirty[:, 3] == 0).all() and not torch.signbit(dirty[:, 3]).any()
    assert same_bits(dirty[:, 4:], clean[:, 4:])
    given.intermediate[:, 5] = 0
    down = config_of(layer.down)
    finite = run_down(KERNEL, down, given)
    given.down.data[:, :, 5] = torch.nan
    again = dataclasses.replace(given, down=dataclasses.replace(given.down, plans={}))
    assert same_bits(run_down(KERNEL, down, again), finite)
    assert run_down(DENSE, dense_config(layer.down), again).isnan().all()


def test_a_nan_stays_in_its_row() -> None:
    layer = dataclasses.replace(ODD, dtype="bf16", activation="drelu")
    given = operands(layer, 12)
    config = config_of(layer.up)
    clean = run_up(KERNEL, config, given)
    given.hidden[3] = torch.nan
    dirty = run_up(KERNEL, config, given)
    rows = torch.arange(len(clean)) // layer.top_k == 3
    assert same_bits(dirty[~rows], clean[~rows])
    assert dirty[rows].isnan().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layer", [ODD, SMALL], ids=["odd", "small"])
def test_layouts_are_undone_bit_for_bit(layer: ExpertLayer, dtype: str) -> None:
    given = operands(dataclasses.replace(layer, dtype=dtype, activation="relu"), 1)
    for weights, layouts in ((given.up, ("gate16", "gate64")), (given.down, (NEURONS,))):
        for layout in layouts:
            packed = KERNEL.pack(weights, layout)
            assert packed.layout == layout and packed.data.nbytes >= weights.data.nbytes
            assert same_bits(KERNEL.unpack(packed).data, weights.data)


def test_what_it_cannot_run_is_told_in_one_line() -> None:
    relu = dataclasses.replace(ODD, activation="relu", dtype="bf16")
    assert "exact zeros" in (KERNEL.rejects(ODD.up, HERE) or "")
    awq = ExpertLayer(hidden=128, intermediate=128, experts=2, top_k=1, weight_format="awq_g128", activation="relu")
    assert "dense weights" in (KERNEL.rejects(awq.down, HERE) or "")
    up, down = (config_of(gemm) for gemm in relu.gemms)
    assert "not of down" in (KERNEL.invalid(relu.down, up, HERE) or "")
    assert "not of up" in (KERNEL.invalid(relu.up, down, HERE) or "")
    assert "no tile" in (KERNEL.invalid(relu.down, down.with_params(mr=2), HERE) or "")
    assert "at most 1024" in (KERNEL.invalid(relu.up, up.with_params(block_n=2048), HERE) or "")
    given = operands(relu, 2)
    with pytest.raises(ConfigError, match="cannot be packed as 'gate16'"):
        KERNEL.pack(given.down, "gate16")
    with pytest.raises(ConfigError, match="the weights are plain"):
        run_up(KERNEL, up, given, layout=PLAIN)
    packed = KERNEL.pack(given.up, str(up["layout"]))
    wrong = dataclasses.replace(packed, data=packed.data.gate, plans={})
    with pytest.raises(InputError, match=re.escape("expected a SparseStack")):
        KERNEL.up(up, given.hidden, wrong, given.route, torch.empty(6, 47, dtype=torch.bfloat16))
    with pytest.raises(InputError, match="input is"):
        KERNEL.up(up, given.hidden[:, 1:], packed, given.route, torch.empty(6, 47, dtype=torch.bfloat16))


def test_the_registry_has_it_behind_the_dense_kernel() -> None:
    relu = dataclasses.replace(SMALL, activation="relu")
    assert registry[NAME].name == NAME
    for gemm in relu.gemms:
        assert registry.default_kernel(gemm, HERE).name == DENSE.name
        for tokens in (1, 64):
            configs = [KERNEL.default(gemm, tokens, HERE), *KERNEL.space(gemm, tokens, HERE)]
            assert all(outside_domain(KERNEL, config) is None for config in configs)
            assert sum(registry.invalid(gemm, config, HERE) is None for config in configs) >= 4
            like = next(iter(KERNEL.space(gemm, tokens, HERE)))
            assert KERNEL.default(gemm, tokens, HERE, like=like)["layout"] == like["layout"]


@pytest.mark.parametrize("isa", CROSS.values(), ids=lambda isa: isa.name)
def test_every_instruction_set_has_valid_defaults(isa) -> None:  # type: ignore[no-untyped-def]
    kernel = SparseExperts(isa)
    for gemm in dataclasses.replace(SMALL, activation="relu", dtype="fp32").gemms:
        assert kernel.invalid(gemm, kernel.default(gemm, 4, HERE), HERE) is None

"""`llvm.moe_gemm` against the float64 oracle, and the one numerics class of all its tiles."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from tests.cases import CASES, ODD, SMALL, Case, Operands, assert_both_gemms, operands, run_down, run_up
from tilecast.environment import cpu_environment
from tilecast.errors import ConfigError, InputError
from tilecast.kernels.cpu.isa import CROSS
from tilecast.kernels.cpu.moe_gemm import NAME, MoeGemm
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import PLAIN, numerics_class, outside_domain
from tilecast.problem import ExpertLayer, TileConfig

KERNEL = MoeGemm()
HERE = cpu_environment()
WIDE_MOUTHED = ExpertLayer(hidden=700, intermediate=513, experts=3, top_k=2, dtype="bf16")


def tiles(layer: ExpertLayer) -> list[TileConfig]:
    """Configs that differ in every parameter that must not change a bit."""
    base = KERNEL.default(layer.up, 1, HERE).with_params(dot="fma")
    changes: list[dict[str, int | str]] = [
        {},
        {"layout": PLAIN, "stage": 1},
        {"layout": PLAIN, "stage": 1, "mr": 5, "nv": 4, "unroll": 1, "block_n": 64},
        {"mr": 1, "nv": 1, "unroll": 1, "block_n": 16, "layout": "panel16"},
        {"mr": 2, "nv": 8, "unroll": 2, "prefetch": 4, "block_n": 128},
        {"mr": 6, "nv": 2, "unroll": 8, "block_k": 256, "prefetch": 1},
        {"mr": 6, "nv": 2, "stage": 1, "block_k": 512},
        {"mr": 3, "nv": 4, "layout": "panel64", "block_n": 1024, "threads": 1},
        {"mr": 4, "nv": 2, "layout": "panel32", "stage": 1, "threads": 2},
    ]
    found = [base.with_params(**change) for change in changes]
    usable = [c for c in found if KERNEL.invalid(layer.up, c, HERE) is None and outside_domain(KERNEL, c) is None]
    assert len(usable) >= 5
    return usable


@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.long)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_gemms_are_as_exact_as_torch(case: Case, dtype: str) -> None:
    layer = dataclasses.replace(case.layer, dtype=dtype)
    given = operands(layer, case.tokens, case.routing)
    default = KERNEL.default(layer.up, case.tokens, HERE)
    plain = KERNEL.default(layer.up, case.tokens, HERE, like=default.with_params(layout=PLAIN))
    for config in (default, plain):
        assert KERNEL.invalid(layer.up, config, HERE) is None
        assert_both_gemms(KERNEL, config, given)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_tile_gives_the_same_bits(dtype: str) -> None:
    layer = dataclasses.replace(WIDE_MOUTHED, dtype=dtype)
    given = wide_exponents(operands(layer, 19, "absent"))
    configs = tiles(layer)
    assert len({numerics_class(KERNEL, layer.up, config, HERE) for config in configs}) == 1
    up, down = run_up(KERNEL, configs[0], given), run_down(KERNEL, configs[0], given)
    for config in configs[1:]:
        assert torch.equal(run_up(KERNEL, config, given).nan_to_num(), up.nan_to_num()), config.label
        assert torch.equal(run_down(KERNEL, config, given), down), config.label


def wide_exponents(given: Operands) -> Operands:
    """Spread the operands' exponents, so that another order of adding gives other bits."""
    generator = torch.Generator().manual_seed(3)
    for tensor in (given.hidden, given.up.data, given.down.data, given.intermediate):
        tensor *= torch.exp2(torch.randint(-4, 5, tensor.shape, generator=generator)).to(tensor.dtype)
    return given


def test_another_order_of_adding_gives_other_bits() -> None:
    """The negative control: the comparison above can fail."""
    layer = dataclasses.replace(WIDE_MOUTHED, dtype="fp32")
    given = wide_exponents(operands(layer, 19))
    config = KERNEL.default(layer.up, 19, HERE)
    forward = run_up(KERNEL, config, given)
    backward = dataclasses.replace(
        given,
        hidden=given.hidden.flip(1).contiguous(),
        up=dataclasses.replace(given.up, data=given.up.data.flip(2).contiguous(), plans={}),
    )
    assert not torch.equal(run_up(KERNEL, config, backward), forward)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_token_has_the_same_bits_alone_and_in_any_batch(dtype: str) -> None:
    layer = dataclasses.replace(WIDE_MOUTHED, dtype=dtype)
    given = wide_exponents(operands(layer, 64))
    whole = run_down(KERNEL, KERNEL.default(layer.down, 64, HERE), given)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for rows in [order[:size] for size in range(1, 65)]:
        part = select_rows(given, rows)
        config = KERNEL.default(layer.down, len(rows), HERE)
        assert torch.equal(run_down(KERNEL, config, part), whole[rows])


def select_rows(given: Operands, rows: torch.Tensor) -> Operands:
    layer = given.layer
    slots = given.intermediate.view(-1, layer.top_k, layer.intermediate)
    return dataclasses.replace(
        given,
        route=sort_slots(given.route.ids[rows], layer.experts),
        topk_weights=given.topk_weights[rows].contiguous(),
        hidden=given.hidden[rows].contiguous(),
        intermediate=slots[rows].reshape(-1, layer.intermediate).contiguous(),
    )


def test_infinities_and_nans_of_one_row_stay_in_it() -> None:
    layer = dataclasses.replace(ODD, dtype="bf16")
    given = operands(layer, 12)
    config = KERNEL.default(layer.up, 12, HERE)
    clean = run_up(KERNEL, config, given)
    given.hidden[3] = torch.nan
    given.hidden[7, 0] = torch.inf
    dirty = run_up(KERNEL, config, given)
    touched = torch.zeros(12 * layer.top_k, dtype=torch.bool)
    for token in (3, 7):
        touched[token * layer.top_k : (token + 1) * layer.top_k] = True
    assert torch.equal(dirty[~touched], clean[~touched])
    assert torch.isnan(dirty[3 * layer.top_k]).all()


def test_partial_sum_in_float32_is_not_rounded() -> None:
    given = operands(dataclasses.replace(ODD, dtype="bf16"), 11)
    config = KERNEL.default(given.layer.down, 11, HERE)
    partial = run_down(KERNEL, config, given, out_dtype=torch.float32)
    assert not torch.equal(partial, partial.bfloat16().float())
    assert torch.equal(partial.bfloat16(), run_down(KERNEL, config, given))


def test_two_python_threads_do_not_share_scratch() -> None:
    layer = dataclasses.replace(SMALL, dtype="bf16")
    given = [operands(layer, tokens) for tokens in (5, 40)]
    config = KERNEL.default(layer.down, 5, HERE).with_params(threads=1)
    expected = [run_down(KERNEL, config, g) for g in given]
    wrong = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(run_down(KERNEL, config, given[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_wrong_operands_are_one_clear_error() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="bf16"), 4)
    config = KERNEL.default(SMALL.up, 4, HERE)
    packed = KERNEL.pack(given.up, KERNEL.layout(SMALL.up, config))
    out = torch.empty(8, SMALL.intermediate, dtype=torch.bfloat16)
    wrong = [
        (given.hidden.float(), out),
        (given.hidden[:3], out),
        (given.hidden, out[:7]),
        (given.hidden.T.contiguous().T, out),
    ]
    for hidden, target in wrong:
        with pytest.raises(InputError, match=r"llvm\.moe_gemm: (input|output) is"):
            KERNEL.up(config, hidden, packed, given.route, target)


def test_weights_and_slots_of_another_layer_are_refused() -> None:
    """Addresses are computed from sizes: what does not fit must not reach them."""
    given = operands(dataclasses.replace(SMALL, dtype="bf16"), 4)
    config = KERNEL.default(SMALL.up, 4, HERE).with_params(layout=PLAIN, stage=1, prefetch=0)
    out = torch.empty(8, SMALL.intermediate, dtype=torch.bfloat16)
    for data in (given.up.data[:3], given.up.data.float(), given.up.data.transpose(1, 2)):
        wrong = dataclasses.replace(given.up, data=data, plans={})
        with pytest.raises(InputError, match="weights in layout plain are"):
            KERNEL.up(config, given.hidden, wrong, given.route, out)
    more = sort_slots(given.route.ids, SMALL.experts + 1)
    with pytest.raises(InputError, match="sorted over 5 experts"):
        KERNEL.up(config, given.hidden, given.up, more, out)


def test_weights_in_another_layout_than_the_config_reads_are_refused() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="bf16"), 4)
    config = KERNEL.default(SMALL.up, 4, HERE)
    out = torch.empty(8, SMALL.intermediate, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="reads layout"):
        KERNEL.up(config, given.hidden, given.up, given.route, out)
    packed = KERNEL.pack(given.up, KERNEL.layout(SMALL.up, config))
    with pytest.raises(ConfigError, match="cannot be packed"):
        KERNEL.pack(packed, "panel64")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mr": 14, "nv": 8}, "registers"),
        ({"layout": PLAIN, "stage": 0}, "have to be staged"),
        ({"block_n": 16, "nv": 8}, "not a multiple"),
        ({"dot": "bf16"}, "bf16"),
    ],
)
def test_impossible_configs_have_a_reason(change: dict[str, int | str], reason: str) -> None:
    kernel = MoeGemm(CROSS["avx2"])
    layer = dataclasses.replace(SMALL, dtype="fp32")
    config = kernel.default(layer.up, 1, HERE).with_params(**change)
    assert reason in str(kernel.invalid(layer.up, config, HERE))


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "neon", "sse2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 4096])
def test_space_and_default_on_every_instruction_set(isa: str, dtype: str, tokens: int) -> None:
    kernel = MoeGemm(CROSS[isa])
    layer = dataclasses.replace(SMALL, dtype=dtype)
    for gemm in layer.gemms:
        found = list(kernel.space(gemm, tokens, HERE))
        assert len(set(found)) == len(found), "a config is offered twice"
        assert all(outside_domain(kernel, config) is None for config in found)
        valid = [config for config in found if kernel.invalid(gemm, config, HERE) is None]
        assert 4 <= len(valid) <= 120
        default = kernel.default(gemm, tokens, HERE)
        assert kernel.invalid(gemm, default, HERE) is None and outside_domain(kernel, default) is None
        for like in {kernel.layout(gemm, config): config for config in valid}.values():
            same = kernel.default(gemm, tokens, HERE, like=like)
            assert kernel.invalid(gemm, same, HERE) is None, same.label
            assert kernel.layout(gemm, same) == kernel.layout(gemm, like)
            assert kernel.numerics(gemm, same, HERE) == kernel.numerics(gemm, like, HERE)


def test_the_bf16_dot_product_is_another_class() -> None:
    kernel = MoeGemm(CROSS["avx512_bf16"])
    layer = dataclasses.replace(SMALL, dtype="bf16")
    config = kernel.default(layer.up, 1, HERE)
    assert config["dot"] == "bf16"
    assert kernel.numerics(layer.up, config, HERE) != kernel.numerics(layer.up, config.with_params(dot="fma"), HERE)
    assert "pairs" in str(kernel.invalid(dataclasses.replace(ODD, dtype="bf16").up, config, HERE))


def test_name_and_domain_are_what_the_registry_checks() -> None:
    config = KERNEL.default(SMALL.up, 1, HERE)
    assert config.kernel == NAME
    assert "mr" in str(outside_domain(KERNEL, config.with_params(mr=99)))
    assert "unknown parameters" in str(outside_domain(KERNEL, config.with_params(warps=4)))

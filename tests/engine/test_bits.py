"""Under `reproducible` a token has the same bits alone, in any batch, in any order, process, form and bucket.

One check finds every row of many batches equal to the same row alone; other classes must fail that very check.
Ranks are in test_ranks.py.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from tests.engine.tables import Weights, decided
from tests.torchrun.launch import ROOT, environment
from tilecast.autotune.classes import same_bits
from tilecast.cache_store.bundle import export_table
from tilecast.engine import runtime
from tilecast.engine.experts import prepare_experts
from tilecast.engine.functional import fused_experts
from tilecast.engine.runtime import use_table
from tilecast.environment import cpu_environment
from tilecast.evidence import TuningTable
from tilecast.kernels import registry
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

DTYPES = ["fp32", "bf16", "fp16"]
BUCKETS = (1, 3, 8, 24, 64)
TOKENS = BUCKETS[-1]
SHAPE = ExpertLayer(hidden=608, intermediate=336, experts=4, top_k=2)
"""K of both GEMMs is longer than a chain and no multiple of one."""

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def layer_of(dtype: str) -> ExpertLayer:
    return replace(SHAPE, dtype=dtype)


def wide(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Random signs and mantissas, exponents over eleven powers of two: any other order of summation shows."""
    mantissa = torch.rand(shape, generator=generator) + 1
    sign = torch.randint(2, shape, generator=generator) * 2 - 1
    return torch.ldexp(mantissa * sign, torch.randint(-11, 0, shape, generator=generator))


def cancelling(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Weights whose second half of K repeats the first, nearly: rows that turn its sign cancel large sums."""
    values, half = wide(generator, *shape), shape[-1] // 2
    values[..., half : 2 * half] = values[..., :half] * (1 + 2**-5 * torch.rand(half, generator=generator))
    return values


@cache
def weights_of(dtype: str) -> Weights:
    layer, generator = layer_of(dtype), torch.Generator().manual_seed(3)
    w13 = cancelling(generator, layer.experts, layer.up.n, layer.up.k)
    w2 = cancelling(generator, layer.experts, layer.down.n, layer.down.k)
    return Weights(w13.to(TORCH_DTYPES[dtype]), w2.to(TORCH_DTYPES[dtype]), None, None)


@cache
def operands_of(dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layer, generator = layer_of(dtype), torch.Generator().manual_seed(4)
    hidden, half = wide(generator, TOKENS, layer.hidden), layer.hidden // 2
    hidden[:, half : 2 * half] = -hidden[:, :half]
    ids = torch.rand(TOKENS, layer.experts, generator=generator).argsort(1)[:, : layer.top_k].to(torch.int32)
    return hidden.to(TORCH_DTYPES[dtype]), ids, torch.rand(TOKENS, layer.top_k, generator=generator)


@cache
def configs(gemm: ExpertGemm) -> tuple[TileConfig, ...]:
    """Valid configs of the default's layout and class, as different from each other as the space offers."""
    here = cpu_environment()
    kernel = registry.default_kernel(gemm, here)
    default = kernel.default(gemm, 1, here)
    found: dict[tuple[object, ...], TileConfig] = {}
    for tokens in BUCKETS:
        for config in kernel.space(gemm, tokens, here):
            alike = all(config[name] == default[name] for name in ("layout", "dot"))
            if alike and registry.invalid(gemm, config, here) is None:
                found.setdefault((config["mr"], config["nv"]), config)
                found.setdefault((config["block_n"], config["prefetch"], config["stage"]), config)
    distinct = list(dict.fromkeys(found.values()))
    return tuple(distinct[number * (len(distinct) - 1) // (len(BUCKETS) - 1)] for number in range(len(BUCKETS)))


def mixed_table(turn: int = 0) -> TuningTable:
    """A table whose buckets all have different configs; `turn` says which bucket has which."""

    def choose(gemm: ExpertGemm, tokens: int) -> TileConfig:
        return configs(gemm)[(BUCKETS.index(tokens) + turn) % len(BUCKETS)]

    return decided(*map(layer_of, DTYPES), tokens=BUCKETS, choose=choose)


def prepared(dtype: str, weights: Weights | None = None, policy: str | None = None) -> Run:
    w = weights or weights_of(dtype)
    return prepare_experts(w.w13, w.w2, top_k=SHAPE.top_k, policy=policy)


def functional(dtype: str) -> Run:
    w = weights_of(dtype)
    return lambda hidden, ids, scales: fused_experts(hidden, w.w13, w.w2, ids, scales)


def rows_alone(run: Run, dtype: str) -> torch.Tensor:
    hidden, ids, scales = operands_of(dtype)
    return torch.cat([run(hidden[t : t + 1], ids[t : t + 1], scales[t : t + 1]) for t in range(TOKENS)])


def batches_that_differ(run: Run, alone: torch.Tensor, dtype: str) -> list[int]:
    """The check: the sizes, of batches of 1 to 64 tokens in random order, with a row that is not as it was alone."""
    hidden, ids, scales = operands_of(dtype)
    generator = torch.Generator().manual_seed(5)
    differing = []
    for size in range(1, TOKENS + 1):
        rows = torch.randperm(TOKENS, generator=generator)[:size]
        if not same_bits(run(hidden[rows], ids[rows], scales[rows]), alone[rows]):
            differing.append(size)
    return differing


def digests() -> dict[str, str]:
    """The bits of whole batches with the table in use."""
    found = {}
    for dtype in DTYPES:
        out = prepared(dtype)(*operands_of(dtype))
        found[dtype] = hashlib.sha256(out.view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_same_alone_and_in_batches_of_any_size_and_order(dtype: str) -> None:
    use_table(mixed_table(), miss="error")
    entries = [runtime.lookup(layer_of(dtype), tokens) for tokens in BUCKETS]
    assert len({entry.up for entry in entries}) == len({entry.down for entry in entries}) == len(BUCKETS)
    run = prepared(dtype)
    alone = rows_alone(run, dtype)
    assert torch.isfinite(alone).all() and len(alone.unique()) > alone.numel() // 50
    assert batches_that_differ(run, alone, dtype) == []
    assert batches_that_differ(functional(dtype), alone, dtype) == []
    assert runtime.misses() == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_same_through_every_buckets_config(dtype: str) -> None:
    use_table(None)
    wanted = prepared(dtype)(*operands_of(dtype))
    for turn in range(len(BUCKETS)):
        use_table(mixed_table(turn), miss="error")
        for run in (prepared(dtype), functional(dtype)):
            for size in (*BUCKETS, *(edge - 1 for edge in BUCKETS[1:])):
                assert same_bits(run(*(operand[:size] for operand in operands_of(dtype))), wanted[:size])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_sums_in_reversed_order_fail_the_check(dtype: str) -> None:
    """For each GEMM alone: K reversed in rows and weights is the same layer, in another class."""
    use_table(mixed_table())
    w, alone = weights_of(dtype), rows_alone(prepared(dtype), dtype)
    backward = prepared(dtype, w._replace(w13=w.w13.flip(-1)))
    differing = batches_that_differ(lambda hidden, *routed: backward(hidden.flip(-1), *routed), alone, dtype)
    assert differing == list(range(1, TOKENS + 1))
    order = torch.arange(SHAPE.intermediate).flip(0)
    columns = torch.cat([order, order + SHAPE.intermediate])
    permuted = prepared(dtype, w._replace(w13=w.w13[:, columns].contiguous(), w2=w.w2.flip(-1)))
    assert len(batches_that_differ(permuted, alone, dtype)) > TOKENS // 2
    torch.testing.assert_close(rows_alone(permuted, dtype), alone, rtol=0.05, atol=float(alone.abs().max()) * 0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_librarys_kernel_fails_the_check(dtype: str) -> None:
    onednn = TileConfig("onednn.linear", {"prepack": "no", "row_block": 0})
    use_table(mixed_table())
    alone = rows_alone(prepared(dtype), dtype)
    use_table(decided(layer_of(dtype), tokens=BUCKETS, policy="fastest", choose=lambda gemm, tokens: onednn))
    foreign = prepared(dtype, policy="fastest")
    assert len(batches_that_differ(foreign, alone, dtype)) > TOKENS // 2


def test_rows_are_the_same_on_other_numbers_of_threads() -> None:
    use_table(mixed_table())
    before, wanted = torch.get_num_threads(), digests()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert digests() == wanted
    finally:
        torch.set_num_threads(before)


def test_rows_are_the_same_in_another_process(tmp_path: Path) -> None:
    table = mixed_table()
    export_table(table, tmp_path / "table.db")
    use_table(table)
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    code = "import json; from tests.engine.test_bits import digests; print(json.dumps(digests()))"
    variables = environment(tmp_path, TM_GEMM_IMPORT=str(tmp_path / "table.db"), TM_GEMM_MISS="error")
    done = run([sys.executable, "-c", code], env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == digests()

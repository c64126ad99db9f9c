from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_routing import REFUSED, REFUSED_NAMES
from tests.tensor_core import tensor_core
from tilecast import kernels
from tilecast.errors import InputError
from tilecast.kernels import routing
from tilecast.kernels.gpu import build, router
from tilecast.kernels.gpu.router import route_device

# A sigmoid's exp may overflow, to the infinity that is meant; the interpreter's NumPy says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")

SHAPES = [(1, 7, 1, 1), (3, 64, 8, 2), (5, 300, 60, 4), (33, 70, 17, 17), (2, 390, 130, 8)]
"""T, H, E, k: one expert, k = E, E that is no power of two, H that no block divides, more than one slice."""


def draw(tokens: int, hidden: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw rows and a router weight of very different sizes, so that another sum order gives other bits."""
    generator = torch.Generator().manual_seed(seed)

    def values(rows: int) -> torch.Tensor:
        sizes = torch.exp(torch.randn(rows, hidden, generator=generator))
        return torch.randn(rows, hidden, generator=generator) * sizes

    return values(tokens), values(experts) / hidden**0.5


def exact(rows: torch.Tensor, weight: torch.Tensor, scoring: str) -> torch.Tensor:
    logits = rows.double() @ weight.double().T
    return logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))


def assert_routes(ids: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor, renormalize: bool) -> None:
    """Hold a choice to exact scores [T, E]: as good as the best, in descending order, each expert once."""
    top_k = ids.shape[1]
    best = scores.topk(top_k, dim=-1).values
    mine = scores.gather(1, ids.long())
    torch.testing.assert_close(mine, best, rtol=1e-4, atol=1e-6)
    expected = best / best.sum(-1, keepdim=True) if renormalize else best
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-6)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    assert ids.is_contiguous()
    assert weights.is_contiguous()


@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), SHAPES)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP16, FP16), (BF16, FP32)], ids=["fp32", "fp16", "mixed"])
@pytest.mark.parametrize(("scoring", "renormalize"), [("softmax", True), ("sigmoid", False)])
def test_routes_like_float64_and_the_plain_router(
    tokens: int, hidden: int, experts: int, top_k: int, dtypes: tuple[torch.dtype, torch.dtype], scoring: str,
    renormalize: bool,
) -> None:  # fmt: skip
    rows, weight = (value.to(dtype) for value, dtype in zip(draw(tokens, hidden, experts), dtypes, strict=True))
    ids, weights = route_device(rows, weight, top_k, scoring=scoring, renormalize=renormalize)
    assert_routes(ids, weights, exact(rows, weight, scoring), renormalize)
    plain_ids, plain_weights = routing.route(rows, weight, top_k, scoring=scoring, renormalize=renormalize)
    # Sigmoid scores that round to 1 are ties in float32, broken by the lower expert in both.
    assert (ids == plain_ids).float().mean() > 0.97
    torch.testing.assert_close(weights, plain_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "scoring"), [(FP32, "sigmoid"), (BF16, "softmax"), (FP16, "sigmoid")])
def test_bits_of_a_token_do_not_depend_on_the_batch(
    dtype: torch.dtype, scoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tensor_core(group=16, fraction_bits=25):
        assert_bits_free_of_the_batch(dtype, scoring, monkeypatch)


def assert_bits_free_of_the_batch(dtype: torch.dtype, scoring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = (value.to(dtype) for value in draw(40, 300, 20))
    ids, weights = route_device(rows, weight, 4, scoring=scoring)
    assert_routes(ids, weights, exact(rows, weight, scoring), True)
    for start, stop in ((0, 1), (35, 40), (3, 37)):
        some_ids, some_weights = route_device(rows[start:stop], weight, 4, scoring=scoring)
        assert torch.equal(some_ids, ids[start:stop])
        assert same_bits(some_weights, weights[start:stop])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    moved_ids, moved_weights = route_device(rows[order], weight, 4, scoring=scoring)
    assert torch.equal(moved_ids, ids[order])
    assert same_bits(moved_weights, weights[order])
    # A batch too large for scratch: programs add their slices themselves.
    grids = []
    launch = build.Build.launch
    monkeypatch.setattr(
        build.Build, "launch", lambda self, grid, *args: (grids.append(grid), launch(self, grid, *args))[1]
    )
    monkeypatch.setattr(router, "SCRATCH_BYTES", 0)
    large_ids, large_weights = route_device(rows, weight, 4, scoring=scoring)
    assert grids[0][2] == 1
    assert torch.equal(large_ids, ids)
    assert same_bits(large_weights, weights)


@pytest.mark.parametrize("experts", [2, 60])
def test_ties_go_to_the_lower_expert(experts: int) -> None:
    top_k = min(10, experts)
    ids, weights = route_device(torch.ones(3, 16), torch.ones(experts, 16), top_k)
    assert ids.tolist() == [list(range(top_k))] * 3
    assert len(set(weights.flatten().tolist())) == 1
    weight = torch.zeros(experts, 16)
    weight[-1] = 1
    assert route_device(torch.ones(1, 16), weight, 2)[0].tolist() == [[experts - 1, 0]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_scores_that_are_no_numbers_choose_experts_that_exist(bad: float, scoring: str) -> None:
    rows, weight = draw(3, 16, 5)
    rows[1, 3] = bad
    ids, weights = route_device(rows, weight, 5, scoring=scoring)
    plain_ids, plain_weights = routing.route(rows, weight, 5, scoring=scoring)
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in ids.tolist())
    assert torch.equal(ids, plain_ids)
    torch.testing.assert_close(weights, plain_weights, equal_nan=True)


def test_one_bad_expert_of_many() -> None:
    rows, weight = torch.ones(1, 4), torch.arange(6.0)[:, None].expand(6, 4).clone() / 8
    weight[2] = torch.nan
    ids, weights = route_device(rows, weight, 3, scoring="sigmoid", renormalize=False)
    assert ids.tolist() == [[2, 5, 4]]
    assert torch.isnan(weights[0]).tolist() == [True, False, False]


def test_no_tokens() -> None:
    ids, weights = route_device(torch.empty(0, 64), torch.ones(8, 64), 2)
    assert ids.shape == weights.shape == (0, 2)


def test_sigmoid_at_the_ends() -> None:
    _, weights = route_device(
        torch.tensor([[1.0], [-1.0]]), torch.tensor([[80.0]]), 1, scoring="sigmoid", renormalize=False
    )
    assert weights[0].item() == 1.0
    assert 0 <= weights[1].item() < 1e-30


def test_renormalised_weights_are_divided_by_the_ordered_sum() -> None:
    rows, weight = draw(20, 40, 12)
    _, scores = route_device(rows, weight, 7, renormalize=False)
    _, weights = route_device(rows, weight, 7)
    assert same_bits(weights, scores / routing.ordered_sum(scores))


def test_strides_alignment_and_other_dtypes() -> None:
    rows, weight = draw(5, 33, 6)
    ids, weights = route_device(rows, weight, 2)
    shifted = torch.empty(rows.numel() + 1)[1:].view_as(rows).copy_(rows)
    for given_rows in (shifted, rows.T.contiguous().T, rows.double(), rows.clone().requires_grad_()):
        some_ids, some_weights = route_device(given_rows, weight, 2)
        assert torch.equal(some_ids, ids)
        assert same_bits(some_weights, weights)


def test_nothing_is_written_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output lies in a larger buffer of poison, which must survive around it."""
    empty, buffers = torch.empty, []

    def guarded(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 512,), -12345, dtype=dtype, device=device)
        buffers.append((buffer, size))
        return buffer[256 : 256 + size].view(shape)

    rows, weight = draw(33, 150, 70)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kw: guarded(*args, **kw) if "dtype" in kw else empty(*args, **kw))
        for limit in (0, 1 << 20):
            patch.setattr(router, "SCRATCH_BYTES", limit)
            ids, _ = route_device(rows, weight, 5)
    assert len(buffers) == 6
    assert bool(((ids >= 0) & (ids < 70)).all())
    for buffer, size in buffers:
        assert bool((buffer[:256] == -12345).all())
        assert bool((buffer[256 + size :] == -12345).all())
        assert not bool((buffer[256 : 256 + size] == -12345).any())


@given(st.integers(1, 40_000), st.integers(1, 1024), st.sampled_from([(FP32, FP32), (FP16, FP16), (BF16, FP32)]))
@settings(max_examples=200)
def test_slices_cover_k_and_are_no_single_dots(
    hidden: int, experts: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    built = router.builds(
        hidden=hidden, experts=experts, top_k=1, hidden_dtype=dtypes[0], weight_dtype=dtypes[1], scoring="softmax",
        renormalize=True,
    )  # fmt: skip
    constants = dict(built.logits.constants)
    count, width = router.slices(built.logits), int(constants["STEPS"]) * int(constants["BLOCK_K"])  # type: ignore[arg-type]
    assert (count - 1) * width < hidden <= count * width
    assert count <= router.MAX_SLICES
    assert int(constants["STEPS"]) >= 2  # type: ignore[arg-type]


@pytest.mark.parametrize(REFUSED_NAMES, REFUSED)
def test_refuses(hidden: tuple[int, ...], weight: tuple[int, ...], top_k: int, scoring: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        route_device(torch.zeros(hidden), torch.zeros(weight), top_k, scoring=scoring)


def test_refuses_two_devices() -> None:
    with pytest.raises(InputError, match="hidden is on meta and router_weight on cpu"):
        route_device(torch.zeros(2, 8, device="meta"), torch.zeros(3, 8), 1)


def test_operands_on_the_cpu_take_the_plain_router() -> None:
    rows, weight = draw(3, 64, 8)
    for mine, plain in zip(kernels.route(rows, weight, 2), routing.route(rows, weight, 2), strict=True):
        assert torch.equal(mine, plain)


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilecast.kernels.gpu import router, sorting
from tilecast.kernels.gpu.target import parse_target

def compiled(build, name):
    target, kernel, types = parse_target(name), build.kernel, dict(build.signature)
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    assert set(signature) == set(types) | set(dict(build.constants)), build.function
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if signature[arg][0] == "*"}
    source = ASTSource(kernel, signature, dict(build.constants), aligned)
    made = triton.compile(
        source, target=GPUTarget(target.kind, target.triton_arch, target.warp_size), options=build.triton_options
    )
    assert made.metadata.shared <= target.shared_bytes, (build.function, name)
    return made

def routers(experts, hidden, top_k, rows, weight, scoring):
    return router.builds(hidden=hidden, experts=experts, top_k=top_k, hidden_dtype=rows, weight_dtype=weight,
                         scoring=scoring, renormalize=True)

MANY = [*sorting.builds(60), *routers(128, 4096, 8, torch.bfloat16, torch.bfloat16, "softmax")]
MORE = [*sorting.builds(1024), *sorting.builds(1), *routers(1, 33, 1, torch.float16, torch.float16, "sigmoid"),
        *routers(60, 2048, 4, torch.bfloat16, torch.float32, "sigmoid")]
for name in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"):
    for build in MANY + (MORE if name == "cuda:90" else []):
        assembly = compiled(build, name).asm
        if name == "cuda:90" and build.function == "make_logits":
            # One instruction family for all tiles, and none of lower precision where float32 is asked for.
            wide = dict(build.constants)["WIDE"]
            assert ("mma.sync" in assembly["ptx"]) is not wide, build.constants
            assert "wgmma" not in assembly["ptx"]
            assert "tf32" not in assembly["ptx"]
print("compiled")
"""


@pytest.mark.slow
def test_all_kernels_compile_for_every_kind_of_target() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP32)])
def test_on_a_device(dtypes: tuple[torch.dtype, torch.dtype], scoring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_rows, cpu_weight = (value.to(dtype) for value, dtype in zip(draw(700, 2048, 128), dtypes, strict=True))
    rows, weight = cpu_rows.cuda(), cpu_weight.cuda()
    ids, weights = kernels.route(rows, weight, 8, scoring=scoring)
    assert_routes(ids.cpu(), weights.cpu(), exact(cpu_rows, cpu_weight, scoring), True)
    for part in (slice(0, 1), slice(33, 40), slice(100, 700)):
        some_ids, some_weights = route_device(rows[part], weight, 8, scoring=scoring)
        assert torch.equal(some_ids, ids[part])
        assert same_bits(some_weights, weights[part])
    monkeypatch.setattr(router, "SCRATCH_BYTES", 0)
    large_ids, large_weights = route_device(rows, weight, 8, scoring=scoring)
    assert torch.equal(large_ids, ids)
    assert same_bits(large_weights, weights)

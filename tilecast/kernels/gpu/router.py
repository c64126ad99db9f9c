"""The router on a GPU: float32 logits and top-k in two launches, with bits that are free of the batch.

Tile shapes and the slices of K depend on H, E and the dtypes only. A batch so large that the slices' products would
take too much memory has them added by the programs that make them, in the same order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from tilecast.errors import InputError
from tilecast.kernels.gpu.build import Build, Constant
from tilecast.kernels.gpu.sorting import aligned
from tilecast.kernels.routing import check_router

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What the kernels read as it is; other floats are brought to float32 first."""
BLOCK_T = 32
"""Tokens of a tile. Below 64, so that sm_90 has one instruction for all tiles."""
MAX_BLOCK_E = 64
SLICE, MAX_SLICES = 128, 64
"""Elements of K in a slice, unless that makes more slices than this."""
SCRATCH_BYTES = 32 << 20
"""Bound of the slices' products; above it, each program adds its slices itself."""


class Builds(NamedTuple):
    """The router's kernels for one shape."""

    logits: Build
    choose: Build


@lru_cache(maxsize=256)
def builds(
    *,
    hidden: int,
    experts: int,
    top_k: int,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    scoring: str,
    renormalize: bool,
) -> Builds:
    """Return both kernels, for any number of tokens and any target. Dtypes are those of TYPE_NAMES."""
    wide = hidden_dtype != weight_dtype or hidden_dtype == torch.float32
    block_k = 32 if wide else 64
    steps = max(SLICE, -(-hidden // MAX_SLICES)) // block_k
    if steps * block_k * MAX_SLICES < hidden:
        steps += 1
    lanes = 1 << (experts - 1).bit_length()
    pointers = (("hidden", f"*{TYPE_NAMES[hidden_dtype]}"), ("weight", f"*{TYPE_NAMES[weight_dtype]}"))
    logits = Build(
        module="_router",
        function="make_logits",
        signature=(*pointers, ("logits", "*fp32"), ("tokens", "i32"), ("slices_each", "i32")),
        constants=(
            ("HIDDEN", hidden),
            ("EXPERTS", experts),
            ("WIDE", wide),
            ("BLOCK_T", BLOCK_T),
            ("BLOCK_E", min(MAX_BLOCK_E, max(16, lanes))),
            ("BLOCK_K", block_k),
            ("STEPS", steps),
        ),
        num_warps=4,
        num_stages=3,
    )
    choice: dict[str, Constant] = {
        "EXPERTS": experts,
        "LANES": lanes,
        "TOP_K": top_k,
        "CHOSEN": 1 << (top_k - 1).bit_length(),
        "SIGMOID": scoring == "sigmoid",
        "RENORMALIZE": renormalize,
    }
    choose = Build(
        module="_router",
        function="choose",
        signature=(("logits", "*fp32"), ("ids", "*i32"), ("weights", "*fp32"), ("tokens", "i32"), ("parts", "i32")),
        constants=tuple(choice.items()),
        num_warps=min(8, max(1, lanes // 256)),
        num_stages=1,
    )
    return Builds(logits=logits, choose=choose)


def route_device(
    hidden: torch.Tensor,
    router_weight: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do on a GPU what `tilecast.kernels.routing.route` does: ids (int32 [T, k]) and weights (float32 [T, k]).

    hidden [T, H] and router_weight [E, H] of one 16-bit dtype are multiplied on tensor cores, all others in float32.
    A token's bits do not depend on T or its place. Ids are distinct and in [0, E) also where scores are NaN.
    Raises InputError.
    """
    check_router(hidden, router_weight, top_k, scoring)
    if hidden.device != router_weight.device:
        raise InputError(f"hidden is on {hidden.device} and router_weight on {router_weight.device}, expected one")
    rows, weight = _readable(hidden), _readable(router_weight)
    tokens, width = rows.shape
    experts, device = weight.shape[0], rows.device
    kernels = builds(
        hidden=width, experts=experts, top_k=top_k, hidden_dtype=rows.dtype, weight_dtype=weight.dtype,
        scoring=scoring, renormalize=renormalize,
    )  # fmt: skip
    count = slices(kernels.logits)
    parts = count if 4 * count * tokens * experts <= SCRATCH_BYTES else 1
    logits = _scratch((parts, tokens, experts), device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    block_e = _integer(kernels.logits, "BLOCK_E")
    grid = (-(-tokens // BLOCK_T), -(-experts // block_e), parts)
    kernels.logits.launch(grid, device, rows, weight, logits, tokens, count // parts)
    kernels.choose.launch((tokens,), device, logits, ids, weights, tokens, parts)
    return ids, weights


def slices(logits: Build) -> int:
    """Return how many slices of K a logit is summed from; more than one where there is more than one."""
    return -(-_integer(logits, "HIDDEN") // (_integer(logits, "STEPS") * _integer(logits, "BLOCK_K")))


def _readable(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix as the kernels read it: a known dtype, contiguous, on a 16-byte boundary, without grad."""
    known = matrix.detach() if matrix.dtype in TYPE_NAMES else matrix.detach().to(torch.float32)
    return aligned(known)


def _scratch(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _integer(build: Build, name: str) -> int:
    value = dict(build.constants)[name]
    assert isinstance(value, int)
    return value

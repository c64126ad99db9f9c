"""What `onednn.linear` does when it runs: weights in oneDNN's blocked layout, and the library calls of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import Any

import torch

from tilecast.kernels.reference import activate
from tilecast.kernels.routing import ExpertLayout, ordered_sum
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import TileConfig

PACK_ROWS = 64
"""Row count that the library packs for. With hints of 4 to 256 rows, 1 to 256 rows took the same time within
noise (fp32, N=2048, K=1024, AVX2); packed for 1 row, 4 rows took twice as long."""


def packed(weights: GemmWeights) -> tuple[torch.Tensor, ...]:
    """Return plain weights [E, N, K] as E oneDNN tensors."""
    with torch.no_grad():
        return tuple(prepack(weight, PACK_ROWS) for weight in weights.data)


def unpacked(weights: GemmWeights) -> torch.Tensor:
    """Return oneDNN tensors as plain weights [E, N, K], bit for bit."""
    with torch.no_grad():
        return torch.stack([weight.to_dense() for weight in weights.data])


def up(config: TileConfig, hidden: torch.Tensor, weights: GemmWeights, route: ExpertLayout, out: torch.Tensor) -> None:
    """Run the up GEMM: hidden [T, H] to out [T·k, I] in slot order; rows of absent slots are left as is."""
    layer = weights.gemm.layer
    with _exact_library():
        for slots, product in _products(config, hidden, weights, route, rows_per_token=route.top_k):
            gate = product[:, : layer.intermediate]
            value = activate(gate, product[:, layer.intermediate :] if layer.gated else None, layer.activation)
            out.index_copy_(0, slots, value.to(out.dtype))


def down(
    config: TileConfig,
    intermediate: torch.Tensor,
    weights: GemmWeights,
    route: ExpertLayout,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Run the down GEMM and the ordered combine: intermediate [T·k, I] to out [T, H] (its dtype or float32)."""
    scale = topk_weights.reshape(-1, 1)
    with _exact_library():
        partial = torch.zeros(route.tokens * route.top_k, weights.gemm.n, dtype=torch.float32, device="cpu")
        for slots, product in _products(config, intermediate, weights, route, rows_per_token=1):
            partial.index_copy_(0, slots, product * scale[slots])
        by_token = partial.view(route.tokens, route.top_k, weights.gemm.n)
        # ordered_sum works on the last dimension.
        out.copy_(ordered_sum(by_token.transpose(1, 2)).squeeze(-1))


def _products(
    config: TileConfig, rows: torch.Tensor, weights: GemmWeights, route: ExpertLayout, *, rows_per_token: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (slots int64 [n], product float32 [n, N] with bias) per block; slot s reads row s // rows_per_token."""
    offsets = route.offsets.tolist()
    slots = route.slots[: offsets[-1]].long()
    gathered = rows.index_select(0, slots.div(rows_per_token, rounding_mode="floor"))
    block = config.integer("row_block")
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        step = block or max(1, end - begin)
        for start in range(begin, end, step):
            stop = min(start + step, end)
            product = _linear(_padded(gathered[start:stop], block), weights.data, expert)[: stop - start].float()
            if weights.bias is not None:
                product = product + weights.bias[expert].float()
            yield slots[start:stop], product


def prepack(weight: torch.Tensor, rows: int | None) -> torch.Tensor:
    """Return one weight [N, K] in oneDNN's blocked layout for about `rows` rows: an opaque tensor, a copy.

    Raises RuntimeError where the library cannot; ask `cannot_prepack_here` first.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def prepacked_linear(rows: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return rows [n, K] times a prepacked weight [N, K] transposed, [n, N] in the rows' dtype."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return product


def cannot_prepack_here(dtype: str) -> str | None:
    """Return why this process cannot use oneDNN's blocked weights for a dtype."""
    library = torch.ops.mkldnn
    if not torch._C._has_mkldnn or not hasattr(library, "_reorder_linear_weight"):
        return "this PyTorch has no oneDNN linear on prepacked weights"
    checks = {"bf16": library._is_mkldnn_bf16_supported, "fp16": library._is_mkldnn_fp16_supported}
    if dtype in checks and not checks[dtype]():
        return f"oneDNN has no {dtype} linear on prepacked weights for this CPU"
    return None


def _linear(rows: torch.Tensor, data: torch.Tensor | Sequence[torch.Tensor], expert: int) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return torch.mm(rows, data[expert].t())
    return prepacked_linear(rows, data[expert])


def _padded(rows: torch.Tensor, block: int) -> torch.Tensor:
    """Return `rows` with zero rows added up to `block` (0: as they are)."""
    missing = block - rows.shape[0]
    if missing <= 0:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])


def _exact_library() -> AbstractContextManager[object]:
    """Return a context without autograd and autocast, in which float32 products are not narrowed.

    A process may have asked for bf16 inside float32 products (`torch.set_float32_matmul_precision`) or be in an
    autocast region; both would change this kernel's numerics class behind its back.
    """
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled("cpu"):
        stack.enter_context(torch.autocast("cpu", enabled=False))
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    narrowed = getattr(matmul, "fp32_precision", "none")
    if narrowed in ("bf16", "tf32"):
        stack.callback(setattr, matmul, "fp32_precision", narrowed)
        matmul.fp32_precision = "ieee"
    return stack

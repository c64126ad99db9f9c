"""Batch-invariant forms of torch's operations: a row's bits depend on nothing but the row.

`REPLACEMENTS` has them by operator; `linear` and `scaled_dot_product` are what `F.linear` and
`F.scaled_dot_product_attention` are replaced with while they are whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from tilecast.kernels.attend import attend, multiply
from tilecast.kernels.cpu.rows import row_sum
from tilecast.kernels.gpu import rowwise
from tilecast.kernels.ranges import KeyRanges, causal_ranges, full_ranges, ranges_of

aten = torch.ops.aten

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUM_CHUNK = 1 << 14
"""Longest sum that torch is given whole: it cuts longer ones over threads where there are few rows."""

SCORES_RANK = 4
"""Rank of attention scores written out: their softmax runs over padding too, so it depends on the batch."""


# Products -----------------------------------------------------------------------------------------------------


def multiplies(tensor: torch.Tensor) -> bool:
    """Whether the kernels take a tensor: its dtype, and a device that they run on."""
    return tensor.dtype in KERNEL_DTYPES and tensor.device.type in ("cpu", "cuda")


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Do what `F.linear` does: rows [..., K], weight [N, K], bias [N]."""
    flat = rows.reshape(1, -1, rows.shape[-1])
    out = multiply(flat, weight.detach().unsqueeze(0), None if bias is None else bias.detach().unsqueeze(0))
    return out.view(*rows.shape[:-1], weight.shape[0])


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """Return a [B, M, K] · b [B, K, N], or NotImplemented for dtypes that the kernels lack."""
    if not multiplies(a) or a.dtype != b.dtype or (bias is not None and bias.dtype != a.dtype):
        return NotImplemented
    if a.shape[-1] == 1 and bias is None:
        # One product an element, rounded once: rotary embeddings come this way.
        return a * b
    return multiply(a, b.transpose(1, 2), bias)


def _mm(func: Any, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    out = _product(a.unsqueeze(0), b.unsqueeze(0))
    return out if out is NotImplemented else out.squeeze(0)


def _bmm(func: Any, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _product(a, b)


def _addmm(func: Any, added: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> Any:
    if any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta")) or set(kwargs) - {"alpha", "beta"}:
        return NotImplemented
    if added.dim() == 1:
        out = _product(a.unsqueeze(0), b.unsqueeze(0), added.expand(b.shape[1]).unsqueeze(0))
        return out if out is NotImplemented else out.squeeze(0)
    return _added(_mm(func, a, b), added)


def _baddbmm(func: Any, added: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> Any:
    if kwargs.get("beta", 1) == 0 and not set(kwargs) - {"alpha", "beta"}:
        out = _product(a, b)
        alpha = kwargs.get("alpha", 1)
        return out if out is NotImplemented or alpha == 1 else out * alpha
    if any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return NotImplemented
    return _added(_product(a, b), added)


def _added(product: Any, added: torch.Tensor) -> Any:
    return product if product is NotImplemented else product + added


def _mv(func: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
    out = _product(a.unsqueeze(0), b.view(1, -1, 1))
    return out if out is NotImplemented else out.view(a.shape[0])


def _linear(func: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    if not multiplies(rows) or rows.dtype != weight.dtype or (bias is not None and bias.dtype != rows.dtype):
        return NotImplemented
    return linear(rows, weight, bias)


def _convolution(
    func: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> Any:  # fmt: skip
    """Convolve each channel [B, C, T] with its own taps [C, 1, W], summed from the first to the last in float32."""
    alone = rows.dim() == 3 and weight.shape[1] == 1 and groups == rows.shape[1] == weight.shape[0]
    plain = not transposed and list(stride) == [1] and list(dilation) == [1]
    if not (alone and plain and multiplies(rows) and rows.dtype == weight.dtype):
        return NotImplemented
    taps, spread = weight.float(), F.pad(rows.float(), (padding[0], padding[0]))
    length = spread.shape[-1] - weight.shape[-1] + 1
    out = torch.zeros((), dtype=torch.float32)
    for tap in range(weight.shape[-1]):
        out = out + spread[..., tap : tap + length] * taps[:, :, tap]
    out = out if bias is None else out + bias.float()[:, None]
    return out.to(rows.dtype)


# Reductions over the last dimension -----------------------------------------------------------------------------


def _row_sum(rows: torch.Tensor) -> torch.Tensor:
    """Return float sums over the last dimension of contiguous rows, in an order set by their length alone."""
    length = rows.shape[-1]
    if _on_gpu(rows):
        return rowwise.row_sum(rows)
    if length > SUM_CHUNK:
        chunks = -(-length // SUM_CHUNK)
        padded = F.pad(rows, (0, chunks * SUM_CHUNK - length))
        return _row_sum(_row_sum(padded.view(*rows.shape[:-1], chunks, SUM_CHUNK)))
    # The order that norms have on their own kernel, too.
    return row_sum(rows.contiguous()) if rows.dtype == torch.float32 else rows.sum(-1)


def _root(x: torch.Tensor) -> torch.Tensor:
    """Return float32 square roots rounded once, as torch's own, where a vector library computes them, are not."""
    return x.double().sqrt().float()


def _rows_last(tensor: torch.Tensor, dims: Any) -> tuple[torch.Tensor, list[int], list[int]]:
    """Return (contiguous rows with the reduced dimensions last and joined, the reduced and the kept dimensions)."""
    rank = tensor.dim()
    chosen = list(range(rank)) if not dims and dims != 0 else [dims] if isinstance(dims, int) else list(dims)
    reduced = sorted(d % rank for d in chosen) if rank else []
    kept = [d for d in range(rank) if d not in reduced]
    rows = tensor.permute(*kept, *reduced).contiguous() if rank else tensor
    return rows.reshape([tensor.shape[d] for d in kept] + [-1]), reduced, kept


def _sum(func: Any, tensor: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    floats = tensor.dtype.is_floating_point and (dtype is None or dtype.is_floating_point)
    wanted = dtype or tensor.dtype
    known = tensor.device.type == "cpu" or (_on_gpu(tensor) and wanted in KERNEL_DTYPES)
    if not floats or tensor.numel() == 0 or not known:
        return NotImplemented
    rows, reduced, _ = _rows_last(tensor, dim)
    out = _row_sum(rows.float() if wanted in KERNEL_DTYPES else rows.to(wanted)).to(wanted)
    if keepdim:
        for d in reduced:
            out = out.unsqueeze(d)
    return out


def _mean(func: Any, tensor: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    wanted = dtype or tensor.dtype
    computed = torch.float32 if wanted in KERNEL_DTYPES else wanted
    total = _sum(func, tensor, dim, keepdim, dtype=computed)
    if total is NotImplemented:
        return total
    return (total / (tensor.numel() // max(1, total.numel()))).to(wanted)


def _softmax_parts(tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (scores less the largest, their exp, the exp's sum), all float32 with the dimension last."""
    rows = tensor.movedim(dim, -1).contiguous().float()
    lowered = rows - rows.amax(-1, keepdim=True)
    weights = lowered.exp()
    return lowered, weights, _row_sum(weights).unsqueeze(-1)


def _softmax(func: Any, tensor: torch.Tensor, dim: int, half_to_float: bool) -> Any:
    if not multiplies(tensor) or tensor.dim() in (0, SCORES_RANK) or tensor.numel() == 0:
        return NotImplemented
    wanted = torch.float32 if half_to_float else tensor.dtype
    if _on_gpu(tensor):
        return rowwise.softmax(tensor.movedim(dim, -1).float()).to(wanted).movedim(-1, dim)
    _, weights, total = _softmax_parts(tensor, dim)
    return (weights / total).to(wanted).movedim(-1, dim)


def _log_softmax(func: Any, tensor: torch.Tensor, dim: int, half_to_float: bool) -> Any:
    if not multiplies(tensor) or tensor.dim() in (0, SCORES_RANK) or tensor.numel() == 0:
        return NotImplemented
    wanted = torch.float32 if half_to_float else tensor.dtype
    if _on_gpu(tensor):
        return rowwise.softmax(tensor.movedim(dim, -1).float(), log=True).to(wanted).movedim(-1, dim)
    lowered, _, total = _softmax_parts(tensor, dim)
    return (lowered - total.log()).to(wanted).movedim(-1, dim)


def _layer_norm(func: Any, tensor: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    if not multiplies(tensor) or len(shape) != 1 or tensor.numel() == 0:
        return NotImplemented
    rows = tensor.contiguous().float()
    mean = _row_sum(rows).unsqueeze(-1) / shape[0]
    centred = rows - mean
    scale = 1 / _root(_row_sum(centred * centred).unsqueeze(-1) / shape[0] + eps)
    out = centred * scale
    out = out if weight is None else out * weight.float()
    out = out if bias is None else out + bias.float()
    return out.to(tensor.dtype), mean, scale


def _rms_norm(func: Any, tensor: torch.Tensor, shape: Any, weight: Any, eps: float | None) -> Any:
    if not multiplies(tensor) or len(shape) != 1 or tensor.numel() == 0:
        return NotImplemented
    rows = tensor.contiguous().float()
    least = torch.finfo(tensor.dtype).eps if eps is None else eps
    scale = 1 / _root(_row_sum(rows * rows).unsqueeze(-1) / shape[0] + least)
    out = rows * scale
    return (out if weight is None else out * weight.float()).to(tensor.dtype), scale


# Elementwise ------------------------------------------------------------------------------------------------------


def _elementwise(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement that computes in float32, from operations that no element's place in memory changes.

    `compute` returns NotImplemented where there are none: on GPUs all but exact ones have to be kernels of our own.
    """

    def replacement(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not multiplies(tensor):
            return NotImplemented
        out = compute(tensor.float(), *args, **kwargs)
        if out is NotImplemented:
            return out
        out = out.to(tensor.dtype)
        return tensor.copy_(out) if str(func.name()).partition(".")[0].endswith("_") else out

    return replacement


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return rowwise.function_of("sigmoid", x) if _on_gpu(x) else 1 / ((-x).exp() + 1)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return rowwise.function_of("silu", x) if _on_gpu(x) else x / ((-x).exp() + 1)


def _only_on_gpu(kind: str) -> Callable[..., Any]:
    """Return a replacement for a function that torch's own is left to on CPUs: it is among those measured."""
    return _elementwise(lambda x: rowwise.function_of(kind, x) if _on_gpu(x) else NotImplemented)


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    if _on_gpu(x):
        return rowwise.function_of("gelu_tanh" if approximate == "tanh" else "gelu", x)
    if approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return x * 0.5 * (inner.tanh() + 1)
    return x * 0.5 * ((x * math.sqrt(0.5)).erf() + 1)


def _softplus(x: torch.Tensor, beta: float = 1, threshold: float = 20) -> Any:
    if _on_gpu(x):
        return NotImplemented
    scaled = x * beta
    return torch.where(scaled > threshold, x, scaled.clamp(max=threshold).exp().log1p() / beta)


def _pow(func: Any, base: Any, exponent: Any) -> Any:
    """Return base^-½ as `rsqrt` gives it; of other exponents `matters` says whether torch's own will do."""
    if not isinstance(base, torch.Tensor) or isinstance(exponent, torch.Tensor) or exponent != -0.5:
        return NotImplemented
    return _rsqrt(func, base)


_rsqrt = _elementwise(lambda x: 1 / _root(x))


def _polar(func: Any, size: torch.Tensor, angle: torch.Tensor) -> Any:
    if not multiplies(angle):
        return NotImplemented
    if _on_gpu(angle):
        return torch.complex(*(size * rowwise.function_of(kind, angle.float()) for kind in ("cos", "sin")))
    return torch.complex(size * angle.cos(), size * angle.sin())


def _mul(func: Any, a: Any, b: Any) -> Any:
    """Multiply complex numbers with every product and sum rounded; real ones are left to torch."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_complex() and b.is_complex()):
        return NotImplemented
    if func._overloadname != "Tensor" or func.overloadpacket is not aten.mul:
        return NotImplemented
    return torch.complex(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    aten.polar: _polar, aten.mul: _mul, aten.mul_: _mul,
    aten.mm: _mm, aten.bmm: _bmm, aten.addmm: _addmm, aten.baddbmm: _baddbmm, aten.mv: _mv, aten.linear: _linear,
    aten.convolution: _convolution,
    aten.sum: _sum, aten.mean: _mean, aten._softmax: _softmax, aten._log_softmax: _log_softmax,
    aten.native_layer_norm: _layer_norm, aten._fused_rms_norm: _rms_norm,
    aten.sigmoid: _elementwise(_sigmoid), aten.sigmoid_: _elementwise(_sigmoid),
    aten.silu: _elementwise(_silu), aten.silu_: _elementwise(_silu),
    aten.gelu: _elementwise(_gelu), aten.gelu_: _elementwise(_gelu), aten.softplus: _elementwise(_softplus),
    aten.rsqrt: _rsqrt, aten.rsqrt_: _rsqrt, aten.pow: _pow, aten.pow_: _pow,
    aten.sqrt: _elementwise(lambda x: _root(x)), aten.sqrt_: _elementwise(lambda x: _root(x)),
    aten.exp: _only_on_gpu("exp"), aten.cos: _only_on_gpu("cos"), aten.sin: _only_on_gpu("sin"),
}  # fmt: skip
"""Invariant forms, by operator. Each takes the overload and its operands, and returns NotImplemented for operands that
it has no form for."""


# Attention ----------------------------------------------------------------------------------------------------------

_ranges: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Ranges by mask: all layers of a model get the same mask, and reading it costs as much as using it."""


def ranges_for(mask: torch.Tensor, batch: int, queries: int, keys: int) -> KeyRanges:
    """Return `ranges_of` a mask, kept as long as the mask is and stays as it is. Raises InputError."""
    key = (batch, queries, keys, mask.data_ptr(), 0 if mask.is_inference() else mask._version)
    known: Any = _ranges.get(mask)
    if known is None or known[0] != key or mask.is_inference():
        known = _ranges[mask] = (key, ranges_of(mask, batch, queries, keys))
    found: KeyRanges = known[1]
    return found


def scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Do what `F.scaled_dot_product_attention` does without dropout, of [..., H, T, D]. Raises InputError."""
    batch = query.shape[:-3]
    query, key, value = (t.reshape(-1, *t.shape[-3:]) if t.dim() > 2 else t[None, None] for t in (query, key, value))
    if attn_mask is not None:
        mask = attn_mask.reshape(-1, *attn_mask.shape[-3:]) if attn_mask.dim() > 4 else attn_mask
        ranges = ranges_for(mask, query.shape[0], query.shape[2], key.shape[2])
    else:
        ranges = causal_ranges(query, key) if is_causal else full_ranges(query, key)
    out = attend(query, key, value, ranges, scale=query.shape[-1] ** -0.5 if scale is None else scale)
    return out.reshape(*batch, *out.shape[-3:])

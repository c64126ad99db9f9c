"""What `llvm.moe_gemm` does when it runs: packing weights, and launching on a routing."""

from __future__ import annotations

import ctypes
import threading

import torch

from tilecast.errors import ConfigError, InputError
from tilecast.kernels.cpu._variant import ARGS, FLUSH_K, Variant
from tilecast.kernels.cpu.columns import column_bytes, padded_columns, padded_k
from tilecast.kernels.cpu.isa import Isa
from tilecast.kernels.cpu.jit import available_threads, load_variant, run
from tilecast.kernels.cpu.layouts import pack_bias, pack_panels, unpack_panels
from tilecast.kernels.cpu.moe_gemm import BLOCK_M, NAME, panel_columns
from tilecast.kernels.cpu.quantized import (
    PanelStack,
    Scales,
    generator_codes,
    pack_codes,
    row_stride,
    scale_words,
    scales_of,
    unpack_codes,
)
from tilecast.kernels.cpu.slots import Rows
from tilecast.kernels.cpu.tiles import most_vectors
from tilecast.kernels.dtypes import DTYPE_NAMES, TORCH_DTYPES
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import DTYPES, TileConfig


def packed(isa: Isa, weights: GemmWeights, panel: int) -> torch.Tensor | PanelStack:
    """Return plain weights in panels of so many columns."""
    if isinstance(weights.data, QuantizedStack):
        return pack_codes(weights.data, weights.gemm, panel, isa)
    return pack_panels(weights.data, weights.gemm, panel, isa.lanes)


def unpacked(isa: Isa, weights: GemmWeights) -> torch.Tensor | QuantizedStack:
    """Return weights in panels as plain ones, bit for bit."""
    if isinstance(weights.data, PanelStack):
        return unpack_codes(weights.data, weights.gemm, isa)
    return unpack_panels(weights.data, weights.gemm, isa.lanes)


_Block = ctypes.c_int64 * len(ARGS)


class Plan:
    """What stays the same between launches of one config on one stack of weights."""

    def __init__(self, isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: str) -> None:
        """Check the weights, and load the code; raises InputError for weights that are not what their layout says."""
        gemm, layer = weights.gemm, weights.gemm.layer
        panel = 0 if weights.layout == PLAIN else panel_columns(weights.layout)
        dot = "native" if config["dot"] == "bf16" else ""
        columns = padded_columns(gemm, isa.lanes)
        scales = _check_weights(isa, weights, columns, panel)
        block_n = min(config.integer("block_n"), columns)
        nv = config.integer("nv")
        self.variant = Variant(
            gemm=gemm.name, dtype=layer.dtype, out=out_dtype, activation=layer.activation if gemm.name == "up" else "",
            gated=layer.gated, bias=weights.bias is not None, mr=config.integer("mr"), nv=nv,
            max_nv=most_vectors(gemm, isa, nv, block_n),
            unroll=config.integer("unroll"), panel=panel, stage=bool(config["stage"]), dot=dot,
            prefetch=config.integer("prefetch"),
            lanes=isa.lanes, fma=isa.fma, codes=None if scales is None else generator_codes(gemm, scales, isa),
        )  # fmt: skip
        self.experts = layer.experts
        self.address = load_variant(self.variant)
        self.bias = pack_bias(weights.bias, gemm, isa.lanes) if weights.bias is not None else None
        pairs = panel > 0 and layer.dtype == "bf16"
        depth = padded_k(gemm, pairs=pairs)
        self.row_bytes = 4 * depth if self.variant.widens else DTYPES[layer.dtype] * gemm.k
        if self.variant.codes is not None:
            self.row_bytes = row_stride(gemm, self.variant.codes, depth)
        _, _, _, self.scratch_bytes = self.variant.scratch_layout(BLOCK_M, block_n)
        self.depth, self.k, self.dtype = depth, gemm.k, TORCH_DTYPES[layer.dtype]
        self.width = layer.intermediate if gemm.name == "up" else layer.hidden
        self.threads = config.integer("threads")
        fixed = {
            "experts": layer.experts, "k": gemm.k, "k_padded": depth,
            "weights": (weights.data.codes if weights.layout == PLAIN and scales else weights.data).data_ptr(),
            "bias": self.bias.data_ptr() if self.bias is not None else 0, "row_stride": self.row_bytes,
            "columns": columns, "width": self.width,
            "expert_stride": columns * column_bytes(gemm, depth) if panel else gemm.n * column_bytes(gemm, gemm.k),
            "panel_stride": panel * column_bytes(gemm, depth),
            "block_m": BLOCK_M, "block_n": block_n, "block_k": config.integer("block_k") or depth + FLUSH_K,
            "scratch_stride": self.scratch_bytes, **({} if scales is None else scale_words(scales)),
        }  # fmt: skip
        self.scales = scales
        self.template = _Block(*(fixed.get(name, 0) for name in ARGS))


KEPT_SCRATCH_BYTES = 64 << 20
"""Scratch above this is allocated for one launch and released after it."""


class _Scratch(threading.local):
    """Buffers of one Python thread, so that launches from several threads never share any."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, size: int) -> torch.Tensor:
        """Return at least `size` bytes, aligned to 64, contents undefined."""
        known = self.buffers.get(name)
        if known is not None and known.numel() >= size:
            return known
        fresh = torch.empty(size + 4096, dtype=torch.uint8)
        if size <= KEPT_SCRATCH_BYTES:
            self.buffers[name] = fresh
        return fresh


_scratch = _Scratch()


def take_scratch(name: str, size: int) -> torch.Tensor:
    """Return this Python thread's buffer of a name: at least `size` bytes to be had from a multiple of 64 on."""
    return _scratch.take(name, size)


def plan_of(isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> Plan:
    """Return the plan of launches into `out_dtype`, made once and kept with the weights. Raises as `launch` does."""
    key = (config, out_dtype)
    plan: Plan | None = weights.plans.get(key)
    if plan is None:
        if config["layout"] != weights.layout:
            raise ConfigError(f"{NAME}: the config reads layout {config['layout']}, the weights are {weights.layout}")
        plan = weights.plans[key] = Plan(isa, config, weights, DTYPE_NAMES[out_dtype])
    return plan


def launch(isa: Isa, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
    """Run one of the two GEMMs on a routing with at least one token. Raises InputError, ConfigError."""
    source, rows, out, scale = operands.source, operands.rows, operands.out, operands.scale
    plan = plan_of(isa, config, weights, out.dtype)
    if route.experts != plan.experts:
        raise InputError(f"{NAME}: slots are sorted over {route.experts} experts, the weights have {plan.experts}")
    _check("input", source, (rows, plan.k), plan.dtype)
    _check("output", out, (route.tokens if scale is not None else rows * route.top_k, plan.width), out.dtype)
    block = _Block.from_buffer_copy(plan.template)
    threads = available_threads() if plan.threads == 0 else min(plan.threads, available_threads())
    scratch = _scratch.take("threads", threads * plan.scratch_bytes)
    block[_THREADS] = threads
    block[_TOKENS], block[_TOP_K] = route.tokens, route.top_k
    block[_IDS], block[_SLOTS], block[_OFFSETS] = (
        route.ids.data_ptr(), route.slots.data_ptr(), route.offsets.data_ptr()
    )  # fmt: skip
    block[_SOURCE], block[_ROWS], block[_OUT] = source.data_ptr(), rows, out.data_ptr()
    block[_SCRATCH] = -(-scratch.data_ptr() // 64) * 64
    if plan.variant.widens:
        widened = _scratch.take("widened", rows * plan.row_bytes)
        block[_WIDENED] = widened.data_ptr()
    if scale is not None:
        _check("routing weights", scale, (route.tokens, route.top_k), torch.float32)
        # A vector's width beyond the last row is read, though never used.
        partial = _scratch.take("partial", 4 * (rows * plan.width + isa.lanes))
        block[_PARTIAL], block[_SCALE] = partial.data_ptr(), scale.data_ptr()
    run(plan.address, ctypes.addressof(block), threads)


def _check_weights(isa: Isa, weights: GemmWeights, columns: int, panel: int) -> Scales | None:
    """Return the scales of quantised weights; raises InputError unless weights are what their layout says."""
    gemm, data = weights.gemm, weights.data
    if gemm.layer.weight_format != "dense":
        return scales_of(weights, panel, isa)
    pairs = panel > 0 and gemm.layer.dtype == "bf16"
    size = columns * padded_k(gemm, pairs=pairs) if panel else gemm.n * gemm.k
    dtype, count = TORCH_DTYPES[gemm.layer.dtype], gemm.layer.experts * size
    if data.dtype != dtype or data.numel() != count or not data.is_contiguous() or data.device.type != "cpu":
        raise InputError(
            f"{NAME}: weights in layout {weights.layout} are {data.dtype} {tuple(data.shape)} on {data.device}, "
            f"expected {count} contiguous elements of {dtype} for {gemm.layer.label} {gemm.name}"
        )
    return None


def _check(what: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise InputError(
            f"{NAME}: {what} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
            f"expected contiguous {dtype} {shape}"
        )


(_THREADS, _TOKENS, _TOP_K, _IDS, _SLOTS, _OFFSETS) = (
    ARGS.index(name) for name in ("threads", "tokens", "top_k", "ids", "slots", "offsets")
)
(_SOURCE, _WIDENED, _SCALE, _PARTIAL, _OUT, _ROWS, _SCRATCH) = (
    ARGS.index(name) for name in ("source", "widened", "scale", "partial", "out", "rows", "scratch")
)

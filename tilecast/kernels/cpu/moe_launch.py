"""What `llvm.moe_gemm` does when it runs: packing weights, and launching on a routing."""

from __future__ import annotations

import ctypes

import torch

from tilecast.kernels.cpu._variant import ARGS, FLUSH_K, Variant
from tilecast.kernels.cpu.columns import column_bytes, padded_columns, padded_k
from tilecast.kernels.cpu.isa import Isa
from tilecast.kernels.cpu.jit import load_variant
from tilecast.kernels.cpu.launch import Plan as LaunchPlan
from tilecast.kernels.cpu.launch import check_stored, kept_plan
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
from tilecast.kernels.cpu.tiles import SHORTS, most_vectors
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


class Plan(LaunchPlan):
    """What stays the same between launches of one config on one stack of weights."""

    kernel = NAME

    def __init__(self, isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: str) -> None:
        """Check the weights, and load the code; raises InputError for weights that are not what their layout says."""
        super().__init__(isa, config, weights, out_dtype)
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
            max_nv=most_vectors(gemm, isa, nv, block_n, str(config["dot"])),
            unroll=config.integer("unroll"), panel=panel, stage=bool(config["stage"]), dot=dot,
            prefetch=config.integer("prefetch"),
            lanes=isa.lanes, fma=isa.fma,
            codes=None if scales is None else generator_codes(gemm, scales, isa, config["dot"] == SHORTS),
        )  # fmt: skip
        self.widens = self.variant.widens
        self.address = load_variant(self.variant)
        self.bias = pack_bias(weights.bias, gemm, isa.lanes) if weights.bias is not None else None
        pairs = panel > 0 and layer.dtype == "bf16"
        depth = padded_k(gemm, pairs=pairs)
        self.row_bytes = 4 * depth if self.widens else DTYPES[layer.dtype] * gemm.k
        if self.variant.codes is not None:
            self.row_bytes = row_stride(gemm, self.variant.codes, depth)
        _, _, _, self.scratch_bytes = self.variant.scratch_layout(BLOCK_M, block_n)
        self.depth = depth
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


def plan_of(isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> Plan:
    """Return the plan of launches into `out_dtype`, made once and kept with the weights. Raises as `launch` does."""
    return kept_plan(Plan, isa, config, weights, out_dtype)


def launch(isa: Isa, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
    """Run one of the two GEMMs on a routing with at least one token. Raises InputError, ConfigError."""
    plan_of(isa, config, weights, operands.out.dtype).launch(route, operands).run()


def _check_weights(isa: Isa, weights: GemmWeights, columns: int, panel: int) -> Scales | None:
    """Return the scales of quantised weights; raises InputError unless weights are what their layout says."""
    gemm, data = weights.gemm, weights.data
    if gemm.layer.weight_format != "dense":
        return scales_of(weights, panel, isa)
    pairs = panel > 0 and gemm.layer.dtype == "bf16"
    size = columns * padded_k(gemm, pairs=pairs) if panel else gemm.n * gemm.k
    check_stored(NAME, "weights", data, gemm.layer.experts * size, weights)
    return None

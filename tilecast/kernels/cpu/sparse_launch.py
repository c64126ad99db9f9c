"""What `llvm.sparse_experts` does when it runs: packing weights, and launching on a routing."""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from functools import cache

import torch

from tilecast.errors import InputError
from tilecast.kernels.cpu._dots import interleaved_length
from tilecast.kernels.cpu._screen import screened_bytes
from tilecast.kernels.cpu._screened import ScreenedUp
from tilecast.kernels.cpu._sparse import MORE_ARGS, SparseUp, SparseVariant
from tilecast.kernels.cpu._sparse_down import SparseDown
from tilecast.kernels.cpu._variant import ARGS, ENTRY, FLUSH_K, Variant
from tilecast.kernels.cpu.columns import gate_gemm, padded_columns, padded_k, pitch, row_pitch
from tilecast.kernels.cpu.isa import Isa
from tilecast.kernels.cpu.jit import load
from tilecast.kernels.cpu.launch import Plan as LaunchPlan
from tilecast.kernels.cpu.launch import check_stored, kept_plan
from tilecast.kernels.cpu.layouts import pack_bias
from tilecast.kernels.cpu.moe_gemm import BLOCK_M
from tilecast.kernels.cpu.screens import ScreenedStack, check_screened, pack_screened, unpack_screened
from tilecast.kernels.cpu.slots import Rows
from tilecast.kernels.cpu.sparse import GATES, NAME, NEURONS, SCREEN
from tilecast.kernels.cpu.sparse_layouts import SparseStack, pack_gated, pack_neurons, unpack_gated, unpack_neurons
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import DTYPES, TileConfig


def packed(isa: Isa, weights: GemmWeights, layout: str) -> torch.Tensor | SparseStack | ScreenedStack:
    """Return plain weights in one of the kernel's layouts."""
    if layout == NEURONS:
        return pack_neurons(weights.data, weights.gemm, isa.lanes)
    if layout == SCREEN:
        return pack_screened(weights.data, weights.gemm, isa.lanes)
    return pack_gated(weights.data, weights.gemm, GATES[layout], isa.lanes)


def unpacked(isa: Isa, weights: GemmWeights) -> torch.Tensor:
    """Return weights in one of the kernel's layouts as plain ones, bit for bit."""
    if weights.layout == NEURONS:
        return unpack_neurons(weights.data, weights.gemm, isa.lanes)
    if weights.layout == SCREEN:
        return unpack_screened(weights.data, weights.gemm, isa.lanes)
    return unpack_gated(weights.data, weights.gemm, isa.lanes)


_WORDS = (*ARGS, *MORE_ARGS)
_Block = ctypes.c_int64 * len(_WORDS)


@cache
def _load(variant: SparseVariant) -> int:
    """Return the address of a variant's entry function, compiled at first use."""
    kind = SparseDown if variant.dense.gemm == "down" else ScreenedUp if variant.screen else SparseUp
    return load(lambda module: kind(module, variant).build(), {"sparse": asdict(variant)}, ENTRY)


class Plan(LaunchPlan):
    """What stays the same between launches of one config on one stack of weights."""

    kernel = NAME
    words = {name: index for index, name in enumerate(_WORDS)}  # noqa: RUF012  # never changed

    def __init__(self, isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: str) -> None:
        """Check the weights, and load the code; raises InputError for weights that are not what their layout says."""
        super().__init__(isa, config, weights, out_dtype)
        gemm, layer = weights.gemm, weights.gemm.layer
        up, screen = gemm.name == "up", weights.layout == SCREEN
        self.columns = padded_columns(gate_gemm(gemm) if up else gemm, isa.lanes)
        _check_weights(isa, weights, self.columns)
        block_n = min(config.integer("block_n"), self.columns)
        nv = config.integer("nv")
        dense = Variant(
            gemm=gemm.name, dtype=layer.dtype, out=out_dtype, activation=layer.activation if up else "", gated=False,
            bias=weights.bias is not None, mr=config.integer("mr"), nv=nv,
            max_nv=max(nv, min(8, block_n // isa.lanes)) if up and not screen else 1, unroll=config.integer("unroll"),
            panel=GATES.get(weights.layout, isa.lanes), stage=False, dot="", prefetch=config.integer("prefetch"),
            lanes=isa.lanes, fma=isa.fma,
        )  # fmt: skip
        self.variant = SparseVariant(
            dense=dense, neurons=config.integer("neurons"), ahead=config.integer("ahead"), screen=screen
        )
        self.address = _load(self.variant)
        self.scratch_bytes = self.variant.scratch_bytes(BLOCK_M, block_n, gemm.k)
        self.widens = up and dense.widens and not screen
        depth = padded_k(gemm, pairs=up and not screen and layer.dtype == "bf16")
        self.row_bytes = 4 * depth if self.widens else DTYPES[layer.dtype] * gemm.k
        self.kept = _biases(weights, isa)
        size, panel = DTYPES[layer.dtype], GATES.get(weights.layout, 0)
        between = row_pitch(gemm.k, layer.dtype, isa.lanes) if up else pitch(self.columns, layer.dtype)
        pitch_stride = size * between
        self.more_rooms = {"live": self.variant.list_bytes(gemm.k)}
        if up:
            self.more_rooms = {"interleaved": 4 * (interleaved_length(gemm.k) + isa.lanes)}
        if screen:
            self.more_rooms["screened"] = screened_bytes(gemm.k, isa.lanes)
        fixed = {
            "experts": layer.experts, "k": gemm.k, "k_padded": depth, "row_stride": self.row_bytes,
            "weights": (weights.data.gate if up else weights.data).data_ptr(),
            "up_rows": weights.data.up.data_ptr() if up else 0,
            "bias": self.kept[0].data_ptr() if self.kept else 0,
            "up_bias": self.kept[1].data_ptr() if len(self.kept) > 1 else 0,
            "columns": self.columns, "width": self.width,
            "expert_stride": self.columns * depth * size if up else gemm.k * pitch_stride,
            "panel_stride": panel * depth * size, "pitch_stride": pitch_stride,
            "block_m": BLOCK_M, "block_n": block_n, "block_k": depth + FLUSH_K,
            "scratch_stride": self.scratch_bytes,
            **{f"{name}_stride": size for name, size in self.more_rooms.items()},
            **(_screen_words(isa, weights) if screen else {}),
        }  # fmt: skip
        self.template = _Block(*(fixed.get(name, 0) for name in _WORDS))

    def rooms(self, rows: int, *, combined: bool) -> dict[str, int]:
        """Return what the dense kernel's launches want, and this kernel's forms of the rows."""
        more = {name: rows * size for name, size in self.more_rooms.items()}
        return {**super().rooms(rows, combined=combined), **more}


def _screen_words(isa: Isa, weights: GemmWeights) -> dict[str, int]:
    """Return the words of the argument block about a screen."""
    stack = weights.data
    return {
        "gate_rows": stack.gate.data_ptr(), "codes": stack.codes.data_ptr(), "code_scales": stack.scales.data_ptr(),
        "code_bounds": stack.bounds.data_ptr(), "code_stride": stack.codes.shape[2],
        "scale_stride": 2 * stack.scales.shape[2],
    }  # fmt: skip


def _biases(weights: GemmWeights, isa: Isa) -> list[torch.Tensor]:
    """Return the bias of down, or those of gate and up rows, in packed columns; nothing without a bias."""
    gemm, bias = weights.gemm, weights.bias
    if bias is None:
        return []
    if gemm.name == "down":
        return [pack_bias(bias, gemm, isa.lanes)]
    width = gemm.layer.intermediate
    return [pack_bias(part, gate_gemm(gemm), isa.lanes) for part in (bias[:, :width], bias[:, width:])]


def plan_of(isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> Plan:
    """Return what launches into `out_dtype` share, made once a stack. Raises InputError, ConfigError."""
    return kept_plan(Plan, isa, config, weights, out_dtype)


def launch(isa: Isa, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
    """Run one of the two GEMMs on a routing with at least one token. Raises InputError, ConfigError."""
    plan_of(isa, config, weights, operands.out.dtype).launch(route, operands).run()


def _check_weights(isa: Isa, weights: GemmWeights, columns: int) -> None:
    """Raise InputError unless weights are what their layout says."""
    gemm, data = weights.gemm, weights.data
    experts, dtype = gemm.layer.experts, TORCH_DTYPES[gemm.layer.dtype]
    if weights.layout == SCREEN:
        check_screened(NAME, isa, weights)
        return
    if gemm.name == "down":
        parts = {"neurons": (data, experts * gemm.k * pitch(columns, gemm.layer.dtype))}
    elif isinstance(data, SparseStack):
        depth = padded_k(gemm, pairs=dtype == torch.bfloat16)
        parts = {
            "gate rows": (data.gate, experts * columns * depth),
            "up rows": (data.up, experts * gemm.layer.intermediate * row_pitch(gemm.k, gemm.layer.dtype, isa.lanes)),
        }
    else:
        raise InputError(
            f"{NAME}: weights in layout {weights.layout} are {type(data).__name__}, expected a SparseStack"
        )
    for what, (tensor, count) in parts.items():
        check_stored(NAME, what, tensor, count, weights)

"""`llvm.sparse_experts`: grouped expert GEMMs that leave out what relu, relu² or dReLU made zero.

Up computes every gate row, and of the up rows those whose gate is alive; down reads the weight rows of live neurons
alone. Nothing is predicted: zeros are exact. Bits are those of `llvm.moe_gemm` with dot=fma, so both are one class
and the tuner may mix them. What is left out is a product of zero: only where the dense sum meets an infinite or NaN
weight there (it becomes NaN), or has underflowed to −0 (it may become +0), is the result another one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from itertools import product

import torch

from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.errors import ConfigError, InputError
from tilecast.kernels.cpu._sparse import MORE_ARGS, SparseVariant, build
from tilecast.kernels.cpu._variant import ARGS, ENTRY, FLUSH_K, Variant
from tilecast.kernels.cpu.isa import Isa, host_isa
from tilecast.kernels.cpu.jit import available_threads, load, run
from tilecast.kernels.cpu.layouts import pack_bias, padded_columns, padded_k
from tilecast.kernels.cpu.moe_gemm import BLOCK_M, DTYPE_NAMES, MoeGemm, take_scratch
from tilecast.kernels.cpu.slots import Rows, SlotKernel
from tilecast.kernels.cpu.sparse_layouts import (
    SparseStack,
    gate_gemm,
    pack_gated,
    pack_neurons,
    pitch,
    unpack_gated,
    unpack_neurons,
)
from tilecast.kernels.cpu.tiles import rows_per_expert
from tilecast.kernels.cpu.work import sparse_work
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, TORCH_DTYPES, GemmWeights
from tilecast.kernels.work import UNKNOWN_SPARSITY, Work
from tilecast.problem import DTYPES, EXACT_ZEROS, ExpertGemm, ParamValue, TileConfig

NAME = "llvm.sparse_experts"
NEURONS = "neurons"
"""The layout of down: one neuron's row behind the other."""
GATES = {f"gate{panel}": panel for panel in (16, 32, 64)}
"""The layouts of up, and the columns of their gate rows' panels."""
_NO_TILE = {"mr": 1, "nv": 1, "unroll": 1, "prefetch": 0}
"""What these parameters are for down, which has no register tile."""


class SparseExperts(SlotKernel):
    """Exact zeros left out. Parameters:

    layout: `gateN` (up: gate rows in panels of N columns, up rows as they were) or `neurons` (down); neurons: vectors
    of live neurons multiplied at once (up), or live neurons added at once (down); ahead: turns by which live rows are
    asked for ahead (up), or 1 to ask for the next neurons (down); block_n: columns of one job; threads: at most so many
    (0 = all that torch uses); mr, nv, unroll, prefetch: of the gate rows' tiles, as `llvm.moe_gemm` has them.
    """

    name = NAME
    device_kind = "cpu"
    skips_zeros = True
    domain: dict[str, tuple[ParamValue, ...] | range] = {  # noqa: RUF012  # the protocol wants an instance's view
        "mr": range(1, 15),
        "nv": (1, 2, 4, 8),
        "unroll": (1, 2, 4, 8),
        "prefetch": (0, 1, 2, 4, 8),
        "layout": (*GATES, NEURONS),
        "neurons": (1, 2, 4, 8),
        "ahead": (0, 1, 2, 4, 8, 16),
        "block_n": (64, 128, 256, 512, 1024, 2048),
        "threads": (0, 1, *range(2, 257)),
    }

    def __init__(self, isa: Isa | None = None) -> None:
        """Use this machine's instruction set, or another one for static questions."""
        self.isa = isa or host_isa()
        self.dense = MoeGemm(self.isa)

    # What is asked before anything runs ----------------------------------------------

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        """Return why this kernel cannot run `gemm` in `environment` at all."""
        layer = gemm.layer
        if layer.activation not in EXACT_ZEROS:
            return f"needs exact zeros, of {', '.join(EXACT_ZEROS)}; the activation is {layer.activation}"
        if layer.weight_format != "dense":
            return f"takes dense weights, not {layer.weight_format}"
        if gemm.name == "up" and not layer.gated:
            return "without a gate every row of the up projection has to be computed"
        return self.dense.rejects(gemm, environment)

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        """Return why `config` cannot run `gemm` in `environment`."""
        layout, block_n = str(config["layout"]), config.integer("block_n")
        if (gemm.name == "down") != (layout == NEURONS):
            return f"layout {layout} is not of {gemm.name}"
        if gemm.name == "down":
            if any(config[name] != value for name, value in _NO_TILE.items()):
                return f"down has no tile: {', '.join(f'{name}={value}' for name, value in _NO_TILE.items())}"
            if config.integer("ahead") > 1:
                return f"ahead={config['ahead']}, down asks for the next neurons or for none"
            if block_n % (8 * self.isa.lanes):
                return f"block_n={block_n} is not a multiple of 8 vectors of {self.isa.lanes}"
            return None
        if config.integer("neurons") > 4:
            return f"neurons={config['neurons']}, up multiplies at most 4 vectors of neurons at once"
        if block_n > 1024:
            return f"block_n={block_n}, up takes at most 1024"
        return self.dense.invalid(gate_gemm(gemm), self._gate_config(config), environment)

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering for this many tokens, in a fixed order; some may be invalid."""
        if gemm.name == "down":
            for block_n, neurons in product((2048, 1024, 512, 256), (4, 8)):
                yield self._config(**_NO_TILE, layout=NEURONS, neurons=neurons, ahead=1, block_n=block_n)
            return
        base = self.default(gemm, tokens, environment)
        for layout, block_n, ahead in product(
            dict.fromkeys((str(base["layout"]), "gate32")), (256, 512, 128), (4, 0)
        ):  # fmt: skip
            yield base.with_params(layout=layout, block_n=block_n, ahead=ahead)

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config; with `like`, one of the same weight layout."""
        if gemm.name == "down":
            columns = padded_columns(gemm, self.isa.lanes)
            active = min(gemm.layer.experts, tokens * gemm.layer.top_k)
            # Stretches of 4 KiB are read nearly as fast as dense weights; every thread has two jobs or more.
            blocks = [n for n in (2048, 1024) if active * columns >= 2 * n * max(1, environment.threads)]
            return self._config(**_NO_TILE, layout=NEURONS, neurons=4, ahead=1, block_n=blocks[0] if blocks else 512)
        gates = self.dense.default(gate_gemm(gemm), tokens, environment)
        layout = f"gate{str(gates['layout']).removeprefix('panel')}"
        if like is not None and like.kernel == NAME and like["layout"] in GATES:
            layout = str(like["layout"])
        rows = rows_per_expert(gemm, tokens)
        return self._config(
            **{name: gates[name] for name in ("mr", "nv", "unroll", "prefetch")}, layout=layout,
            neurons=4, ahead=4, block_n=256 if rows <= 16 else 512,
        )  # fmt: skip

    def _config(self, **params: ParamValue) -> TileConfig:
        return TileConfig(NAME, {"threads": 0, **params})

    def _gate_config(self, config: TileConfig) -> TileConfig:
        """Return the dense kernel's config that computes the gate rows as `config` does."""
        taken = {name: config[name] for name in ("mr", "nv", "unroll", "prefetch", "block_n", "threads")}
        layout = f"panel{GATES[str(config['layout'])]}"
        return TileConfig(self.dense.name, {**taken, "layout": layout, "stage": 0, "block_k": 0, "dot": "fma"})

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        """Return the fields of the numerics class: the dense kernel's, whose bits these are."""
        return self.dense.numerics(gemm, TileConfig(self.dense.name, {"dot": "fma"}), environment)

    def work(
        self,
        gemm: ExpertGemm,
        config: TileConfig,
        environment: Environment,
        counts: Sequence[int],
        dead: float = UNKNOWN_SPARSITY,
    ) -> Work:
        """Return what a launch of a valid config does; counts are the rows of each local expert."""
        gates = None
        if gemm.name == "up":
            gates = self.dense.work(gate_gemm(gemm), self._gate_config(config), environment, counts)
        return sparse_work(gemm, config, gates, counts, dead)

    def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
        """Return `plain` weights stored in another layout. The plain tensor is left as it was."""
        gemm = weights.gemm
        if layout == PLAIN or weights.layout == layout:
            return weights
        if weights.layout != PLAIN or layout not in ((NEURONS,) if gemm.name == "down" else GATES):
            raise ConfigError(
                f"{NAME}: weights of {gemm.name} in layout {weights.layout} cannot be packed as {layout!r}"
            )
        if gemm.name == "up" and not gemm.layer.gated:
            raise ConfigError(f"{NAME}: layout {layout} holds gate and up rows apart, the layer is not gated")
        if layout == NEURONS:
            data: object = pack_neurons(weights.data, gemm, self.isa.lanes)
        else:
            data = pack_gated(weights.data, gemm, GATES[layout], self.isa.lanes)
        return GemmWeights(gemm=gemm, layout=layout, data=data, bias=weights.bias)

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        """Return weights in any of this kernel's layouts as `plain` ones, bit for bit."""
        if weights.layout == PLAIN:
            return weights
        if weights.layout == NEURONS:
            data = unpack_neurons(weights.data, weights.gemm, self.isa.lanes)
        else:
            data = unpack_gated(weights.data, weights.gemm, self.isa.lanes)
        return GemmWeights(gemm=weights.gemm, layout=PLAIN, data=data, bias=weights.bias)

    def launch(self, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
        """Run one of the two GEMMs on a routing with at least one token."""
        _launch(self.isa, config, weights, route, operands)


# The hot path -------------------------------------------------------------------------

_WORDS = (*ARGS, *MORE_ARGS)
_INDEX = {name: index for index, name in enumerate(_WORDS)}
_Block = ctypes.c_int64 * len(_WORDS)


@cache
def _load(variant: SparseVariant) -> int:
    """Return the address of a variant's entry function, compiled at first use."""
    return load(lambda module: build(module, variant), {"sparse": asdict(variant)}, ENTRY)


class Plan:
    """What stays the same between launches of one config on one stack of weights."""

    def __init__(self, isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: str) -> None:
        """Check the weights, and load the code; raises InputError for weights that are not what their layout says."""
        gemm, layer = weights.gemm, weights.gemm.layer
        up = gemm.name == "up"
        self.columns = padded_columns(gate_gemm(gemm) if up else gemm, isa.lanes)
        _check_weights(weights, self.columns)
        block_n = min(config.integer("block_n"), self.columns)
        nv = config.integer("nv")
        dense = Variant(
            gemm=gemm.name, dtype=layer.dtype, out=out_dtype, activation=layer.activation if up else "", gated=False,
            bias=weights.bias is not None, mr=config.integer("mr"), nv=nv,
            max_nv=max(nv, min(8, block_n // isa.lanes)) if up else 1, unroll=config.integer("unroll"),
            panel=GATES.get(weights.layout, isa.lanes), stage=False, dot="", prefetch=config.integer("prefetch"),
            lanes=isa.lanes, fma=isa.fma,
        )  # fmt: skip
        self.variant = SparseVariant(dense=dense, neurons=config.integer("neurons"), ahead=config.integer("ahead"))
        self.address = _load(self.variant)
        self.k, self.dtype, self.experts = gemm.k, TORCH_DTYPES[layer.dtype], layer.experts
        self.width = layer.intermediate if up else layer.hidden
        self.threads = config.integer("threads")
        self.scratch_bytes = self.variant.scratch_bytes(BLOCK_M, block_n)
        self.list_bytes = 0 if up else self.variant.list_bytes(gemm.k)
        self.widens = up and dense.widens
        depth = padded_k(gemm, pairs=up and layer.dtype == "bf16")
        self.row_bytes = 4 * depth if self.widens else DTYPES[layer.dtype] * gemm.k
        self.kept = _biases(weights, isa)
        size, panel = DTYPES[layer.dtype], GATES.get(weights.layout, 0)
        pitch_stride = size * pitch(gemm.k if up else self.columns, layer.dtype)
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
            "scratch_stride": self.scratch_bytes, "live_stride": self.list_bytes,
        }  # fmt: skip
        self.template = _Block(*(fixed.get(name, 0) for name in _WORDS))


def _biases(weights: GemmWeights, isa: Isa) -> list[torch.Tensor]:
    """Return the bias of down, or those of gate and up rows, in packed columns; nothing without a bias."""
    gemm, bias = weights.gemm, weights.bias
    if bias is None:
        return []
    if gemm.name == "down":
        return [pack_bias(bias, gemm, isa.lanes)]
    width = gemm.layer.intermediate
    return [pack_bias(part, gate_gemm(gemm), isa.lanes) for part in (bias[:, :width], bias[:, width:])]


def _launch(isa: Isa, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
    source, rows, out, scale = operands.source, operands.rows, operands.out, operands.scale
    plan: Plan | None = weights.plans.get((config, out.dtype))
    if plan is None:
        if config["layout"] != weights.layout:
            raise ConfigError(f"{NAME}: the config reads layout {config['layout']}, the weights are {weights.layout}")
        plan = Plan(isa, config, weights, DTYPE_NAMES[out.dtype])
        weights.plans[config, out.dtype] = plan
    if route.experts != plan.experts:
        raise InputError(f"{NAME}: slots are sorted over {route.experts} experts, the weights have {plan.experts}")
    _check("input", source, (rows, plan.k), plan.dtype)
    _check("output", out, (route.tokens if scale is not None else rows * route.top_k, plan.width), out.dtype)
    threads = available_threads() if plan.threads == 0 else min(plan.threads, available_threads())
    words = {
        "threads": threads, "tokens": route.tokens, "top_k": route.top_k, "rows": rows,
        "ids": route.ids.data_ptr(), "slots": route.slots.data_ptr(), "offsets": route.offsets.data_ptr(),
        "source": source.data_ptr(), "out": out.data_ptr(),
        "scratch": _aligned(take_scratch("threads", threads * plan.scratch_bytes)),
    }  # fmt: skip
    if plan.widens:
        words["widened"] = take_scratch("widened", rows * plan.row_bytes).data_ptr()
    if scale is not None:
        _check("routing weights", scale, (route.tokens, route.top_k), torch.float32)
        words["scale"] = scale.data_ptr()
        # A vector's width beyond the last row is read, though never used.
        words["partial"] = take_scratch("partial", 4 * (rows * plan.width + isa.lanes)).data_ptr()
        words["live"] = _aligned(take_scratch("live", rows * plan.list_bytes))
    block = _Block.from_buffer_copy(plan.template)
    for name, word in words.items():
        block[_INDEX[name]] = word
    run(plan.address, ctypes.addressof(block), threads)


def _aligned(scratch: torch.Tensor) -> int:
    return -(-scratch.data_ptr() // 64) * 64


def _check_weights(weights: GemmWeights, columns: int) -> None:
    """Raise InputError unless weights are what their layout says."""
    gemm, data = weights.gemm, weights.data
    experts, dtype = gemm.layer.experts, TORCH_DTYPES[gemm.layer.dtype]
    if gemm.name == "down":
        parts = {"neurons": (data, experts * gemm.k * pitch(columns, gemm.layer.dtype))}
    elif isinstance(data, SparseStack):
        depth = padded_k(gemm, pairs=dtype == torch.bfloat16)
        parts = {
            "gate rows": (data.gate, experts * columns * depth),
            "up rows": (data.up, experts * gemm.layer.intermediate * pitch(gemm.k, gemm.layer.dtype)),
        }
    else:
        raise InputError(
            f"{NAME}: weights in layout {weights.layout} are {type(data).__name__}, expected a SparseStack"
        )
    for what, (tensor, count) in parts.items():
        if (
            tensor.dtype != dtype
            or tensor.numel() != count
            or not tensor.is_contiguous()
            or tensor.device.type != "cpu"
        ):
            raise InputError(
                f"{NAME}: {what} in layout {weights.layout} are {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}, expected {count} contiguous elements of {dtype} for {gemm.layer.label} {gemm.name}"
            )


def _check(what: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise InputError(
            f"{NAME}: {what} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
            f"expected contiguous {dtype} {shape}"
        )

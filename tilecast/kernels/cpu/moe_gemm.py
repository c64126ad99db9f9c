"""`llvm.moe_gemm`: grouped expert GEMMs from the micro-kernel generator, for fp32, bf16, fp16 and quantised weights.

Numerics (docs/numerics.md): every output is the ascending sum of chains of 256 fused multiply-adds along K, so
all tile shapes, layouts, block sizes and thread counts are one class, and a row's bits do not depend on the
batch. The bf16 dot product of AVX-512 adds pairs and is a class of its own. With quantised weights the chains are
the groups that share a scale, and each format is a class of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.errors import ConfigError
from tilecast.kernels.cpu._codes import LIMBS
from tilecast.kernels.cpu._nibbles import TURN
from tilecast.kernels.cpu._variant import FLUSH_K
from tilecast.kernels.cpu.columns import padded_columns
from tilecast.kernels.cpu.isa import Isa, host_isa
from tilecast.kernels.cpu.slots import SlotKernel
from tilecast.kernels.cpu.tiles import SHORTS, prefetch_lines, rows_per_expert, shapes_of, takes_shorts, turn_steps
from tilecast.kernels.cpu.work import moe_gemm_work
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.kernels.work import Work
from tilecast.problem import ExpertGemm, ParamValue, TileConfig, weight_format

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.cpu.launch import Plan
    from tilecast.kernels.cpu.slots import Rows
    from tilecast.kernels.routing import ExpertLayout

NAME = "llvm.moe_gemm"
PANELS = (16, 32, 64)
GROUP_RULE = "total + scale * sum"
BLOCK_M = 256
"""Rows that share one pass over a block of weights; also bounds a thread's scratch."""


class MoeGemm(SlotKernel):
    """The generator's kernel. Parameters:

    mr, nv: rows and vectors of columns held in registers (a job of few rows takes wider tiles of as many sums);
    unroll: k steps per turn; layout: `plain` or `panelN` (N columns a panel); stage: 1 if weights are first
    brought into scratch; prefetch: cache lines asked for ahead, a turn; block_n: columns of one job; block_k: K
    that one job covers before it moves to its next tile (0 = all); dot: `fma`, or `bf16` for the pairwise dot
    product; threads: at most so many (0 = all that torch uses).
    """

    name = NAME
    device_kind = "cpu"
    domain: dict[str, tuple[ParamValue, ...] | range] = {  # noqa: RUF012  # the protocol wants an instance's view
        "mr": range(1, 15),
        "nv": (1, 2, 4, 8),
        "unroll": (1, 2, 4, 8),
        "layout": (PLAIN, *(f"panel{panel}" for panel in PANELS)),
        "stage": (0, 1),
        "prefetch": (0, 1, 2, 4, 8),
        "block_n": (16, 32, 64, 128, 256, 512, 1024),
        "block_k": (0, 256, 512, 1024, 2048),
        "dot": ("fma", "bf16", SHORTS),
        "threads": (0, 1, *range(2, 257)),
    }

    def __init__(self, isa: Isa | None = None) -> None:
        """Use this machine's instruction set, or another one for static questions."""
        self.isa = isa or host_isa()

    # What is asked before anything runs ----------------------------------------------

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        """Return why this kernel cannot run `gemm` in `environment` at all."""
        if environment.device_kind != "cpu":
            return f"runs on CPUs, not on {environment.device_kind}"
        if gemm.misfit is not None:
            return gemm.misfit
        if gemm.layer.dtype == "fp16" and not self.isa.half:
            return f"{self.isa.name} has no fp16 conversion instruction"
        return None

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        """Return why `config` cannot run `gemm` in `environment`."""
        isa, mr, nv = self.isa, config.integer("mr"), config.integer("nv")
        layout, stage, dot = config["layout"], config["stage"], config["dot"]
        nr, block_n = nv * isa.lanes, config.integer("block_n")
        quantized = gemm.layer.weight_format != "dense"
        if dot == "bf16":
            if gemm.layer.dtype != "bf16" or quantized:
                return f"dot=bf16 needs bf16 weights, the layer is {gemm.layer.label}"
            if not isa.dot_bf16:
                return f"{isa.name} has no bf16 dot product"
            if gemm.k % 2:
                return f"dot=bf16 takes K in pairs, K is {gemm.k}"
        if dot == SHORTS and not takes_shorts(gemm):
            return f"dot={SHORTS} needs integer codes and rows of 16 bits, the layer is {gemm.layer.label}"
        nibbles = weight_format(gemm.layer.weight_format).bits == 4 and dot != SHORTS
        live, operands = (mr * nv * LIMBS[gemm.layer.dtype], 0) if nibbles else (mr * nv + 1, nv)
        if live > isa.registers:
            return f"{mr}×{nv} accumulators and {operands + 1} operands do not fit {isa.registers} registers"
        if nibbles and config["unroll"] != TURN:
            return f"unroll={config['unroll']}, codes of 4 bits are taken {TURN} words a turn"
        if layout == PLAIN and (not stage or config["prefetch"]):
            return "plain weights have to be staged" if not stage else "plain weights are not prefetched"
        if layout != PLAIN and stage and (nibbles or (not quantized and (gemm.layer.dtype == "fp32" or dot == "bf16"))):
            return "packed weights of this form need no staging"
        if layout != PLAIN and (panel := panel_columns(str(layout))) and max(panel, nr) % min(panel, nr):
            return f"panels of {panel} columns do not divide into tiles of {nr}"
        if block_n % nr or (layout != PLAIN and block_n % panel_columns(str(layout))):
            return f"block_n={block_n} is not a multiple of the tile's {nr} columns and the panel"
        if gemm.name == "up" and gemm.layer.gated and block_n % (2 * isa.lanes):
            return f"block_n={block_n} splits gate columns from their up columns"
        return None

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering for this many tokens, in a fixed order; some may be invalid."""
        isa, dtype, rows = self.isa, gemm.layer.dtype, rows_per_expert(gemm, tokens)
        dots = ("bf16", "fma") if _pairs_dot(gemm, isa) else (SHORTS, "fma") if _shorts(gemm, isa) else ("fma",)
        narrow, wide = (f"panel{max(16, vectors * isa.lanes)}" for vectors in (2, 4))
        shapes, many = {dot: shapes_of(gemm, isa, tokens, rows, dot) for dot in dots}, rows > 6
        each = ((dot, layout, shape) for dot in dots for layout in (narrow, wide, PLAIN) for shape in shapes[dot])
        for dot, layout, (mr, nv) in dict.fromkeys(each):
            favourite, unroll = (mr, nv) in shapes[dot][:2], turn_steps(gemm, nv, 0, dot)
            if layout != narrow and not favourite:
                continue
            keeps_up = prefetch_lines(isa, nv, unroll, dtype)
            for block_n, prefetch, stage, block_k in product(
                (64, 256),
                (0,) if layout == PLAIN else dict.fromkeys((int(many), keeps_up)),
                (1,) if layout == PLAIN else (0, 1) if many and layout == narrow else (0,),
                (0, 512) if many and favourite and layout == narrow else (0,),
            ):
                yield self._config(
                    mr=mr, nv=nv, unroll=turn_steps(gemm, nv, stage, dot), layout=layout, stage=stage,
                    block_n=max(block_n, nv * isa.lanes), block_k=block_k, prefetch=prefetch, dot=dot,
                )  # fmt: skip

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config; with `like`, one of the same weight layout and numerics class."""
        isa, dtype, rows = self.isa, gemm.layer.dtype, rows_per_expert(gemm, tokens)
        if like is not None and like.kernel != NAME:
            like = None
        layout = f"panel{max(16, 2 * isa.lanes)}" if like is None else str(like["layout"])
        dot = "bf16" if _pairs_dot(gemm, isa) and gemm.k % 2 == 0 else SHORTS if _shorts(gemm, isa) else "fma"
        if like is not None:
            dot = str(like["dot"])
        mr, nv = shapes_of(gemm, isa, tokens, rows, dot)[0]
        # Of many rows each tile would decode the same codes again; floats of int8's are cheap to make.
        again = dot == SHORTS or weight_format(gemm.layer.weight_format).kind == "fp8"
        stage = int(layout == PLAIN or (rows > 6 and again))
        unroll = turn_steps(gemm, nv, stage, dot)
        prefetch = 1 if rows > 6 else prefetch_lines(isa, nv, unroll, dtype) if rows > 1 else 0
        if weight_format(gemm.layer.weight_format).bits == 4 and dot != SHORTS:
            # One row's products of 4-bit codes leave the hardware's prefetchers behind, several rows' do not.
            prefetch = prefetch_lines(isa, nv, unroll, dtype) if rows == 1 else 0
        if dot == SHORTS and rows <= 2:
            # Jobs of one row or two take four vectors, where there are several rows at all.
            prefetch = prefetch_lines(isa, nv if tokens == 1 else max(nv, 4), unroll, dtype)
        active = min(gemm.layer.experts, tokens * gemm.layer.top_k)
        jobs = active * padded_columns(gemm, isa.lanes) // 256
        enough = jobs >= 8 * max(1, environment.threads)
        return self._config(
            mr=mr, nv=nv, unroll=unroll, layout=layout, stage=stage,
            block_n=max(256 if enough else 64, nv * isa.lanes), block_k=0,
            prefetch=0 if layout == PLAIN else prefetch, dot=dot,
        )  # fmt: skip

    def _config(self, **params: ParamValue) -> TileConfig:
        return TileConfig(NAME, {"threads": 0, **params})

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        """Return the fields of the numerics class: known by construction, whatever the tile's shape."""
        dot, form = config["dot"] == "bf16", weight_format(gemm.layer.weight_format)
        bits = 16 if config["dot"] == SHORTS else 8 * LIMBS[gemm.layer.dtype] - 2 if form.bits == 4 else 0
        return {
            "kernel": NAME,
            "dtype": gemm.layer.dtype,
            "accumulator": "fp32",
            "k_order": "ascending pairs" if dot else "ascending",
            "multiply_add": "vdpbf16ps" if dot else "fma" if self.isa.fma else "separate",
            "flush_k": form.group or FLUSH_K,
            **({"weights": gemm.layer.weight_format, "scaled": GROUP_RULE} if form.bits else {}),
            **({"group_sums": f"exact, rows as {bits} bits"} if bits else {}),
            "rounding": "intermediate once, output once",
            "combine": "slot order",
        }

    def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
        """Return `plain` weights stored in another layout. The plain tensor is left as it was."""
        if layout == PLAIN or weights.layout == layout:
            return weights
        if weights.layout != PLAIN:
            raise ConfigError(f"{NAME}: weights in layout {weights.layout} cannot be packed as {layout}")
        from tilecast.kernels.cpu import moe_launch

        data = moe_launch.packed(self.isa, weights, panel_columns(layout))
        return GemmWeights(gemm=weights.gemm, layout=layout, data=data, bias=weights.bias)

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        """Return weights in any of this kernel's layouts as `plain` ones, bit for bit."""
        if weights.layout == PLAIN:
            return weights
        from tilecast.kernels.cpu import moe_launch

        data = moe_launch.unpacked(self.isa, weights)
        return GemmWeights(gemm=weights.gemm, layout=PLAIN, data=data, bias=weights.bias)

    def work(self, gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int]) -> Work:
        """Return what a launch of a valid config does; counts are the rows of each local expert."""
        return moe_gemm_work(self.isa, gemm, config, environment, counts, BLOCK_M)

    # Launching ------------------------------------------------------------------------

    def plan(self, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> Plan:
        """Return what launches into `out_dtype` share, made once and kept with the weights. Raises as a launch does."""
        from tilecast.kernels.cpu import moe_launch

        return moe_launch.plan_of(self.isa, config, weights, out_dtype)

    def launch(self, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
        """Run one of the two GEMMs on a routing with at least one token."""
        from tilecast.kernels.cpu import moe_launch

        moe_launch.launch(self.isa, config, weights, route, operands)


def panel_columns(layout: str) -> int:
    """Return the columns of one panel of a packed layout; raises ConfigError for another layout."""
    if not layout.startswith("panel"):
        raise ConfigError(f"{NAME}: layout {layout!r} is not packed in panels")
    return int(layout.removeprefix("panel"))


def _shorts(gemm: ExpertGemm, isa: Isa) -> bool:
    return isa.byte_pairs and takes_shorts(gemm)


def _pairs_dot(gemm: ExpertGemm, isa: Isa) -> bool:
    return gemm.layer.dtype == "bf16" and gemm.layer.weight_format == "dense" and isa.dot_bf16

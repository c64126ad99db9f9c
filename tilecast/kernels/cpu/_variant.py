"""What the generated grouped GEMM depends on: its variant, its register tiles and the words of its argument block."""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.kernels.cpu._build import Emit, Value
from tilecast.kernels.cpu._codes import CODES_PER_WORD, Codes
from tilecast.kernels.cpu._micro import Micro, Source
from tilecast.problem import DTYPES

DENSE_SOURCES: dict[str, Source] = {"fp32": "f32", "fp16": "f16", "bf16": "pairs"}
"""How packed dense weights lie, by their dtype."""

FLUSH_K = 256
"""Length of one accumulation chain along K; the chains' sums are added in ascending order."""

ENTRY = "tilecast_moe_gemm"
BARRIER = "tilecast_barrier"
"""Symbol that the loader binds to the OpenMP runtime's barrier."""

ARGS = (
    # counters that the threads share, and how many threads there are
    "job", "thread", "threads",
    # routing
    "tokens", "top_k", "experts", "ids", "slots", "offsets",
    # operands; `widened` is float32 scratch for the rows, `partial` float32 scratch for the slots' results
    "source", "widened", "weights", "bias", "scale", "partial", "out",
    # sizes in elements, strides in bytes
    "rows", "k", "k_padded", "row_stride", "columns", "width", "expert_stride", "panel_stride",
    # of quantised weights: scales and zero points in panels, and their strides in bytes
    "scales", "zeros", "scale_expert_stride", "scale_panel_stride", "zero_expert_stride", "zero_panel_stride",
    # blocking
    "block_m", "block_n", "block_k",
    # scratch of one thread
    "scratch", "scratch_stride",
)  # fmt: skip
"""The 64-bit words of the argument block, in order."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A register tile of nr columns for blocks of `least` to `most` rows."""

    nr: int
    least: int
    most: int
    micro: Micro


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Everything that the generated code depends on; sizes and blocking are run-time arguments.

    mr, nv: the register tile; jobs of few rows use tiles of up to max_nv vectors instead, with as many sums in
    flight. panel is 0 for plain weights; out is the dtype that `down` rounds its sums to; codes says how quantised
    weights lie.
    """

    gemm: str
    dtype: str
    out: str
    activation: str
    gated: bool
    bias: bool
    mr: int
    nv: int
    max_nv: int
    unroll: int
    panel: int
    stage: bool
    prefetch: int
    dot: str
    lanes: int
    fma: bool
    codes: Codes | None = None

    @property
    def widest(self) -> int:
        """Columns of the widest register tile."""
        return self.tiles[0].nr

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The register tiles, widest first: each serves jobs of up to `most` rows that the ones before do not."""
        found: list[Tile] = []
        nv, least = self.max_nv, 1
        while nv > self.nv:
            most = self.mr * self.nv // nv
            if most >= least:
                found.append(Tile(nr=nv * self.lanes, least=least, most=most, micro=self.micro(nv)))
                least = most + 1
            nv //= 2
        # More rows than mr are cut into equal blocks, of which the smallest has half of mr.
        least = min(least, (self.mr + 1) // 2)
        return (*found, Tile(nr=self.nv * self.lanes, least=least, most=self.mr, micro=self.micro(self.nv)))

    @property
    def widens(self) -> bool:
        """Whether rows are first widened to float32."""
        return self.codes is not None or (self.dtype != "fp32" and not self.dot)

    @property
    def nibbles(self) -> bool:
        """Whether weights are codes of 4 bits, and rows limbs."""
        return self.codes is not None and self.codes.limbs > 0

    @property
    def shorts(self) -> bool:
        """Whether rows are integers of 16 bits."""
        return self.codes is not None and self.codes.short

    def chunk_k(self, rows: int) -> int:
        """Return K of one call of the micro-kernel: a chain, or as many 4-bit codes as the stage has room for.

        Several rows share a chunk that is in the first-level cache, beside their own.
        """
        if not self.nibbles and not self.shorts:
            return FLUSH_K
        return FLUSH_K * (CODES_PER_WORD["int4"] if rows == 1 and not (self.shorts and self.stage) else 2)

    @property
    def packed_source(self) -> Source:
        """How packed weights lie."""
        if self.codes is not None:
            return self.codes.kind
        return DENSE_SOURCES[self.dtype]

    @property
    def staged_source(self) -> Source:
        """How staged weights lie; e4m3 fits bf16, of which half as much is stored and which is cheap to widen."""
        if self.nibbles or self.shorts:
            return "int4" if self.nibbles else "shorts"
        return "pairs" if self.dot or (self.codes is not None and self.codes.kind == "fp8") else "f32"

    def micro(self, nv: int) -> Micro:
        """Return the micro-kernel of a tile of nv vectors."""
        if not self.stage:
            source, panel = self.packed_source, self.panel
        else:
            source, panel = self.staged_source, nv * self.lanes
        return Micro(
            nv=nv, unroll=self.unroll, source=source, panel=panel, lanes=self.lanes, dot=self.dot,
            prefetch=self.prefetch, codes=self.codes,
        )  # fmt: skip

    def k_bytes(self, k: Value | int, emit: Emit) -> Value:
        """Return the bytes of `k` elements of one column."""
        if self.codes is not None:
            return emit.idiv(emit.imul(k, 4), self.codes.per_word)
        return emit.imul(k, DTYPES[self.dtype])

    def scratch_layout(self, block_m: int, block_n: int) -> tuple[int, int, int, int]:
        """Return byte offsets of the stage, row pointers and totals in a thread's scratch, and its size."""
        stage = 8 * self.widest
        pointers = stage + 4 * FLUSH_K * self.widest
        totals = pointers + 8 * block_m
        return stage, pointers, totals, -(-(totals + 4 * block_m * block_n) // 4096) * 4096

"""What the CPU kernels' launches do, for the cost model: cycles of the inner tile, streams of weights, library calls.

Cycles are those of a core with two multiply-add units and two vector loads a cycle, as all of this package's x86 and
ARM targets have within a factor that the measured multiply-add rate carries (Fog, "Instruction tables";
"Software Optimization Guide for the AMD Family 19h Processors", AMD).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tilecast.environment import Environment
from tilecast.kernels.cpu._codes import CODES_PER_WORD, Codes, codes_of
from tilecast.kernels.cpu._variant import FLUSH_K, Tile, Variant
from tilecast.kernels.cpu.columns import PLAIN_SCALE_PANEL, column_bytes, padded_columns, padded_k
from tilecast.kernels.cpu.isa import Isa
from tilecast.kernels.cpu.tiles import SHORTS, most_vectors
from tilecast.kernels.spec import PLAIN
from tilecast.kernels.work import Work, nothing, present
from tilecast.problem import DTYPES, ExpertGemm, TileConfig, weight_format

FMA_UNITS, PRODUCT_UNITS, LOAD_PORTS, VECTOR_PIPES = 2, 2, 2, 4
INTEGER_PIPES = 3
"""Vector operations on integers a cycle: 12 products of pairs and 12 additions of them take 8 cycles (Zen 3)."""
LIMB_ISSUE = 3.5
"""Operations and loads a cycle where rows are limbs: fitted to tiles of 1, 2 and 4 rows by 1 and 2 vectors of
`int4_g128`, 64 rows an expert, on Zen 3, as shares of the dense kernel's time; without it 4 × 1 came out 26% low."""
FMA_LATENCY = 4
"""Cycles from one multiply-add into a register to the next one."""
SPILL_CYCLES = 4.0
"""What a step waits longer where a tile needs more registers than there are: a store is read back at once."""
CALL_CYCLES = 24.0
"""Entering the micro-kernel for one block of rows and one chunk of K."""
SUM_CYCLES = 1.5
"""Adding one vector of sums to the totals: a load, an add, a store."""
JOIN_CYCLES = 8.0
"""Making one vector of integer sums into floats: joined, zero points taken off, converted."""
SHORT_JOIN_CYCLES = 1.0
"""The same where rows are integers of 16 bits: converted and scaled."""
L1_BYTES, L2_BYTES = 32 << 10, 512 << 10
L2_BYTES_PER_CYCLE = 16.0
PREFETCH_CYCLES = 1.3
"""Asking for one cache line ahead: a load, and where the line is already there, the room that it takes again."""
STAGE_PACKED_CYCLES = 1.0
"""Widening one vector of packed weights into scratch: one store a cycle."""
STAGE_PLAIN_CYCLES = 6.5
"""The same from plain rows: transposed, and the rows' addresses, a power of two apart, share few cache sets."""
STREAM_EFFICIENCY = {1: 0.78, 2: 0.95}
"""Part of the bandwidth that cores reach on one and on two streams of weights each; four fill it."""
HALF_PANEL_EFFICIENCY, HALF_PANEL_PREFETCHED = 0.95, 0.8
"""The same where a tile takes every second stretch of a panel: the neighbour's come along, for the next tile, but
prefetches by the kernel ask for lines that this tile does not want."""
DOUBLE_REQUESTS = 0.96
"""What prefetches leave of the bandwidth where the hardware follows the streams anyway."""
PLAIN_EFFICIENCY = 0.8
"""Plain weights are read in stretches of 512 bytes to 1 KiB of many rows at once."""
PIECE_BYTES = 1024
"""What a stretch of a live neuron's row takes longer than its bytes: the hardware has to find the stream anew."""
LIVE_UP_EFFICIENCY, LIVE_DOWN_EFFICIENCY = 0.3, 0.5
"""Part of the multiply-add peak that live rows reach: a chain in each lane (up, and gates that a screen leaves open),
sums in memory (down).

Up reaches 0.30 to 0.33 in bf16 and 0.17 to 0.20 in fp32 from the second-level cache (Zen 3, 16 and 64 rows)."""
OVERLAP, PREFETCHED_OVERLAP = 0.5, 0.8
"""How much of the shorter of reading and computing hides behind the other, without and with prefetching."""


@dataclass(frozen=True)
class Shape:
    """What the cycles of a tile depend on besides its rows and vectors. source: as in `Micro`."""

    source: str
    dot: bool
    lanes: int
    registers: int
    prefetched: float
    l2_chunk: bool


def word_cycles(rows: int, nv: int, codes: Codes, prefetched: float) -> float:
    """Return the cycles of one word of eight 4-bit codes of a register tile (`_nibbles.emit_turn`).

    Bytes: two masks and a shift a word; a product and an addition for each half of it and limb. 16 bits: four quarters.
    """
    parts = 2 if codes.byte_pairs else 4
    sums = parts * rows * nv * codes.limbs
    operations = nv * (2 * parts - 1) + 2 * sums
    loads = parts * (nv + rows * codes.limbs)
    cycles = max(sums / PRODUCT_UNITS, operations / INTEGER_PIPES, (operations + loads) / LIMB_ISSUE)
    return cycles + PREFETCH_CYCLES * prefetched


def pair_cycles(rows: int, nv: int, codes: Codes, staged: bool, prefetched: float) -> float:
    """Return the cycles of two steps of K of a register tile whose rows are integers of 16 bits (`_shorts`).

    A product of pairs and an addition for each sum; a shift and a mask for codes of 4 bits, but for the lowest ones,
    two shifts for those of 8, but for the upper ones. For tiles of 4 to 6 rows by 2 vectors, staged or not, of
    `int4_g128` and `int8_g128` that gives shares of the dense kernel's time within 13% (Zen 3, 64 rows an expert).
    """
    decoding = 0.0 if staged else 2 - 1 / len(codes.pairs)
    operations = 2 * rows * nv + nv * decoding
    cycles = max(operations / INTEGER_PIPES, (nv + rows) / LOAD_PORTS)
    return cycles + PREFETCH_CYCLES * prefetched


def step_cycles(rows: int, nv: int, shape: Shape) -> float:
    """Return the cycles of one step of K of a register tile of `rows` × nv vectors."""
    sums = rows * nv
    pairs = shape.source == "pairs" and not shape.dot
    # A word of two bf16 is loaded once for two steps, and widened by a shift and a mask.
    loads = (nv / 2 if pairs else nv) + rows
    widening = nv if pairs else 2 * nv if shape.source == "f16" or shape.source in CODES_PER_WORD else 0
    # Operands that one row alone uses are taken as they come; others are held until the last row had them.
    held = 2 if rows == 1 else 2 * nv if pairs else nv
    cycles = max(sums / FMA_UNITS, loads / LOAD_PORTS, (sums + widening) / VECTOR_PIPES, FMA_LATENCY)
    if shape.l2_chunk:
        cycles = max(cycles, 4 * nv * shape.lanes / L2_BYTES_PER_CYCLE) + rows / LOAD_PORTS
    cycles += PREFETCH_CYCLES * shape.prefetched
    return cycles + (SPILL_CYCLES if sums + held + 1 > shape.registers else 0.0)


def row_blocks(rows: int, most: int) -> Counter[int]:
    """Return how many blocks of each size `rows` are cut into: sizes differ by at most one."""
    blocks = -(-rows // most)
    small, larger = divmod(rows, blocks)
    return +Counter({small + 1: larger, small: blocks - larger})


def variant_of(isa: Isa, gemm: ExpertGemm, config: TileConfig, block_n: int) -> Variant:
    """Return the code variant that a config runs."""
    nv, layout = config.integer("nv"), str(config["layout"])
    layer = gemm.layer
    return Variant(
        gemm=gemm.name, dtype=layer.dtype, out=layer.dtype, activation=layer.activation if gemm.name == "up" else "",
        gated=layer.gated, bias=layer.bias, mr=config.integer("mr"), nv=nv,
        max_nv=most_vectors(gemm, isa, nv, block_n, str(config["dot"])), unroll=config.integer("unroll"),
        panel=0 if layout == PLAIN else int(layout.removeprefix("panel")), stage=bool(config["stage"]),
        dot="native" if config["dot"] == "bf16" else "", prefetch=config.integer("prefetch"), lanes=isa.lanes,
        fma=isa.fma, codes=_codes(isa, gemm, config["dot"] == SHORTS),
    )  # fmt: skip


def _codes(isa: Isa, gemm: ExpertGemm, short: bool) -> Codes | None:
    form = weight_format(gemm.layer.weight_format)
    if not form.bits:
        return None
    return codes_of(
        form, chain=FLUSH_K, scale="fp16", panel=PLAIN_SCALE_PANEL, dtype=gemm.layer.dtype,
        byte_pairs=isa.byte_pairs, short=short,
    )  # fmt: skip


def moe_gemm_work(
    isa: Isa, gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int], block_m: int
) -> Work:
    """Return what a launch of `llvm.moe_gemm` does; block_m rows share one pass over the weights."""
    rows_present = present(counts)
    dot = config["dot"] == "bf16"
    path = "dot_bf16" if dot else "fma"
    if not rows_present:
        return nothing(path)
    layer, size, columns = gemm.layer, DTYPES[gemm.layer.dtype], padded_columns(gemm, isa.lanes)
    depth_bytes = column_bytes(gemm, 1 << 10) / (1 << 10)
    block_n = min(config.integer("block_n"), columns)
    variant = variant_of(isa, gemm, config, block_n)
    depth = padded_k(gemm, pairs=variant.panel > 0 and layer.dtype == "bf16")
    parts: Counter[int] = Counter()
    for rows in rows_present:
        parts.update({block_m: rows // block_m, rows % block_m: 1} if rows % block_m else {block_m: rows // block_m})
    tiles = variant.tiles
    cycles = covered_cycles = memory_cost = cache_bytes = longest = 0.0
    for rows, times in (+parts).items():
        tile = next((tile for tile in tiles if rows <= tile.most), tiles[-1])
        each, covered = _product_cycles(variant, tile, rows, depth, isa, dot)
        column_tiles = columns // block_n * -(-block_n // tile.nr) + -(-(columns % block_n) // tile.nr)
        cycles += times * column_tiles * each
        covered_cycles += times * column_tiles * each * covered / max(1, tile.nr // (variant.panel or tile.nr))
        memory_cost += times / _memory_efficiency(variant, tile)
        longest = max(longest, -(-block_n // tile.nr) * each)
        row_bytes = rows * depth * (2 if dot or variant.shorts else 4)
        held = row_bytes * min(1.0, (config.integer("block_k") or depth) / depth)
        if held > 3 * L2_BYTES // 4:
            # Each column tile reads the rows again, and not from the second-level cache.
            cache_bytes += times * column_tiles * row_bytes
    rows, passes = sum(rows_present), parts.total()
    flops = 2.0 * rows * columns * depth
    ideal = flops / (2 * isa.lanes * FMA_UNITS * (2 if dot else 1))
    efficiency = ideal / cycles if variant.shorts else min(1.0, ideal / cycles)
    # Scales and zero points are read with the codes.
    scale_bytes = gemm.weight_bytes(1) - gemm.n * column_bytes(gemm, gemm.k)
    expert_bytes = columns * depth * depth_bytes + scale_bytes
    cached = expert_bytes <= environment.llc_bytes // 2
    cache_bytes += (8 * rows * depth if variant.widens else 0) + (0 if gemm.name == "up" else 8 * rows * gemm.n)
    width = layer.intermediate if gemm.name == "up" else layer.hidden / layer.top_k
    return Work(
        weight_bytes=float((len(rows_present) if cached else passes) * expert_bytes),
        row_bytes=float(rows * gemm.k * size), out_bytes=float(rows * width * size), cache_bytes=cache_bytes,
        flops=flops, useful_flops=float(gemm.flops(rows)), programs=passes * -(-columns // block_n), path=path,
        efficiency=efficiency, largest=longest / cycles, memory_efficiency=passes / memory_cost,
        overlap=OVERLAP + (PREFETCHED_OVERLAP - OVERLAP) * covered_cycles / cycles,
    )  # fmt: skip


def sparse_work(gemm: ExpertGemm, config: TileConfig, gates: Work | None, counts: Sequence[int], dead: float) -> Work:
    """Return what a launch of `llvm.sparse_experts` does where a share `dead` of the neurons is: gates, and live rows.

    gates: the work of up's gate rows. A neuron's weights are read once if it is alive in any row of its expert; further
    rows find some of them in a cache.
    """
    rows_present, layer, size = present(counts), gemm.layer, DTYPES[gemm.layer.dtype]
    if not rows_present:
        return nothing("fma")
    rows, width = sum(rows_present), layer.intermediate
    neuron_bytes = layer.hidden * size
    read = sum(1 - dead**count for count in rows_present) * width * neuron_bytes
    used = rows * (1 - dead) * width * neuron_bytes
    flops = 2.0 * rows * (1 - dead) * width * layer.hidden
    block_n = min(config.integer("block_n"), width if gates else layer.hidden)
    piece = neuron_bytes if gates else block_n * size
    efficiency = piece / (piece + PIECE_BYTES)
    cycles, cost = flops / (LIVE_UP_EFFICIENCY if gates else LIVE_DOWN_EFFICIENCY), read / efficiency
    if gates is not None:
        cycles, cost = cycles + gates.flops / gates.efficiency, cost + gates.weight_bytes / gates.memory_efficiency
        read, flops = read + gates.weight_bytes, flops + gates.flops
    jobs = rows * -(-layer.hidden // block_n) if gates is None else gates.programs
    outputs = rows * width if gates else rows * layer.hidden / layer.top_k
    return Work(
        weight_bytes=read, row_bytes=float(rows * gemm.k * size), out_bytes=float(outputs * size),
        cache_bytes=used - (read - (gates.weight_bytes if gates else 0)) + (0 if gates else 8 * rows * gemm.n),
        flops=flops, useful_flops=flops, programs=jobs, path="fma", efficiency=flops / cycles if cycles else 1.0,
        largest=1 / jobs, memory_efficiency=read / cost if cost else 1.0, overlap=gates.overlap if gates else OVERLAP,
    )  # fmt: skip


def _product_cycles(variant: Variant, tile: Tile, rows: int, depth: int, isa: Isa, dot: bool) -> tuple[float, float]:
    """Return the cycles of one column tile of a job over all of K, and the part of its weights prefetched."""
    micro, nv = tile.micro, tile.micro.nv
    source = micro.source
    step = 2 if dot else 1
    steps, chunks = depth / step, -(-depth // variant.chunk_k(tile.most))
    element_bytes = 4 / variant.codes.per_word if variant.codes else DTYPES[variant.dtype]
    groups = -(-depth // variant.codes.group) if variant.codes else chunks
    blocks = row_blocks(rows, tile.most)
    turns = FLUSH_K / micro.step / micro.unroll
    chunk_bytes = FLUSH_K * tile.nr * (4 if source in ("f32", "shorts") else min(2, element_bytes))
    weights_bytes = FLUSH_K * tile.nr * element_bytes
    asked = turns * micro.panels * micro.lines_per_panel * 64 * blocks.total()
    covered = min(1.0, asked / weights_bytes) if variant.panel and tile.nr >= variant.panel else 0.0
    shape = Shape(
        source=source, dot=dot, lanes=isa.lanes, registers=isa.registers,
        prefetched=micro.prefetch / micro.unroll / micro.step * step,
        l2_chunk=blocks.total() > 1 and chunk_bytes > 3 * L1_BYTES // 4,
    )  # fmt: skip
    cycles = 0.0
    for size, times in blocks.items():
        ends = chunks * CALL_CYCLES + groups * SUM_CYCLES * size * nv
        if variant.codes is not None and variant.nibbles:
            ends += groups * JOIN_CYCLES * size * nv
            words = depth / variant.codes.per_word
            cycles += times * (words * word_cycles(size, nv, variant.codes, micro.prefetch / micro.unroll) + ends)
            continue
        if variant.codes is not None and variant.shorts:
            ends += groups * SHORT_JOIN_CYCLES * size * nv
            asked_for = micro.prefetch / micro.unroll * 2 / micro.step
            cycles += times * (depth / 2 * pair_cycles(size, nv, variant.codes, variant.stage, asked_for) + ends)
            continue
        cycles += times * (steps * step_cycles(size, nv, shape) + ends)
    if variant.codes is not None and variant.stage and variant.shorts:
        words = 0.0 if variant.panel else depth / variant.codes.per_word * STAGE_PLAIN_CYCLES
        cycles += nv * (words + depth / 2 * STAGE_PACKED_CYCLES)
    elif variant.stage and variant.nibbles:
        cycles += depth / CODES_PER_WORD["int4"] * nv * STAGE_PLAIN_CYCLES
    elif variant.stage:
        stored = 0.5 if source == "pairs" and variant.codes is not None else 1.0
        cycles += depth * nv * (STAGE_PACKED_CYCLES * stored if variant.panel else STAGE_PLAIN_CYCLES)
    return cycles, covered


def _memory_efficiency(variant: Variant, tile: Tile) -> float:
    if not variant.panel:
        return PLAIN_EFFICIENCY
    if tile.nr < variant.panel:
        return HALF_PANEL_PREFETCHED if variant.prefetch else HALF_PANEL_EFFICIENCY
    streams = tile.nr // variant.panel
    base = STREAM_EFFICIENCY.get(streams, 1.0)
    if streams > 1 and variant.prefetch:
        return base * DOUBLE_REQUESTS
    return base


LIBRARY_CALLS = 7
"""Torch operations around each product of `onednn.linear`."""


def onednn_work(gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int]) -> Work:
    """Return what a launch of `onednn.linear` does: one product for each block of rows."""
    rows_present, dtype = present(counts), gemm.layer.dtype
    path = f"library_{dtype}"
    if not rows_present:
        return nothing(path)
    block, size = config.integer("row_block"), DTYPES[dtype]
    blocks = [-(-rows // block) if block else 1 for rows in rows_present]
    padded = sum(count * block if block else rows for rows, count in zip(rows_present, blocks, strict=True))
    weights = gemm.n * gemm.k * size
    # What is read again at once comes from the cache, as far as it holds an expert.
    again = (sum(blocks) - len(blocks)) * weights
    fits = weights <= environment.llc_bytes // 2
    rows = sum(rows_present)
    width = gemm.layer.intermediate if gemm.name == "up" else gemm.layer.hidden / gemm.layer.top_k
    return Work(
        weight_bytes=float(len(rows_present) * weights + (0 if fits else again)),
        cache_bytes=float((again if fits else 0) + 4 * padded * gemm.n * 4), row_bytes=float(padded * gemm.k * size),
        out_bytes=float(rows * width * size), flops=float(gemm.flops(padded)), useful_flops=float(gemm.flops(rows)),
        programs=sum(blocks), launches=LIBRARY_CALLS * sum(blocks), path=path, overlap=OVERLAP,
        memory_efficiency=STREAM_EFFICIENCY[1],
    )  # fmt: skip

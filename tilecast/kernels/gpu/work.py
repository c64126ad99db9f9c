"""What the GPU kernels' launches do, for the cost model: tiles computed, traffic, pipelines, programs an SM holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels.gpu.target import Target, target_of
from tilecast.kernels.gpu.tiles import FP8, instruction, operand_bytes, shared_bytes, tile_shape
from tilecast.kernels.work import Work, nothing, present
from tilecast.problem import DTYPES, ExpertGemm, TileConfig, weight_format

FLOPS_PER_SHARED_BYTE = {"80": 16, "86": 8, "89": 8, "90": 32, "100": 64, "120": 8, "gfx942": 16, "gfx950": 16}
"""Dense 16-bit operations of an SM in the time of one byte from shared memory (128 a cycle): whitepapers of the
architectures, "SM"; those of AMD: "CDNA 3", compute unit."""
SMALL_INSTRUCTION = 0.62
"""Part of the peak that `mma.sync` reaches where a larger instruction exists (Luo et al., "Benchmarking and
Dissecting the Nvidia Hopper GPU Architecture")."""
REGISTERS, OTHER_REGISTERS = 1 << 16, 64
"""32-bit registers of an SM; those of a thread that hold no sums: addresses, fragments."""
MAX_WARPS = 64
WIDENING_INSTRUCTIONS = {"awq": 4.6, "int4": 4.6, "int8": 7.3, "fp8": 3.9}
"""Instructions of a lane that make a weight of a code: those of a step of 16×64×128 in machine code for sm_90, less
those of dense weights."""


def unit_target(environment: Environment) -> Target:
    """Return the target of an environment; raises DeviceError for an unknown one."""
    target = target_of(environment)
    if target is None:
        raise DeviceError(f"{environment.arch} is none of the architectures that kernels are checked on")
    return target


def efficiency(gemm: ExpertGemm, config: TileConfig, target: Target) -> float:
    """Return the fraction of the multiply-add peak that a tile can reach: its instruction and its operands' traffic."""
    m, n, _ = tile_shape(config)
    kind = instruction(gemm, config, target)
    if gemm.layer.dtype == "fp32":
        # A sum is fed by a row and a column from shared memory, kept in registers for a thread's square of sums.
        side = math.sqrt(m * n / (32 * config.integer("num_warps")))
        return min(1.0, side / (side + 2))
    # Codes are multiplied after they became as wide as the rows, but on fp8 units.
    size, warps = 1 if config.kernel == FP8 else DTYPES[gemm.layer.dtype], config.integer("num_warps")
    if kind in ("wgmma", "tcgen05"):
        # Each instruction of 64 rows (128 for tcgen05) reads its own rows and all columns.
        reads = m + n * max(1, m // (64 if kind == "wgmma" else 128))
    else:
        down = max(1, min(warps, m // 16))
        reads = m * max(1, warps // down) + n * down
    traffic = size * (reads + m + n) * FLOPS_PER_SHARED_BYTE[target.arch] * (2 if config.kernel == FP8 else 1)
    reached = 2 * m * n / max(2 * m * n, traffic)
    if config.kernel == FP8:
        # Half the bytes of an operand, twice the rate: one tile is as busy with its traffic as in 16 bits.
        return 2.0 * reached
    reached /= 1.0 + widening(gemm, config, target)
    large = kind == target.mma[0]
    return reached * (1.0 if large else SMALL_INSTRUCTION)


def widening(gemm: ExpertGemm, config: TileConfig, target: Target) -> float:
    """Return the time that making weights of codes takes, in that of multiplying them; 0 for dense ones.

    A step of K makes block_n weights on an SM's 128 lanes and multiplies each with block_m rows.
    """
    form = weight_format(gemm.layer.weight_format)
    if form.kind == "dense":
        return 0.0
    rate = 2 * config.integer("block_m") / FLOPS_PER_SHARED_BYTE[target.arch]
    return WIDENING_INSTRUCTIONS[form.kind] / rate


def resident_programs(gemm: ExpertGemm, config: TileConfig, target: Target) -> int:
    """Return how many programs one SM holds: shared memory, registers and warps."""
    m, n, _ = tile_shape(config)
    warps = config.integer("num_warps")
    threads = warps * target.warp_size
    registers = threads * (m * n // threads + OTHER_REGISTERS)
    available = REGISTERS * (2 if target.kind == "hip" else 1)
    room = min(target.shared_bytes // shared_bytes(gemm, config, target), available // registers, MAX_WARPS // warps)
    waves = dict(config.params).get("waves", 0)
    return max(1, min(room, waves) if isinstance(waves, int) and waves else room)


def column_tiles(gemm: ExpertGemm, config: TileConfig) -> int:
    """Return how many tiles cover the weight rows of an expert."""
    return -(-gemm.n // config.integer("block_n"))


def sorted_work(gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int]) -> Work:
    """Return what a launch over expert-sorted tiles does, with stretches of K where the config has a `chunk`."""
    target, rows_present = unit_target(environment), present(counts)
    path = "simt" if gemm.layer.dtype == "fp32" else "tensor"
    if not rows_present:
        return nothing(path)
    block_m, block_n, block_k = (config.integer(f"block_{axis}") for axis in "mnk")
    size, rows, columns = DTYPES[gemm.layer.dtype], sum(rows_present), column_tiles(gemm, config)
    chunk = dict(config.params).get("chunk", 0)
    length = chunk if isinstance(chunk, int) and chunk else gemm.k
    splits = -(-gemm.k // length)
    steps = -(-min(length, gemm.k) // block_k)
    tiles = [-(-count // block_m) for count in rows_present]
    programs = sum(tiles) * columns * splits
    expert_bytes = gemm.weight_bytes(1)
    row_bytes, code_bytes = operand_bytes(gemm, config)
    rounded = config.kernel == FP8
    # group_m row tiles sweep all columns together; later ones find the weights in the cache if those fit there.
    held = expert_bytes <= environment.llc_bytes // 2
    reads = sum(1 if held else -(-count // config.integer("group_m")) for count in tiles)
    partial = 2 * 4 * splits * rows * gemm.n if splits > 1 or gemm.name == "down" else 0
    width = gemm.layer.intermediate if gemm.name == "up" else gemm.layer.hidden / gemm.layer.top_k
    return Work(
        # Rounding reads rows and writes them as codes of half their size, or less.
        weight_bytes=float(reads * expert_bytes), row_bytes=float(rows * gemm.k * (size + 2 if rounded else size)),
        out_bytes=float(rows * width * size + partial),
        cache_bytes=programs * steps * (block_m * row_bytes + block_n * code_bytes) * block_k,
        flops=2.0 * programs * block_m * block_n * steps * block_k, useful_flops=float(gemm.flops(rows)),
        programs=programs, path=path, launches=(2 if splits > 1 or gemm.name == "down" else 1) + rounded,
        efficiency=efficiency(gemm, config, target), largest=1 / programs,
        resident=resident_programs(gemm, config, target),
        latency_steps=steps / max(1, config.integer("num_stages") - 1),
    )  # fmt: skip


def decode_work(gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int]) -> Work:
    """Return what an unsorted launch does: up a tile for each slot, down one for each token that walks its experts."""
    target, rows_present = unit_target(environment), present(counts)
    path = "simt" if gemm.layer.dtype == "fp32" else "tensor"
    if not rows_present:
        return nothing(path)
    layer, size, rows = gemm.layer, DTYPES[gemm.layer.dtype], sum(rows_present)
    block_m, block_n, block_k = (config.integer(f"block_{axis}") for axis in "mnk")
    columns, steps = column_tiles(gemm, config), -(-gemm.k // block_k)
    code_bytes = operand_bytes(gemm, config)[1]
    # A rank's tokens are not known from its own slots: as many as uniform routing would take for them.
    tokens = max(1, round(rows * layer.global_experts / (layer.experts * layer.top_k)))
    walked = 1.0 if gemm.name == "up" else rows / tokens
    programs = (rows if gemm.name == "up" else tokens) * columns
    computed = programs * walked * steps * block_k
    return Work(
        weight_bytes=float(gemm.weight_bytes(len(rows_present))), row_bytes=float(rows * gemm.k * size),
        out_bytes=float((rows * layer.intermediate if gemm.name == "up" else tokens * layer.hidden) * size),
        cache_bytes=float(computed * (block_n * code_bytes + size)), flops=2.0 * computed * block_m * block_n,
        useful_flops=float(gemm.flops(rows)), programs=programs, path=path,
        efficiency=efficiency(gemm, config, target), largest=1 / programs,
        resident=resident_programs(gemm, config, target),
        latency_steps=walked * steps / max(1, config.integer("num_stages") - 1),
    )  # fmt: skip

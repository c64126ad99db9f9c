# mypy: ignore-errors
"""Routed slots sorted by expert, and the row tiles of the sorted order: jit code of `sorting.py`.

Everything is counted, nothing is appended: a slot's position is the number of slots before it, so no program waits
for another and nothing depends on which one runs first. An id outside [0, EXPERTS) is absent.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def narrow_ids(given, ids, count, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy int64 ids to int32, absent ones as -1, so that 2**32 does not become expert 0."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    expert = tl.load(given + at, mask=inside, other=-1)
    present = (expert >= 0) & (expert < EXPERTS)
    tl.store(ids + at, tl.where(present, expert, -1).to(tl.int32), mask=inside)


@triton.jit
def load_keys(ids, at, count, EXPERTS: tl.constexpr):
    """Return the experts of slots `at`; EXPERTS where absent or past the end."""
    expert = tl.load(ids + at, mask=at < count, other=-1)
    return tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS)


@triton.jit
def write_tiles(
    part, counts, ends, tile_count, tile_experts, tile_starts, tile_ends, block_m, max_tiles,
    BINS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write TILES entries of the tile map, and with part 0 their number, from each expert's slots and end."""
    tiles = (counts + (block_m - 1)) // block_m
    last = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    # Tile t of the map begins at t * block_m + shift[its expert].
    shift = (ends - counts) - (last - tiles) * block_m
    tile = part * TILES + tl.arange(0, TILES)
    expert = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    expert = tl.minimum(expert, BINS - 1)
    inside = (tile < total) & (tile < max_tiles)
    tl.store(tile_experts + tile, expert, mask=inside)
    tl.store(tile_starts + tile, tile * block_m + tl.gather(shift, expert, 0), mask=inside)
    tl.store(tile_ends + tile, tl.gather(ends, expert, 0), mask=inside)
    tl.store(tile_count, total, mask=(part == 0) & (max_tiles > 0))


@triton.jit
def write_offsets(part, ends, offsets, EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """With part 0, write the offsets [EXPERTS + 1] from each expert's end."""
    expert = tl.arange(0, BINS)
    tl.store(offsets + 1 + expert, ends, mask=(expert < EXPERTS) & (part == 0))
    tl.store(offsets, 0, mask=part == 0)


@triton.jit(do_not_specialize=["count", "block_m", "max_tiles"])
def sort_at_once(
    ids, slots, offsets, tile_count, tile_experts, tile_starts, tile_ends, count, block_m, max_tiles,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sort up to SPAN slots: the first programs rank ROWS slots each against all, the others write the layout."""
    program = tl.program_id(0)
    ranking = tl.cdiv(count, ROWS)
    if program < ranking:
        mine = program * ROWS + tl.arange(0, ROWS)
        # One comparison orders by expert, then by slot. Slots past the end come after all others.
        key = load_keys(ids, mine, count, EXPERTS) * SPAN + mine
        position = tl.zeros([ROWS], tl.int32)
        for start in range(0, count, COLUMNS):
            other = start + tl.arange(0, COLUMNS)
            other_key = load_keys(ids, other, count, EXPERTS) * SPAN + other
            position += tl.sum((other_key[None, :] < key[:, None]).to(tl.int32), 1)
        tl.store(slots + position, mine, mask=mine < count)
    else:
        counts = tl.zeros([BINS], tl.int32)
        for start in range(0, count, COLUMNS):
            keys = load_keys(ids, start + tl.arange(0, COLUMNS), count, EXPERTS)
            counts += tl.histogram(keys, BINS, mask=keys < EXPERTS)
        ends = tl.cumsum(counts, 0)
        write_offsets(program - ranking, ends, offsets, EXPERTS, BINS)
        write_tiles(
            program - ranking, counts, ends, tile_count, tile_experts, tile_starts, tile_ends, block_m, max_tiles,
            BINS, TILES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def count_chunks(ids, counts, count, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """Write how many of each chunk's slots every expert gets: counts [chunks, EXPERTS]."""
    chunk = tl.program_id(0)
    keys = load_keys(ids, chunk * CHUNK + tl.arange(0, CHUNK), count, EXPERTS)
    found = tl.histogram(keys, BINS, mask=keys < EXPERTS)
    expert = tl.arange(0, BINS)
    tl.store(counts + chunk * EXPERTS + expert, found, mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["chunks"])
def scan_chunks(counts, totals, chunks, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Replace counts [chunks, EXPERTS] by their sums over all chunks before, and write the totals [EXPERTS]."""
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        at = counts + chunk[:, None] * EXPERTS + expert[None, :]
        inside = (chunk < chunks)[:, None] & (expert < EXPERTS)[None, :]
        found = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(found, 0) - found, mask=inside)
        total += tl.sum(found, 0)
    tl.store(totals + expert, total, mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["count", "chunks", "block_m", "max_tiles"])
def place_slots(
    ids, before, totals, slots, offsets, tile_count, tile_experts, tile_starts, tile_ends,
    count, chunks, block_m, max_tiles,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write each chunk's slots to their positions; the programs after the chunks' write the layout.

    before [chunks, EXPERTS] counts each expert's slots in earlier chunks, totals [EXPERTS] all of them.
    """
    program = tl.program_id(0)
    expert = tl.arange(0, BINS)
    counts = tl.load(totals + expert, mask=expert < EXPERTS, other=0)
    ends = tl.cumsum(counts, 0)
    if program < chunks:
        earlier = tl.load(before + program * EXPERTS + expert, mask=expert < EXPERTS, other=0)
        begins = ends - counts + earlier
        for row in range(0, CHUNK, BLOCK):
            mine = program * CHUNK + row + tl.arange(0, BLOCK)
            key = load_keys(ids, mine, count, EXPERTS)
            position = tl.gather(begins, tl.minimum(key, BINS - 1), 0)
            for column in range(0, row, BLOCK):
                other = load_keys(ids, program * CHUNK + column + tl.arange(0, BLOCK), count, EXPERTS)
                position += tl.sum((other[None, :] == key[:, None]).to(tl.int32), 1)
            other = load_keys(ids, mine, count, EXPERTS)
            earlier_in_block = tl.arange(0, BLOCK)[None, :] < tl.arange(0, BLOCK)[:, None]
            position += tl.sum(((other[None, :] == key[:, None]) & earlier_in_block).to(tl.int32), 1)
            tl.store(slots + position, mine, mask=key < EXPERTS)
    else:
        write_offsets(program - chunks, ends, offsets, EXPERTS, BINS)
        write_tiles(
            program - chunks, counts, ends, tile_count, tile_experts, tile_starts, tile_ends, block_m, max_tiles,
            BINS, TILES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["block_m", "max_tiles"])
def map_tiles(
    offsets, tile_count, tile_experts, tile_starts, tile_ends, block_m, max_tiles,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the tile map of a layout that is sorted already, TILES entries a program."""
    expert = tl.arange(0, BINS)
    ends = tl.load(offsets + 1 + expert, mask=expert < EXPERTS, other=0)
    counts = ends - tl.load(offsets + expert, mask=expert < EXPERTS, other=0)
    write_tiles(
        tl.program_id(0), counts, ends, tile_count, tile_experts, tile_starts, tile_ends, block_m, max_tiles,
        BINS, TILES,
    )  # fmt: skip

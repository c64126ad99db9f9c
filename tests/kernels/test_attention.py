"""Batch-invariant attention: exactness against float64, and bits over paddings, batches, chunks and cache lengths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.cases import error
from tilecast.errors import InputError
from tilecast.kernels.cpu import attention
from tilecast.kernels.cpu.attention import VALUE_CHAIN, attend
from tilecast.kernels.ranges import KeyRanges, causal_ranges, full_ranges, ranges_of

# B, Hq, Hkv, Tq, Tk, D, Dv
SHAPES = [(2, 4, 2, 7, 7, 16, 16), (1, 8, 1, 33, 300, 24, 8), (3, 2, 2, 1, 513, 64, 128), (1, 2, 2, 5, 5, 3, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, query_heads, heads, queries, keys, depth, width = shape
    sizes = [(query_heads, queries, depth), (heads, keys, depth), (heads, keys, width)]
    query, key, value = (draw(batch, *size, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    return query, key, value


def exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    *,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), *(t.repeat_interleave(groups, 1).to(dtype) for t in (key, value))
    scores = query @ key.mT * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores if bias is None else scores + bias.to(dtype)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1].nan_to_num() @ value
    return scores.softmax(-1).nan_to_num() @ value


def masks(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    batch, _, _, queries, keys, _, _ = shape
    causal = torch.ones(queries, keys).tril(keys - queries).bool().expand(batch, 1, queries, keys).clone()
    for number in range(batch):
        causal[number, ..., : 2 * number] = False
    holes = torch.rand(causal.shape, generator=torch.Generator().manual_seed(9)) > 0.3
    far = torch.ones(queries, keys).tril(keys - queries - 4).bool()
    return {"causal": causal, "holes": causal & holes, "window": causal & ~far}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, value = operands(shape, dtype)
    batch, _, _, queries, keys, depth, _ = shape
    scale = depth**-0.5
    for name, mask in masks(shape).items():
        wanted = exact(query, key, value, mask, scale)
        result = attend(query, key, value, ranges_of(mask, batch, queries, keys), scale=scale)
        torchs = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).nan_to_num()
        assert result.dtype == dtype and torch.isfinite(result).all()
        assert error(result, wanted) <= 2 * error(torchs, wanted) + 2**-22, name
        nothing = ~mask.any(-1).expand(result.shape[:3])
        assert not result[nothing].any(), "a query without keys is not zero"


def test_sinks_bias_and_softcap() -> None:
    shape = SHAPES[0]
    query, key, value = operands(shape, torch.float32)
    batch, query_heads, _, queries, keys, depth, _ = shape
    mask, sinks = masks(shape)["causal"], draw(query_heads, seed=5)
    bias = draw(batch, query_heads, queries, keys, seed=6)
    scale = 2 * depth**-0.5
    added = torch.where(mask, bias, torch.finfo(torch.float32).min)
    plain = ranges_of(mask, batch, queries, keys)
    for ranges, options in (
        (plain, {"sinks": sinks}),
        (plain, {"softcap": 1.5}),
        (ranges_of(added, batch, queries, keys), {}),
    ):
        given = {"bias": bias} if ranges.bias is not None else {}
        wanted = exact(query, key, value, mask, scale, **options, **given)  # type: ignore[arg-type]
        torchs = exact(query, key, value, mask, scale, **options, **given, dtype=torch.float32)  # type: ignore[arg-type]
        result = attend(query, key, value, ranges, scale=scale, **options)  # type: ignore[arg-type]
        assert error(result, wanted) <= 2 * error(torchs, wanted) + 2**-22, options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 270])
def test_bits_of_a_query_depend_on_its_own_keys_alone(dtype: torch.dtype, window: int) -> None:
    """Whole or in chunks or one by one, padded on the left by anything, in a long cache, in any batch."""
    length, depth = VALUE_CHAIN + 45, 24
    query, key, value = operands((1, 4, 2, length, length, depth, 16), dtype)

    def run(begin: int, end: int, pad: int, room: int, batch: int, place: int) -> torch.Tensor:
        keys = pad + end + room
        k = torch.full((batch, 2, keys, depth), torch.nan, dtype=dtype)
        v = torch.full((batch, 2, keys, 16), torch.nan, dtype=dtype)
        q = draw(batch, 4, end - begin, depth, seed=8, dtype=dtype)
        for sequence in range(batch):
            k[sequence], v[sequence] = draw(2, keys, depth, seed=2).to(dtype), draw(2, keys, 16, seed=3).to(dtype)
        # NaN in the padding: what is masked must not be read into a sum.
        k[place], v[place] = torch.nan, torch.nan
        k[place, :, pad : pad + end], v[place, :, pad : pad + end] = key[0, :, :end], value[0, :, :end]
        q[place] = query[0, :, begin:end]
        positions, queries = torch.arange(keys), torch.arange(pad + begin, pad + end)
        mask = (positions >= pad) & (positions <= queries[:, None])
        mask = mask & (positions > queries[:, None] - window) if window else mask
        other = (positions <= queries[:, None]).expand(batch, 1, -1, -1).clone()
        other[place] = mask
        return attend(q, k, v, ranges_of(other, batch, end - begin, keys), scale=0.2)[place]

    whole = run(0, length, 0, 0, 1, 0)
    for begin, end, pad, room, batch, place in (
        (0, length, 5, 0, 1, 0),
        (0, length, 0, 70, 3, 1),
        (0, 100, 1, 3, 2, 1),
        (100, length, 13, 0, 1, 0),
        (258, 259, 0, 0, 1, 0),
        (length - 1, length, 37, 5, 4, 3),
        (length - 7, length, 300, 1, 2, 0),
    ):
        part = run(begin, end, pad, room, batch, place)
        assert torch.equal(part, whole[:, begin:end]), (begin, end, pad, room, batch)


def test_bits_do_not_depend_on_how_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands((2, 4, 2, 90, 300, 16, 32), torch.float32)
    ranges = causal_ranges(query, key, 210)
    whole = attend(query, key, value, ranges, scale=0.3)
    for rows, work in ((8, 1 << 30), (17, 1), (200, 1)):
        monkeypatch.setattr(attention, "ROWS_PER_JOB", rows)
        monkeypatch.setattr(attention, "WORK_OF_A_THREAD", work)
        assert torch.equal(attend(query, key, value, ranges, scale=0.3), whole), rows


def test_another_blocking_of_the_keys_gives_other_bits() -> None:
    """The negative control: chains counted from the first key of the cache would differ with padding."""
    query, key, value = operands((1, 1, 1, 1, VALUE_CHAIN + 40, 16, 16), torch.float32)
    forward = attend(query, key, value, full_ranges(query, key), scale=0.5)
    backward = attend(query, key.flip(2), value.flip(2), full_ranges(query, key), scale=0.5)
    assert not torch.equal(forward, backward)
    assert torch.allclose(forward, backward, atol=1e-5)


def test_strided_operands() -> None:
    shape = (2, 4, 2, 9, 9, 16, 16)
    query, key, value = operands(shape, torch.bfloat16)
    ranges = causal_ranges(query, key)
    wanted = attend(query, key, value, ranges, scale=0.25)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    assert torch.equal(attend(*strided, ranges, scale=0.25), wanted)
    spread = [torch.stack([t, t], -1)[..., 0] for t in (query, key, value)]
    assert torch.equal(attend(*spread, ranges, scale=0.25), wanted)


def test_nothing_to_do_and_nothing_to_read() -> None:
    query, key, value = operands((1, 2, 2, 3, 4, 8, 8), torch.float32)
    none = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    assert not attend(query, key, value, ranges_of(none, 1, 3, 4), scale=1.0).any()
    assert attend(query[:, :, :0], key, value, full_ranges(query[:, :, :0], key), scale=1.0).shape == (1, 2, 0, 8)


def test_wrong_operands_are_one_clear_error() -> None:
    query, key, value = operands((1, 2, 2, 3, 4, 8, 8), torch.float32)
    ranges = full_ranges(query, key)
    wrong: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeyRanges, str]] = [
        (query.double(), key.double(), value.double(), ranges, "of one dtype"),
        (query, key.half(), value, ranges, "of one dtype"),
        (query, key[:, :1, :, :4], value, ranges, "do not fit together"),
        (draw(1, 3, 3, 8), key, value, ranges, "do not fit together"),
        (query, key[:, :, :2], value[:, :, :2], ranges, "the mask is for"),
    ]
    for q, k, v, given, message in wrong:
        with pytest.raises(InputError, match=message):
            attend(q, k, v, given, scale=1.0)
    with pytest.raises(InputError, match="sinks are"):
        attend(query, key, value, ranges, scale=1.0, sinks=torch.zeros(3))
    with pytest.raises(InputError, match="mask is"):
        ranges_of(torch.ones(1, 1, 5, 4, dtype=torch.bool), 1, 3, 4)
    with pytest.raises(InputError, match="mask is"):
        ranges_of(torch.ones(1, 1, 3, 4, dtype=torch.int32), 1, 3, 4)

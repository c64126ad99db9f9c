"""Packed tensors of checkpoints as rows of a stack, exactly, against packing and unpacking code by code."""

from __future__ import annotations

import pytest
import torch

from tests import quantized_checkpoints as checkpoints
from tilecast.errors import InputError
from tilecast.kernels.awq import AwqTensors, Rows, awq_of_rows, check_awq, pack_words, rows_of_awq, unpack_words
from tilecast.kernels.compressed import rows_of_fp8, rows_of_int8, rows_of_packed, stored_group
from tilecast.kernels.formats import QuantizedStack
from tilecast.problem import ExpertLayer


def weight(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02


def dequantized(rows: Rows, form: str) -> torch.Tensor:
    """What rows stand for, by the stack's own arithmetic in float32."""
    count, width = rows.codes.shape
    width *= 2 if rows.codes.dtype is torch.uint8 else 1
    layer = ExpertLayer(
        hidden=count, intermediate=width, experts=1, top_k=1, gated=False, activation="relu", weight_format=form
    )
    codes, scales, zeros = (None if part is None else part[None].contiguous() for part in rows)
    assert codes is not None and scales is not None
    stack = QuantizedStack(format=form, codes=codes, scales=scales, zeros=zeros)
    stack.check(layer.down)
    return stack.dequantized(layer.down, 0, torch.float32)


def test_a_nibble_holds_the_column_that_autoawq_puts_there() -> None:
    words = torch.tensor([[0x76543210]], dtype=torch.int32)  # nibble i is i
    found = [0] * 8
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        found[column] = place
    assert unpack_words(words).tolist() == [found]


def test_words_with_their_highest_bit_set_are_unpacked() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (5, 40), generator=generator, dtype=torch.uint8)
    words = pack_words(codes)
    assert (words < 0).any() and torch.equal(unpack_words(words), codes)
    assert torch.equal(words, checkpoints.packed_along_columns(codes.tolist(), checkpoints.AWQ_ORDER))


@pytest.mark.parametrize(("rows", "width", "group"), [(24, 64, 32), (8, 128, 64), (16, 256, 128)])
def test_awq_is_dequantised_exactly_and_written_back(rows: int, width: int, group: int) -> None:
    tensors, wanted = checkpoints.awq(group)(weight(rows, width))
    stored = AwqTensors(tensors["qweight"], tensors["qzeros"], tensors["scales"])
    check_awq(stored, (rows, width), group, "w")
    found = rows_of_awq(stored)
    assert torch.equal(dequantized(found, f"awq_g{group}"), wanted)
    assert all(torch.equal(one, other) for one, other in zip(awq_of_rows(found), stored, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "kept"), [(32, "g32"), (64, "g64"), (0, ""), (256, "g128")])
def test_packed_integers_are_dequantised_exactly(bits: int, group: int, kept: str) -> None:
    tensors, wanted = checkpoints.packed(bits, group)(weight(24, 256))
    form = f"int{bits}_{kept or ('channel' if bits == 8 else 'g128')}"
    found = rows_of_packed(
        tensors["weight_packed"], tensors["weight_scale"], None, shape=(24, 256), group=group, form=form, what="w"
    )
    assert torch.equal(dequantized(found, form), wanted)


@pytest.mark.parametrize("group", [32, 0])
def test_packed_zero_points_are_read_along_the_rows(group: int) -> None:
    tensors, wanted = checkpoints.packed(4, group, symmetric=False)(weight(24, 64))
    form = f"awq_g{stored_group(group, 64)}"
    found = rows_of_packed(
        tensors["weight_packed"], tensors["weight_scale"], tensors["weight_zero_point"], shape=(24, 64), group=group,
        form=form, what="w",
    )  # fmt: skip
    assert torch.equal(dequantized(found, form), wanted)


@pytest.mark.parametrize(("group", "form"), [(0, "int8_channel"), (64, "int8_g64")])
def test_bytes_are_dequantised_exactly(group: int, form: str) -> None:
    tensors, wanted = checkpoints.int8(group)(weight(24, 128))
    found = rows_of_int8(tensors["weight"], tensors["weight_scale"], shape=(24, 128), group=group, form=form, what="w")
    assert torch.equal(dequantized(found, form), wanted)


@pytest.mark.parametrize("shared", ["block", "channel", "tensor"])
@pytest.mark.parametrize(("rows", "width"), [(256, 128), (136, 200), (24, 64)])
def test_fp8_is_dequantised_exactly(shared: str, rows: int, width: int) -> None:
    tensors, wanted = checkpoints.fp8(shared)(weight(rows, width))
    form = {"block": "fp8_block128"}.get(shared, f"fp8_{shared}")
    scale = tensors["weight_scale_inv" if shared == "block" else "weight_scale"]
    found = rows_of_fp8(tensors["weight"], scale, shape=(rows, width), form=form, what="w")
    assert torch.equal(dequantized(found, form), wanted)


def test_scales_that_are_powers_of_two_in_a_byte_are_read() -> None:
    codes = torch.ones((128, 256), dtype=torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 4.0]]).to(torch.float8_e8m0fnu)
    found = rows_of_fp8(codes, scale, shape=(128, 256), form="fp8_block128", what="w")
    assert found.scales.tolist() == [[0.5, 4.0]]


def awq_tensors(**changes: torch.Tensor) -> AwqTensors:
    tensors, _ = checkpoints.awq(32)(weight(16, 64))
    return AwqTensors(**{**tensors, **changes})


@pytest.mark.parametrize(
    ("found", "shape", "group", "message"),
    [
        (awq_tensors(), (16, 64), 48, "has groups of 48, expected one of 32, 64, 128"),
        (awq_tensors(), (16, 80), 32, "80 inputs, which cut a group of 32 in two"),
        (awq_tensors(), (12, 64), 32, "12 outputs, which do not fill words of 8"),
        (awq_tensors(), (16, 64), 64, r"qzeros is torch.int32 \(2, 2\), expected torch.int32 \(1, 2\)"),
        (awq_tensors(), (24, 64), 32, r"qweight is torch.int32 \(64, 2\), expected torch.int32 \(64, 3\)"),
        (awq_tensors(scales=torch.ones(2, 8)), (16, 64), 32, r"scales is torch.float32 \(2, 8\), expected floats"),
        (awq_tensors(qweight=torch.ones(64, 2)), (16, 64), 32, "qweight is torch.float32"),
    ],
)
def test_awq_tensors_that_do_not_fit_are_refused(
    found: AwqTensors, shape: tuple[int, int], group: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_awq(found, shape, group, "layer")


def test_other_tensors_that_do_not_fit_are_refused() -> None:
    tensors, _ = checkpoints.packed(4, 32, symmetric=False)(weight(16, 64))
    words, scale, zeros = tensors["weight_packed"], tensors["weight_scale"], tensors["weight_zero_point"]

    def read(found: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None, form: str, group: int = 32) -> Rows:
        return rows_of_packed(found, scale, zeros, shape=(16, 64), group=group, form=form, what="w")

    with pytest.raises(InputError, match="lacks a weight_zero_point"):
        read(words, scale, None, "awq_g32")
    with pytest.raises(InputError, match="has a weight_zero_point"):
        read(words, scale, zeros, "int4_g32")
    with pytest.raises(InputError, match=r"weight_zero_point is torch.int32 \(1, 2\), expected torch.int32 \(2, 2\)"):
        read(words, scale, zeros[:1], "awq_g32")
    with pytest.raises(InputError, match=r"weight_scale is torch.float16 \(16, 2\), expected floats \(16, 1\)"):
        read(words, scale, zeros, "awq_g64", 64)
    with pytest.raises(InputError, match="64 inputs, which cut a group of 48"):
        read(words, scale, zeros, "awq_g32", 48)
    with pytest.raises(InputError, match=r"weight_packed is torch.int32 \(16, 4\), expected torch.int32 \(16, 8\)"):
        read(words[:, :4], scale, zeros, "awq_g32")
    with pytest.raises(InputError, match=r"expected torch\.float8_e4m3fn"):
        rows_of_fp8(torch.ones(16, 64), scale, shape=(16, 64), form="fp8_tensor", what="w")
    with pytest.raises(
        InputError, match=r"scale is torch.float16 \(16, 2\), expected floats \(16, 1\) for fp8_channel"
    ):
        codes = torch.ones((16, 64), dtype=torch.float8_e4m3fn)
        rows_of_fp8(codes, scale, shape=(16, 64), form="fp8_channel", what="w")
    with pytest.raises(InputError, match="groups are of all of 48, 64 inputs"):
        stored_group(0, 48, 64)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e5m2])
def test_scales_of_fp8_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    """Bytes may be exponents: read as numbers they would be wrong by orders of magnitude."""
    codes = torch.ones(128, 256).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=rf"its scale is {dtype} \(1, 2\), expected floats \(1, 2\)"):
        rows_of_fp8(codes, torch.full((1, 2), 120).to(dtype), shape=(128, 256), form="fp8_block128", what="w")

"""Quantised weights for the CPU kernels: codes in panels of columns, scales and zero points beside them.

Plain rows of codes are read 32 bits at a time, so a panel is the transpose of a plain row's words: step s holds, for
each column of the panel, the word of 8 (4-bit) or 4 codes of K. Scales and zero points lie by group in panels of the
same columns; scales that a block of 128 rows or more share are kept once a vector of columns. Columns are ordered and
padded as in dense panels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tilecast.errors import InputError
from tilecast.kernels.cpu._build import keeps_subnormals
from tilecast.kernels.cpu._codes import SUM_LANES, Codes, codes_of
from tilecast.kernels.cpu._nibbles import GROUP_BYTES
from tilecast.kernels.cpu._variant import FLUSH_K
from tilecast.kernels.cpu.columns import PLAIN_SCALE_PANEL, padded_columns, padded_k
from tilecast.kernels.cpu.isa import Isa, host_isa
from tilecast.kernels.cpu.layouts import column_order, empty_on_large_pages
from tilecast.kernels.formats import QuantizedStack, scale_rows
from tilecast.kernels.scales import scale_shape
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertGemm, weight_format

SCALE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ROOM = 16
"""Words before the codes: kernels read a few bytes ahead of the first one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scales:
    """Scales and zero points in panels of `panel` columns.

    values: [E, panels, groups, panel], or float32 [E, panels, groups, panel / lanes] where a vector of columns shares
    one; zeros: uint8 [E, panels, groups, panel], or None; dtype: what the scales were given in.
    """

    panel: int
    values: torch.Tensor
    zeros: torch.Tensor | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of scales and zero points."""
        return self.values.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class PanelStack:
    """A quantised stack in panels: codes int32 [E, panels, words of K, panel columns], scales beside them."""

    format: str
    codes: torch.Tensor
    scales: Scales

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.codes.device

    def data_ptr(self) -> int:
        """Return the address of the codes, which names the stack."""
        return self.codes.data_ptr()


def generator_codes(gemm: ExpertGemm, scales: Scales, isa: Isa, short: bool) -> Codes:
    """Return what the generator has to know of a GEMM's quantised weights. short: rows are integers of 16 bits."""
    layer, scale = gemm.layer, SCALE_NAMES[scales.values.dtype]
    return codes_of(
        weight_format(layer.weight_format), chain=FLUSH_K, scale=scale, panel=scales.panel, dtype=layer.dtype,
        byte_pairs=isa.byte_pairs, short=short,
    )  # fmt: skip


def row_stride(gemm: ExpertGemm, codes: Codes, depth: int) -> int:
    """Return the bytes from row to row of what rows become before they meet codes."""
    kept = GROUP_BYTES * -(-gemm.k // codes.group) if codes.limbs or codes.short else 0
    elements = -(-depth // SUM_LANES) * SUM_LANES if codes.short else depth
    return elements * codes.row_element_bytes + kept


def check_codes(stack: QuantizedStack) -> None:
    """Raise InputError where fp8 codes are not numbers, or would not be read as theirs.

    What stands for NaN would be read as a number, and the smallest codes are subnormal numbers on their way: where
    kernels cannot keep a processor from flushing those, zeros would be made of them.
    """
    if stack.codes.dtype is not torch.float8_e4m3fn:
        return
    if not keeps_subnormals(host_isa().triple) and not bool(torch.tensor([2.0**-127], device="cpu") * 2.0**20 > 0):
        raise InputError("fp8 weights need subnormal numbers, which are flushed; call torch.set_flush_denormal(False)")
    for expert, codes in enumerate(stack.codes):
        if bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise InputError(f"the fp8 weights of expert {expert} hold NaN; quantise them again from finite weights")


def pack_codes(stack: QuantizedStack, gemm: ExpertGemm, panel: int, isa: Isa) -> PanelStack:
    """Return a plain quantised stack in panels, one expert at a time; raises InputError where it does not fit."""
    stack.check(gemm)
    check_codes(stack)
    order = column_order(gemm, isa.lanes)
    present, rows = order >= 0, order.clamp(min=0)
    columns, words = len(order), padded_k(gemm, pairs=False) // _per_word(gemm)
    shape = (gemm.layer.experts, columns // panel, words, panel)
    packed = empty_on_large_pages((ROOM + math.prod(shape),), torch.int32)[ROOM:].view(shape)
    plain = stack.codes.view(torch.uint8)
    for expert in range(gemm.layer.experts):
        padded = torch.zeros(columns, 4 * words, dtype=torch.uint8, device="cpu")
        padded[:, : plain.shape[-1]] = plain[expert].index_select(0, rows)
        padded[~present] = 0
        packed[expert] = padded.view(torch.int32).view(columns // panel, panel, words).transpose(1, 2)
    return PanelStack(format=stack.format, codes=packed, scales=pack_scales(stack, gemm, panel, isa))


def unpack_codes(packed: PanelStack, gemm: ExpertGemm, isa: Isa) -> QuantizedStack:
    """Return the plain quantised stack behind panels, exactly as it was packed."""
    experts, panels, words, panel = packed.codes.shape
    order = column_order(gemm, isa.lanes)
    present = order >= 0
    width = gemm.k // weight_format(gemm.layer.weight_format).codes_per_byte
    plain = torch.empty((experts, gemm.n, width), dtype=torch.uint8, device="cpu")
    for expert in range(experts):
        rows = packed.codes[expert].transpose(1, 2).reshape(panels * panel, words).contiguous().view(torch.uint8)
        plain[expert].index_copy_(0, order[present], rows[present, :width])
    scales, zeros = _unpack_scales(packed.scales, gemm, isa)
    kind = weight_format(packed.format).kind
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kind, torch.uint8)
    return QuantizedStack(format=packed.format, codes=plain.view(dtype), scales=scales, zeros=zeros)


def _per_word(gemm: ExpertGemm) -> int:
    return 4 * weight_format(gemm.layer.weight_format).codes_per_byte


def pack_scales(stack: QuantizedStack, gemm: ExpertGemm, panel: int, isa: Isa) -> Scales:
    """Return the scales and zero points of a plain stack in panels of `panel` columns."""
    order = column_order(gemm, isa.lanes)
    shared = weight_format(gemm.layer.weight_format).rows != 1
    row = scale_rows(gemm)[order.clamp(min=0)]

    def paneled(tensor: torch.Tensor) -> torch.Tensor:
        by_column = tensor.index_select(1, row) * (order >= 0)[:, None].to(tensor.dtype)
        by_panel = by_column.view(gemm.layer.experts, -1, panel, tensor.shape[-1]).transpose(2, 3)
        return (by_panel[..., :: isa.lanes] if shared else by_panel).contiguous()

    dtype = stack.scales.dtype
    # Blocks are few; halves are widened here where the CPU would have to call a library for it.
    wide = shared or (dtype is torch.float16 and not isa.half)
    values = paneled(stack.scales.to(torch.float32) if wide else stack.scales)
    return Scales(panel=panel, values=values, zeros=None if stack.zeros is None else paneled(stack.zeros), dtype=dtype)


def _unpack_scales(scales: Scales, gemm: ExpertGemm, isa: Isa) -> tuple[torch.Tensor, torch.Tensor | None]:
    order = column_order(gemm, isa.lanes)
    present = order >= 0
    row = scale_rows(gemm)[order[present]]

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] != scales.panel:
            tensor = tensor.repeat_interleave(isa.lanes, dim=-1)
        by_column = tensor.transpose(2, 3).reshape(tensor.shape[0], -1, tensor.shape[2])
        found = torch.empty((tensor.shape[0], *scale_shape(gemm)), dtype=tensor.dtype, device="cpu")
        found[:, row] = by_column[:, present]
        return found

    return plain(scales.values).to(scales.dtype), None if scales.zeros is None else plain(scales.zeros)


def scales_of(weights: GemmWeights, panel: int, isa: Isa) -> Scales:
    """Return the scales that a launch on quantised weights reads; raises InputError if they are not what they should.

    Plain stacks keep theirs in another order than launches need, so those are brought into panels once a stack.
    """
    if weights.layout != PLAIN:
        reason = _wrong_panels(weights.data, weights.gemm, panel, isa)
        if reason is not None:
            raise InputError(f"weights in layout {weights.layout} {reason} for {weights.gemm.layer.label}")
        found: Scales = weights.data.scales
        return found
    known: Scales | None = weights.plans.get("scales")
    if known is None:
        stack = weights.data
        if not isinstance(stack, QuantizedStack) or stack.device.type != "cpu":
            label = weights.gemm.layer.label
            raise InputError(
                f"plain weights of {label} are {type(stack).__name__}, expected a QuantizedStack on the CPU"
            )
        stack.check(weights.gemm)
        check_codes(stack)
        known = weights.plans["scales"] = pack_scales(stack, weights.gemm, PLAIN_SCALE_PANEL, isa)
    return known


def scale_words(scales: Scales) -> dict[str, int]:
    """Return the words of the argument block about scales."""
    values, zeros = scales.values, scales.zeros
    words = {
        "scales": values.data_ptr(), "scale_expert_stride": values.stride(0) * values.itemsize,
        "scale_panel_stride": values.stride(1) * values.itemsize,
    }  # fmt: skip
    if zeros is not None:
        words |= {
            "zeros": zeros.data_ptr(), "zero_expert_stride": zeros.stride(0), "zero_panel_stride": zeros.stride(1)
        }  # fmt: skip
    return words


def _wrong_panels(data: object, gemm: ExpertGemm, panel: int, isa: Isa) -> str | None:
    """Return why these are not a GEMM's quantised weights in panels: addresses are computed from sizes."""
    form = gemm.layer.weight_format
    if not isinstance(data, PanelStack) or data.format != form:
        return f"are {getattr(data, 'format', type(data).__name__)}, expected panels of {form}"
    columns, words = padded_columns(gemm, isa.lanes), padded_k(gemm, pairs=False) // _per_word(gemm)
    codes = (gemm.layer.experts, columns // panel, words, panel)
    each = panel // isa.lanes if weight_format(form).rows != 1 else panel
    groups = (gemm.layer.experts, columns // panel, scale_shape(gemm)[1])
    scales = data.scales
    good = data.codes.shape == codes and scales.values.shape == (*groups, each) and scales.panel == panel
    good = good and data.codes.storage_offset() >= ROOM
    good = good and (scales.zeros is None or scales.zeros.shape == (*groups, panel))
    tensors = [tensor for tensor in (data.codes, scales.values, scales.zeros) if tensor is not None]
    if not good or any(not tensor.is_contiguous() or tensor.device.type != "cpu" for tensor in tensors):
        found = f"have codes {tuple(data.codes.shape)} and scales {tuple(scales.values.shape)}"
        return f"{found}, expected {codes} and room before"
    return None

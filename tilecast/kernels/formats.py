"""Weight formats: how a stack of quantised expert weights is held, and the numbers that it stands for.

A weight is (code - zero) · scale. `awq_g128` holds 4-bit codes with a zero point and a scale for every 128 elements of
K of every weight row; `int4_g128` and `int8_g128` are symmetric; `fp8_block128` holds e4m3 codes with one scale for
every block of 128 rows and 128 elements of K, `fp8_channel` one for every row, `fp8_tensor` one for every expert (and
for gate and up apart). Whatever a checkpoint stores, it is brought into the one form here without a dequantised copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilecast.errors import InputError
from tilecast.kernels.awq import SCALE_DTYPES
from tilecast.kernels.scales import scale_shape
from tilecast.problem import ExpertGemm, WeightFormat, weight_format

CODE_DTYPES = {"awq": torch.uint8, "int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
SYMMETRIC_ZERO = {"int4": 8, "int8": 0}
"""What a symmetric format subtracts from its codes: int4 ones are held unsigned."""
ALL = slice(None)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedStack:
    """The weights of all experts of one GEMM: [E, N, K] in a format other than dense.

    codes: uint8 [E, N, K/2] for 4-bit formats, the even k in the low half of a byte; int8 [E, N, K]; float8_e4m3fn
    [E, N, K]. scales: [E, N, K/group] for grouped formats, else [E, scale rows, scale columns] as `scale_shape` says.
    zeros: uint8 [E, N, K/group] with `awq`, else None. All contiguous and on one device.
    """

    format: str
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on the GEMM; raises InputError."""
        kind = weight_format(self.format).kind
        if kind == "dense" or self.codes.dtype is not CODE_DTYPES[kind] or self.codes.dim() != 3:
            raise InputError(f"codes are {self.codes.dtype} {tuple(self.codes.shape)}, not those of {self.format}")
        if self.scales.dim() != 3 or self.scales.dtype not in SCALE_DTYPES:
            raise InputError(f"scales are {self.scales.dtype} {tuple(self.scales.shape)}, expected floats [E, …, …]")
        if (self.zeros is None) == (kind == "awq"):
            raise InputError(f"{self.format} {'needs' if kind == 'awq' else 'has no'} zero points")
        for name, tensor in (("codes", self.codes), ("scales", self.scales), ("zeros", self.zeros)):
            if tensor is not None and (not tensor.is_contiguous() or tensor.device != self.codes.device):
                raise InputError(f"{name} are not contiguous, or not on {self.codes.device} like the codes")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape [E, N, K] of the weights."""
        experts, rows, width = self.codes.shape
        return experts, rows, width * weight_format(self.format).codes_per_byte

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.codes.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes, scales and, where there are some, zero points."""
        return tuple(tensor for tensor in (self.codes, self.scales, self.zeros) if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def check(self, gemm: ExpertGemm) -> None:
        """Raise InputError unless these can be the weights of `gemm`."""
        wanted = (gemm.layer.experts, gemm.n, gemm.k)
        if self.format != gemm.layer.weight_format or self.shape != wanted:
            raise InputError(
                f"weights are {self.format} {self.shape}, expected {gemm.layer.weight_format} {wanted} for {gemm.name}"
            )
        scales = (gemm.layer.experts, *scale_shape(gemm))
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is not None and tensor.shape != scales:
                raise InputError(
                    f"{name} are {tuple(tensor.shape)}, expected {scales} for {gemm.layer.label} {gemm.name}"
                )

    def check_values(self) -> None:
        """Raise InputError for scales that are not finite or negative, and for zero points beyond the codes."""
        wrong = ~(self.scales.isfinite() & (self.scales >= 0))
        for what, tensor, bad, wanted in (
            ("scales", self.scales, wrong, "finite and not negative"),
            ("zero points", self.zeros, None if self.zeros is None else self.zeros > 15, "0 to 15"),
        ):
            if tensor is not None and bad is not None and bool(bad.any()):
                place = bad.nonzero()[0].tolist()
                value = float(tensor[tuple(place)])
                raise InputError(f"{what} of expert {place[0]} hold {value:g}, expected {wanted}")

    def integers(self, expert: int, rows: slice = ALL) -> torch.Tensor:
        """Return one expert's codes [N, K], or those of some rows, less their zero points, as float32 (exact)."""
        form = weight_format(self.format)
        codes = self.codes[expert, rows]
        if form.kind == "fp8":
            return codes.to(torch.float32)
        values = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2) if form.codes_per_byte == 2 else codes
        found = values.to(torch.float32)
        if self.zeros is not None:
            return found - self.zeros[expert, rows].to(torch.float32).repeat_interleave(form.group, dim=1)
        return found - SYMMETRIC_ZERO[form.kind]

    def row_scales(
        self, gemm: ExpertGemm, expert: int, dtype: torch.dtype = torch.float32, rows: slice = ALL
    ) -> torch.Tensor:
        """Return one expert's scales for each row, or some rows, and element of K: [N, K]."""
        form = weight_format(self.format)
        scales = self.scales[expert].to(dtype).index_select(0, scale_rows(gemm)[rows].to(self.device))
        if form.group:
            scales = scales.repeat_interleave(form.group, dim=1)[:, : gemm.k]
        return scales.expand(-1, gemm.k)

    def dequantized(
        self, gemm: ExpertGemm, expert: int, dtype: torch.dtype = torch.float64, rows: slice = ALL
    ) -> torch.Tensor:
        """Return one expert's weights [N, K], or some rows of them: (code - zero) · scale, computed in `dtype`."""
        return self.integers(expert, rows).to(dtype) * self.row_scales(gemm, expert, dtype, rows)


def scale_rows(gemm: ExpertGemm) -> torch.Tensor:
    """Return, for each of the N weight rows, which row of the scales is its: int64 [N]."""
    form = weight_format(gemm.layer.weight_format)
    rows = torch.arange(gemm.n)
    if form.rows == 1:
        return rows
    parts = 2 if gemm.name == "up" and gemm.layer.gated else 1
    width = gemm.n // parts
    each = -(-width // form.rows) if form.rows else 1
    block = rows % width // form.rows if form.rows else torch.zeros_like(rows)
    return rows // width * each + block


def check_sizes(gemm: ExpertGemm) -> None:
    """Raise InputError where a layer's sizes do not fit its weight format: a group or a word cut in two."""
    if gemm.misfit is not None:
        raise InputError(gemm.misfit)


def quantize(weights: torch.Tensor, gemm: ExpertGemm, scale_dtype: torch.dtype = torch.float16) -> QuantizedStack:
    """Return dense weights [E, N, K] rounded to the layer's weight format, to nearest, scales from the extremes.

    Raises InputError for weights of another shape, and for those that no finite scale fits.
    """
    form = weight_format(gemm.layer.weight_format)
    check_sizes(gemm)
    if tuple(weights.shape) != (gemm.layer.experts, gemm.n, gemm.k):
        raise InputError(f"weights are {tuple(weights.shape)}, expected {(gemm.layer.experts, gemm.n, gemm.k)}")
    parts = []
    for number, expert in enumerate(weights):
        part = _quantized(expert.to(torch.float32), gemm, form, scale_dtype)
        # What is not finite is in its group's extremes, and so in a scale.
        if not bool(part[1].isfinite().all()):
            room = "" if form.kind == "fp8" else f", or too large for scales of {scale_dtype}"
            which = f" of expert {number}" if len(weights) > 1 else ""
            raise InputError(f"weights{which} are not finite{room}")
        parts.append(part)
    codes, scales, zeros = (None if p[0] is None else torch.stack(list(p)) for p in zip(*parts, strict=True))
    assert codes is not None and scales is not None
    return QuantizedStack(format=gemm.layer.weight_format, codes=codes, scales=scales, zeros=zeros)


def _quantized(
    weight: torch.Tensor, gemm: ExpertGemm, form: WeightFormat, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if form.kind == "fp8":
        return (*_to_fp8(weight, gemm, form), None)
    group = form.group or gemm.k
    grouped = weight.view(gemm.n, -1, group)
    if form.kind == "awq":
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = _scales((high - low) / 15, scale_dtype)
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = (grouped / scales.float()[..., None]).round() + zeros[..., None]
        return _packed(codes.clamp(0, 15).view(gemm.n, gemm.k)), scales, zeros.to(torch.uint8)
    limit = 7 if form.kind == "int4" else 127
    scales = _scales(grouped.abs().amax(-1) / limit, scale_dtype)
    codes = (grouped / scales.float()[..., None]).round().clamp(-limit - 1, limit).view(gemm.n, gemm.k)
    return (_packed(codes + 8) if form.kind == "int4" else codes.to(torch.int8)), scales, None


def _scales(steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return wanted steps as scales of a dtype: to nearest, but up where that is coarse; 1 where all weights are 0."""
    info = torch.finfo(dtype)
    # Those of float16 are within reach of weights; there are few, so that rounding down would cut codes off.
    least = info.smallest_normal * (info.eps if dtype is torch.float16 else 1.0)
    coarse = (steps / least).ceil().clamp(min=1) * least
    found = torch.where(steps < info.smallest_normal, coarse, steps)
    return torch.where(steps == 0, 1.0, found).to(dtype)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    values = codes.to(torch.uint8)
    return values[:, ::2] | values[:, 1::2] << 4


def _to_fp8(weight: torch.Tensor, gemm: ExpertGemm, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    rows, columns = scale_shape(gemm)
    where = scale_rows(gemm).to(weight.device)
    width = form.group or gemm.k
    padded = torch.nn.functional.pad(weight.abs(), (0, columns * width - gemm.k))
    of_row = padded.view(gemm.n, columns, width).amax(-1)
    peaks = torch.zeros(rows, columns, device=weight.device)
    peaks.scatter_reduce_(0, where[:, None].expand(-1, columns), of_row, "amax")
    scales = _scales(peaks / largest, torch.float32)
    spread = scales.index_select(0, where).repeat_interleave(width, dim=1)[:, : gemm.k]
    return (weight / spread).clamp(-largest, largest).to(torch.float8_e4m3fn), scales

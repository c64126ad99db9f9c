"""y = x · wᵀ + b on a packed copy of the weights: the bits of `linear.multiply`, few rows at memory's speed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from tilecast.environment import cpu_environment
from tilecast.errors import InputError
from tilecast.kernels.cpu.columns import padded_columns
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.jit import available_threads
from tilecast.kernels.cpu.launch import INDEX, Launch, threads_for
from tilecast.kernels.cpu.layouts import pack_bias
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.moe_launch import Plan
from tilecast.kernels.dtypes import DTYPE_NAMES
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertGemm, ExpertLayer

WORK_OF_A_THREAD = 1 << 17
"""Multiply-adds of one row below which waking another thread costs more than it gives; bits do not depend on it."""

MOST_PYTHON_THREADS = 64
"""Python threads for which what launches of one row share is kept."""

_FIELDS = ("job", "thread", "tokens", "top_k", "rows", "slots", "offsets", "source", "out", "bias", "widened")
_JOB, _THREAD, _TOKENS, _TOP_K, _ROWS, _SLOTS, _OFFSETS, _SOURCE, _OUT, _BIAS, _WIDENED = (
    INDEX[name] for name in _FIELDS
)


class PackedLinear:
    """A copy of one weight [N, K] in the layout that streams best. Call it with rows [T, K], and a bias [N] or None.

    It returns a fresh [T, N], accumulated in float32 and rounded once. It never changes, so copies may share it.
    """

    def __init__(self, weight: torch.Tensor, packed: torch.Tensor | None = None) -> None:
        """Copy a weight [N, K] of float32, bfloat16 or float16 on the CPU, unless it is `packed` already.

        Raises InputError for another weight.
        """
        name = DTYPE_NAMES.get(weight.dtype)
        if name is None or weight.dim() != 2 or 0 in weight.shape or weight.device.type != "cpu":
            raise InputError(
                f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}; expected [N, K] on the CPU, "
                f"{', '.join(DTYPE_NAMES.values())}"
            )
        self.columns, self.depth = weight.shape
        self.dtype = weight.dtype
        self._kernel, self._here = MoeGemm(), cpu_environment()
        # A bias is packed at each call: whoever holds it may change it.
        gemm, biased = (_gemm(self.columns, self.depth, name, bias=bias) for bias in (False, True))
        reason = self._kernel.rejects(gemm, self._here)
        if reason is not None:
            raise InputError(f"{self._kernel.name}: {reason}; use float32 or bfloat16")
        self._config = self._kernel.default(gemm, 1, self._here)
        layout = self._kernel.layout(gemm, self._config)
        plain = GemmWeights(gemm=gemm, layout=PLAIN, data=weight.detach().contiguous().unsqueeze(0))
        data = self._kernel.pack(plain, layout).data if packed is None else packed
        unknown = torch.zeros(1, self.columns, device="cpu")
        self._stored = (
            GemmWeights(gemm=gemm, layout=layout, data=data, bias=None),
            GemmWeights(gemm=biased, layout=layout, data=data, bias=unknown),
        )
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._offsets: dict[int, torch.Tensor] = {}
        self._slots = torch.zeros(1, dtype=torch.int32, device="cpu")
        self._of_one_row: dict[tuple[int, bool], _OneRow] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return int(self._stored[0].data.nbytes)

    def __deepcopy__(self, memo: dict[int, object]) -> PackedLinear:
        """Return the very same."""
        return self

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return rows · weightᵀ + bias, [T, N]. Raises InputError for operands that do not fit."""
        count = rows.shape[0]
        if rows.dtype is not self.dtype or rows.dim() != 2 or rows.shape[1] != self.depth:
            raise InputError(f"rows are {rows.dtype} {tuple(rows.shape)}, expected {self.dtype} [T, {self.depth}]")
        out = torch.empty(count, self.columns, dtype=self.dtype, device="cpu")
        if count == 0:
            return out
        rows = rows if rows.is_contiguous() else rows.contiguous()
        plan = self._plan(count, bias is not None)
        offsets = self._offsets.get(count)
        if offsets is None:
            offsets = self._layout(count)
        slots = self._slots
        launch = Launch(plan, threads_for(count * self.columns * self.depth, WORK_OF_A_THREAD))
        block = launch.block
        block[_TOKENS], block[_TOP_K], block[_ROWS] = count, 1, count
        block[_SLOTS], block[_OFFSETS] = slots.data_ptr(), offsets.data_ptr()
        block[_SOURCE], block[_OUT] = rows.data_ptr(), out.data_ptr()
        if plan.widens:
            block[_WIDENED] = launch.scratch("widened", count * plan.row_bytes)
        if bias is not None:
            padded = pack_bias(bias.detach().reshape(1, -1), self._stored[1].gemm, self._kernel.isa.lanes)
            block[_BIAS] = padded.data_ptr()
        launch.run()
        return out

    def one_row(self, row: torch.Tensor, biases: Sequence[tuple[int, torch.Tensor]] = ()) -> torch.Tensor:
        """Return what a call returns for one row, [..., N] of a contiguous [..., K], with little to do before it.

        A bias of several parts is given as (first column, bias) of each; all columns have one, or none. Raises
        InputError for a row that does not fit.
        """
        if row.dtype is not self.dtype or row.shape[-1] != self.depth or row.numel() != self.depth:
            raise InputError(f"row is {row.dtype} {tuple(row.shape)}, expected {self.dtype} [..., {self.depth}] of one")
        out = torch.empty((*row.shape[:-1], self.columns), dtype=self.dtype, device="cpu")
        key = (threading.get_ident(), bool(biases))
        known = self._of_one_row.get(key)
        if known is None or known.available != available_threads():
            if len(self._of_one_row) >= MOST_PYTHON_THREADS:
                self._of_one_row.clear()
            known = self._of_one_row[key] = _OneRow(self, bool(biases))
        for first, bias in biases:
            known.bias[first : first + len(bias)].copy_(bias)
        block = known.launch.block
        block[_JOB] = block[_THREAD] = 0
        block[_SOURCE], block[_OUT] = row.data_ptr(), out.data_ptr()
        known.launch.run()
        return out

    def _plan(self, count: int, bias: bool) -> Plan:
        """Return what launches of about so many rows share; all of them give the same bits."""
        key = (count if count <= 8 else 1 << (count - 1).bit_length(), bias)
        plan = self._plans.get(key)
        if plan is None:
            stored = self._stored[bias]
            config = self._kernel.default(stored.gemm, key[0], self._here, like=self._config)
            plan = self._plans[key] = Plan(self._kernel.isa, config, stored, DTYPE_NAMES[self.dtype])
        return plan

    def _layout(self, count: int) -> torch.Tensor:
        """Return where the only expert's rows begin and end, and see to enough slots."""
        if len(self._slots) < count:
            self._slots = torch.arange(count, dtype=torch.int32, device="cpu")
        if len(self._offsets) > 256:
            self._offsets.clear()
        found = self._offsets[count] = torch.tensor([0, count], dtype=torch.int32, device="cpu")
        return found


class _OneRow:
    """What the launches of one linear and one row share in one Python thread."""

    __slots__ = ("_kept", "available", "bias", "launch")

    def __init__(self, linear: PackedLinear, biased: bool) -> None:
        plan = linear._plan(1, biased)
        self.available = available_threads()
        self.bias = torch.zeros(
            padded_columns(linear._stored[0].gemm, linear._kernel.isa.lanes) if biased else 0, device="cpu"
        )
        slots, offsets = (
            torch.zeros(1, dtype=torch.int32, device="cpu"),
            torch.tensor([0, 1], dtype=torch.int32, device="cpu"),
        )
        self._kept = slots, offsets
        # A buffer may make room for a larger one; this launch goes on with the ones that it has.
        self.launch = Launch(plan, threads_for(linear.columns * linear.depth, WORK_OF_A_THREAD))
        for field, word in (
            (_TOKENS, 1), (_TOP_K, 1), (_ROWS, 1), (_SLOTS, slots.data_ptr()), (_OFFSETS, offsets.data_ptr()),
            (_WIDENED, self.launch.scratch("widened", plan.row_bytes) if plan.widens else 0),
            (_BIAS, self.bias.data_ptr() if biased else 0),
        ):  # fmt: skip
            self.launch.block[field] = word


def _gemm(columns: int, depth: int, dtype: str, *, bias: bool = False) -> ExpertGemm:
    """Return a linear as the up GEMM of a layer of one expert."""
    return ExpertLayer(
        hidden=depth, intermediate=columns, experts=1, top_k=1, dtype=dtype, activation="identity", gated=False,
        bias=bias,
    ).up  # fmt: skip


def packed_together(weights: Sequence[torch.Tensor]) -> tuple[PackedLinear, list[PackedLinear]] | None:
    """Return one packed copy of weights [N, K], behind each other, and each of them on its part of that memory.

    None where they differ in K or dtype, or do not fill whole blocks of columns.
    """
    lanes, first = host_isa().lanes, weights[0]
    sizes = [weight.shape[0] for weight in weights]
    if any(weight.shape[1:] != first.shape[1:] or weight.dtype != first.dtype for weight in weights):
        return None
    name = DTYPE_NAMES[first.dtype]
    if any(padded_columns(_gemm(size, first.shape[1], name), lanes) != size for size in sizes):
        return None
    whole = PackedLinear(torch.cat([weight.detach() for weight in weights]))
    data = whole._stored[0].data
    columns = data.shape[3]
    parts = data.split([size // columns for size in sizes], dim=1)
    return whole, [PackedLinear(weight, part) for weight, part in zip(weights, parts, strict=True)]

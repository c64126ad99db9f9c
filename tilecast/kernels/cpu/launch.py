"""What launches of the generated kernels share: plans, checks of operands, threads, scratch, and a routing's words."""

from __future__ import annotations

import ctypes
import threading
from typing import ClassVar, TypeVar

import torch

from tilecast.errors import ConfigError, InputError
from tilecast.kernels.cpu._variant import ARGS
from tilecast.kernels.cpu.isa import Isa
from tilecast.kernels.cpu.jit import available_threads, run
from tilecast.kernels.cpu.slots import Rows
from tilecast.kernels.dtypes import DTYPE_NAMES, TORCH_DTYPES
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import TileConfig

INDEX = {name: index for index, name in enumerate(ARGS)}
"""Places of the argument block's words; blocks of kernels with more words begin with these."""

_FIELDS = ("threads", "tokens", "top_k", "rows", "ids", "slots", "offsets", "source", "scale", "out", "scratch")
(_THREADS, _TOKENS, _TOP_K, _ROWS, _IDS, _SLOTS, _OFFSETS, _SOURCE, _SCALE, _OUT, _SCRATCH) = (
    INDEX[name] for name in _FIELDS
)

KEPT_SCRATCH_BYTES = 64 << 20
"""Scratch above this is allocated for one launch and released after it."""
_SPARE = 4096


class _Buffers(threading.local):
    """Buffers of one Python thread, so that launches from several threads never share any."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}


_buffers = _Buffers()


def take_scratch(name: str, size: int) -> torch.Tensor:
    """Return this Python thread's buffer of a name, contents undefined: at least `size` bytes from `aligned` on.

    Whoever takes one holds it until the launch has ended: a large one is kept by nobody else.
    """
    known = _buffers.by_name.get(name)
    if known is not None and known.numel() >= size + _SPARE:
        return known
    fresh = torch.empty(size + _SPARE, dtype=torch.uint8, device="cpu")
    if size <= KEPT_SCRATCH_BYTES:
        _buffers.by_name[name] = fresh
    return fresh


def aligned(scratch: torch.Tensor) -> int:
    """Return the first address of a buffer that is a multiple of 64."""
    return -(-scratch.data_ptr() // 64) * 64


def threads_for(work: int, work_of_a_thread: int) -> int:
    """Return how many threads so much work is worth."""
    return min(available_threads(), max(1, work // work_of_a_thread))


class Launch:
    """One launch: its argument block, and the scratch that it borrows for as long as it is there."""

    __slots__ = ("_address", "_at", "_borrowed", "block", "threads")

    def __init__(self, plan: Plan, threads: int) -> None:
        """Copy a plan's words, and take its threads' scratch."""
        template = plan.template
        self._address = plan.address
        self._borrowed: list[torch.Tensor] = []
        self.block = block = type(template).from_buffer_copy(template)
        self._at = ctypes.addressof(block)
        self.threads = threads
        block[_THREADS] = threads
        block[_SCRATCH] = self.scratch("threads", threads * plan.scratch_bytes)

    def scratch(self, name: str, size: int) -> int:
        """Take scratch; return the address, a multiple of 64, of at least `size` bytes with undefined contents."""
        buffer = take_scratch(name, size)
        self._borrowed.append(buffer)
        return aligned(buffer)

    def run(self) -> None:
        """Run on all threads and return when all are done."""
        run(self._address, self._at, self.threads)


class Plan:
    """What stays the same between launches of one config on one stack of weights. Each kernel has its own."""

    kernel: ClassVar[str]
    words: ClassVar[dict[str, int]] = INDEX
    """Places of the argument block's words."""
    address: int
    template: ctypes.Array[ctypes.c_int64]
    scratch_bytes: int
    """Of one thread."""
    row_bytes: int
    widens: bool
    """Whether rows are first copied into float32 or what else the kernel multiplies, `row_bytes` each."""

    def __init__(self, isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: str) -> None:
        """Set the sizes; what else is declared, kernels set. Raises InputError for weights that are not as laid out."""
        gemm, layer = weights.gemm, weights.gemm.layer
        self.experts, self.k, self.dtype = layer.experts, gemm.k, TORCH_DTYPES[layer.dtype]
        self.width = layer.intermediate if gemm.name == "up" else layer.hidden
        self.threads = config.integer("threads")
        self.lanes = isa.lanes

    def rooms(self, rows: int, *, combined: bool) -> dict[str, int]:
        """Return the words that point at scratch which all threads share, and its bytes, for so many rows.

        combined: whether slots are weighted and added (down).
        """
        found = {"widened": rows * self.row_bytes} if self.widens else {}
        if combined:
            # A vector's width beyond the last row is read, though never used.
            found["partial"] = 4 * (rows * self.width + self.lanes)
        return found

    def threads_now(self) -> int:
        """Return how many threads a launch takes."""
        available = available_threads()
        return min(self.threads, available) if self.threads else available

    def launch(self, route: ExpertLayout, operands: Rows) -> Launch:
        """Return a launch on a routing with at least one token, ready to run. Raises InputError."""
        source, rows, out, scale = operands.source, operands.rows, operands.out, operands.scale
        if route.experts != self.experts:
            raise InputError(
                f"{self.kernel}: slots are sorted over {route.experts} experts, the weights have {self.experts}"
            )
        self._check("input", source, (rows, self.k), self.dtype)
        self._check("output", out, (route.tokens if scale is not None else rows * route.top_k, self.width), out.dtype)
        made = Launch(self, self.threads_now())
        block = made.block
        block[_TOKENS], block[_TOP_K], block[_ROWS] = route.tokens, route.top_k, rows
        block[_IDS], block[_SLOTS] = route.ids.data_ptr(), route.slots.data_ptr()
        block[_OFFSETS], block[_SOURCE], block[_OUT] = route.offsets.data_ptr(), source.data_ptr(), out.data_ptr()
        if scale is not None:
            self._check("routing weights", scale, (route.tokens, route.top_k), torch.float32)
            block[_SCALE] = scale.data_ptr()
        for name, size in self.rooms(rows, combined=scale is not None).items():
            block[self.words[name]] = made.scratch(name, size)
        return made

    def _check(self, what: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise InputError(
                f"{self.kernel}: {what} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
                f"expected contiguous {dtype} {shape}"
            )


PlanT = TypeVar("PlanT", bound=Plan)


def kept_plan(kind: type[PlanT], isa: Isa, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> PlanT:
    """Return the plan of launches into `out_dtype`, made once and kept with the weights.

    Raises ConfigError for a config that reads another layout, and InputError as plans do.
    """
    key = (config, out_dtype)
    plan: PlanT | None = weights.plans.get(key)
    if plan is None:
        if config["layout"] != weights.layout:
            raise ConfigError(
                f"{kind.kernel}: the config reads layout {config['layout']}, the weights are {weights.layout}"
            )
        plan = weights.plans[key] = kind(isa, config, weights, DTYPE_NAMES[out_dtype])
    return plan


def check_stored(
    kernel: str, what: str, tensor: torch.Tensor, count: int, weights: GemmWeights, dtype: torch.dtype | None = None
) -> None:
    """Raise InputError unless stored weights are `count` contiguous elements of a dtype, the layer's, on the CPU."""
    gemm = weights.gemm
    dtype = dtype or TORCH_DTYPES[gemm.layer.dtype]
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise InputError(
            f"{kernel}: {what} in layout {weights.layout} are {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"expected {count} contiguous elements of {dtype} for {gemm.layer.label} {gemm.name}"
        )

"""What a kernel is: the protocol every implementation of an expert GEMM follows, and the registry of them.

What describes configs (spaces, layouts, orders, numerics classes, validity) is imported without torch, so that tables
are looked into at once; what computes stands in modules of its own, imported when something runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tilecast.canonical import Json, digest
from tilecast.environment import Environment
from tilecast.errors import ConfigError, DeviceError
from tilecast.problem import ExpertGemm, ParamValue, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.routing import ExpertLayout

PLAIN = "plain"
"""The layout in which checkpoints hold weights: [E, N, K], K contiguous; gate rows before up rows."""
FP8_ROWS = "fp8_g128"
"""The value of the numerics field `activations` of kernels that round rows to e4m3, a scale for each 128 of K."""
ROWS_GROUP = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class GemmWeights:
    """The weights of one grouped GEMM, stored as one layout says.

    `data` is a tensor [E, N, K] for the layout `plain`, or a `QuantizedStack` where the layer's weight format is not
    dense; otherwise whatever the layout's kernel made of it.
    `bias` is None or a tensor [E, N]. `plans` is where kernels keep what they need to launch on this stack.
    """

    gemm: ExpertGemm
    layout: str
    data: Any
    bias: torch.Tensor | None = None
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made from: plans point at this stack's memory, so a copy makes its own."""
        return {**self.__dict__, "plans": {}}


class Kernel(Protocol):
    """A named implementation that can run expert GEMMs.

    Methods that look at a problem never launch anything; methods that return a reason return None when all
    is well. Every config that `space` yields and `invalid` accepts can be launched.
    """

    name: str
    device_kind: str
    domain: dict[str, tuple[ParamValue, ...] | range]
    """Every parameter with the values that it may ever take; what imported configs are checked against."""

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        """Return why this kernel cannot run `gemm` in `environment` at all."""
        ...

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering for this many tokens, in a fixed order; some may be invalid."""
        ...

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        """Return why `config` cannot run `gemm` in `environment`."""
        ...

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config; with `like`, one of the same weight layout and numerics class."""
        ...

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        """Return the fields of the config's numerics class: configs with equal fields give equal bits.

        A kernel that rounds rows before it multiplies them says to what in the field `activations`
        (`reference.rounded_rows`); it is compared with an oracle that rounds them so, too.
        """
        ...

    def batch_invariant(self, gemm: ExpertGemm, config: TileConfig) -> bool:
        """Return whether a row's bits are, by construction, free of the other rows in the batch."""
        ...

    def layout(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return the name of the weight layout that `config` reads."""
        ...

    def order(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return the order of the intermediate's rows that `config` writes (up) or reads (down).

        `slot`: row s belongs to slot s. `sorted`: row p belongs to slot `route.slots[p]`, rows past
        `route.offsets[-1]` have no meaning. A layer's up and down run together only with equal orders.
        """
        ...

    def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
        """Return `plain` weights stored in another layout. The plain tensor is left as it was."""
        ...

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        """Return weights in any of this kernel's layouts as `plain` ones, bit for bit."""
        ...

    def up(
        self,
        config: TileConfig,
        hidden: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        out: torch.Tensor,
    ) -> None:
        """Run the up GEMM: hidden [T, H] to out [T·k, I] in the config's `order`, activation applied, one rounding.

        Rows that belong to no present slot are left as they are. Both tensors have the layer's dtype.
        """
        ...

    def down(
        self,
        config: TileConfig,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Run the down GEMM and the ordered combine: intermediate [T·k, I] in the config's `order` to out [T, H].

        topk_weights is float32 [T, k]. `out` has the layer's dtype (one rounding) or float32 (a rank's
        partial sum, not rounded). Absent slots count as zero.
        """
        ...


@runtime_checkable
class HoldsMore(Protocol):
    """A kernel that in some layouts holds more than the weights: in those what it says counts where memory does."""

    def stack_bytes(self, gemm: ExpertGemm, layout: str) -> int:
        """Return the bytes of the stack that `pack` makes for this layout, one of those of its configs."""
        ...


def stack_bytes(kernel: Kernel, gemm: ExpertGemm, layout: str) -> int:
    """Return the bytes that weights in a layout of `kernel` take; but for padding, where it does not say, those of
    the weights. What a launch reads of them is another thing (`Work`).
    """
    if layout != PLAIN and isinstance(kernel, HoldsMore):
        return kernel.stack_bytes(gemm, layout)
    return gemm.weight_bytes()


def numerics_class(kernel: Kernel, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str:
    """Return the digest that names the config's numerics class."""
    return digest({"device": environment.arch, **kernel.numerics(gemm, config, environment)})


def outside_domain(kernel: Kernel, config: TileConfig) -> str | None:
    """Return why `config`'s parameters are not the ones that `kernel` declares."""
    given = dict(config.params)
    missing, extra = sorted(set(kernel.domain) - set(given)), sorted(set(given) - set(kernel.domain))
    if missing or extra:
        return f"{kernel.name}: missing parameters {missing}, unknown parameters {extra}"
    for name, value in given.items():
        if value not in kernel.domain[name]:
            return f"{kernel.name}: {name}={value!r} is outside {_domain_text(kernel.domain[name])}"
    return None


def _domain_text(domain: tuple[ParamValue, ...] | range) -> str:
    if isinstance(domain, range):
        return f"{domain.start}…{domain.stop - domain.step} step {domain.step}"
    return "{" + ", ".join(str(value) for value in domain) + "}"


class Registry:
    """Kernels by name. The process has one (`tilecast.kernels.registry`); tests make their own."""

    def __init__(self, kernels: tuple[Kernel, ...] = ()) -> None:
        """Start with some kernels."""
        self._kernels: dict[str, Kernel] = {}
        for kernel in kernels:
            self.register(kernel)

    def register(self, kernel: Kernel) -> None:
        """Add a kernel; the first registered one of a device kind gives the defaults. ConfigError on a clash."""
        if kernel.name in self._kernels:
            raise ConfigError(f"a kernel named {kernel.name} is registered already")
        self._kernels[kernel.name] = kernel

    def __getitem__(self, name: str) -> Kernel:
        """Return a kernel by name; raises ConfigError with the known names."""
        try:
            return self._kernels[name]
        except KeyError:
            raise ConfigError(f"no kernel is named {name!r}; known: {', '.join(sorted(self._kernels))}") from None

    def __iter__(self) -> Iterator[Kernel]:
        """Iterate in the order of registration."""
        return iter(self._kernels.values())

    def default_kernel(self, gemm: ExpertGemm, environment: Environment) -> Kernel:
        """Return the first kernel that can run `gemm` here; raises DeviceError with every kernel's reason."""
        reasons = []
        for kernel in self:
            if kernel.device_kind != environment.device_kind:
                continue
            reason = kernel.rejects(gemm, environment)
            if reason is None:
                return kernel
            reasons.append(f"{kernel.name}: {reason}")
        raise DeviceError(f"no kernel runs {gemm.layer.label} on this {environment.device_kind}: {'; '.join(reasons)}")

    def largest_stack(self, gemm: ExpertGemm, environment: Environment) -> int:
        """Return the bytes of the largest stack that a kernel may store the weights of `gemm` in here."""
        found = [gemm.weight_bytes()]
        for kernel in self:
            if kernel.device_kind != environment.device_kind or not isinstance(kernel, HoldsMore):
                continue
            if kernel.rejects(gemm, environment) is None:
                space = kernel.space(gemm, 1, environment)
                valid = (config for config in space if kernel.invalid(gemm, config, environment) is None)
                layouts = {kernel.layout(gemm, config) for config in valid}
                found.extend(stack_bytes(kernel, gemm, layout) for layout in layouts)
        return max(found)

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        """Return why `config` cannot run `gemm` here: unknown kernel, outside its domain, or not valid."""
        kernel = self._kernels.get(config.kernel)
        if kernel is None:
            return f"no kernel is named {config.kernel!r}; known: {', '.join(sorted(self._kernels))}"
        return (
            outside_domain(kernel, config)
            or kernel.rejects(gemm, environment)
            or kernel.invalid(gemm, config, environment)
        )

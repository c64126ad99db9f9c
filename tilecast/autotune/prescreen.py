"""From every kernel's space to the candidates that are worth a launch, each rejection with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels.spec import PLAIN, Kernel, Registry, numerics_class
from tilecast.problem import ExpertGemm, TileConfig


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config that can run a GEMM here, with what selection must know about it.

    `layout` is `plain`, or the kernel's name and its layout's: a packed layout belongs to the kernel that made it.
    `order` is that of the intermediate's rows, `slot` or `sorted`; a layer's up and down must have the same.
    `is_anchor` marks a default of another bucket's group, which has to be measured in every bucket.
    """

    config: TileConfig
    numerics: str
    layout: str
    batch_invariant: bool
    order: str = "slot"
    is_default: bool = False
    is_anchor: bool = False


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A config, or with `config` None a whole kernel, that is not measured, and why."""

    kernel: str
    config: TileConfig | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Prescreened:
    """The candidates of one GEMM at one token count, the default first, and what was turned away."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]

    @property
    def default(self) -> Candidate:
        """The default config of the default kernel."""
        return self.candidates[0]

    @cached_property
    def by_config(self) -> dict[TileConfig, Candidate]:
        """The candidates by config, in their order."""
        return {candidate.config: candidate for candidate in self.candidates}


def describe(
    gemm: ExpertGemm, config: TileConfig, environment: Environment, registry: Registry, *, is_default: bool = False
) -> Candidate:
    """Return the candidate for a config that is known to be valid. Raises ConfigError for an unknown kernel."""
    kernel = registry[config.kernel]
    layout = kernel.layout(gemm, config)
    return Candidate(
        config=config,
        numerics=numerics_class(kernel, gemm, config, environment),
        layout=layout if layout == PLAIN else f"{kernel.name}:{layout}",
        batch_invariant=kernel.batch_invariant(gemm, config),
        order=kernel.order(gemm, config),
        is_default=is_default,
    )


def prescreen(
    gemm: ExpertGemm,
    tokens: int,
    environment: Environment,
    registry: Registry,
    *,
    anchors: tuple[TileConfig, ...] = (),
) -> Prescreened:
    """Return every valid candidate for `gemm` at `tokens`, in a fixed order, and every rejection.

    The default config of the default kernel comes first. For each of `anchors` follows the default of the
    same weight layout and numerics class: so that a group which is the default in one bucket exists in all.
    Then come the kernels' spaces in the order of registration. A config that appears twice counts once.
    Raises DeviceError when no kernel can run the GEMM here, or the default config itself is not valid.
    """
    default_kernel = registry.default_kernel(gemm, environment)
    default = default_kernel.default(gemm, tokens, environment)
    reason = registry.invalid(gemm, default, environment)
    if reason is not None:
        raise DeviceError(f"the default config {default.label} cannot run {gemm.layer.label} {gemm.name}: {reason}")
    found = {default: describe(gemm, default, environment, registry, is_default=True)}
    own_group = found[default].layout, found[default].numerics
    rejections: list[Rejection] = []
    held = [registry[a.kernel].default(gemm, tokens, environment, like=a) for a in anchors]
    proposals = list(held)
    for kernel in registry:
        reason = _refuses(kernel, gemm, environment)
        if reason is not None:
            rejections.append(Rejection(kernel=kernel.name, config=None, reason=reason))
            continue
        proposals += kernel.space(gemm, tokens, environment)
    for config in dict.fromkeys(proposals):
        if config in found:
            continue
        reason = registry.invalid(gemm, config, environment)
        if reason is not None:
            rejections.append(Rejection(kernel=config.kernel, config=config, reason=reason))
            continue
        candidate = describe(gemm, config, environment, registry)
        is_anchor = config in held and (candidate.layout, candidate.numerics) != own_group
        found[config] = replace(candidate, is_anchor=is_anchor)
    return Prescreened(candidates=tuple(found.values()), rejections=tuple(rejections))


def _refuses(kernel: Kernel, gemm: ExpertGemm, environment: Environment) -> str | None:
    if kernel.device_kind != environment.device_kind:
        return f"runs on {kernel.device_kind}, this environment is {environment.device_kind}"
    return kernel.rejects(gemm, environment)


def anchors(
    gemm: ExpertGemm, tokens: tuple[int, ...], environment: Environment, registry: Registry
) -> tuple[TileConfig, ...]:
    """Return one default config for each (layout, numerics class) that the defaults over `tokens` fall into."""
    kernel = registry.default_kernel(gemm, environment)
    found: dict[tuple[str, str], TileConfig] = {}
    for count in tokens:
        config = kernel.default(gemm, count, environment)
        candidate = describe(gemm, config, environment, registry)
        found.setdefault((candidate.layout, candidate.numerics), config)
    return tuple(found.values())

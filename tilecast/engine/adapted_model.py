"""What a model's experts run on, and what its user is told of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tilecast.engine.announce import announce
from tilecast.engine.table_runtime import Runtime
from tilecast.problem import ExpertLayer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdaptedModule:
    """One experts module of a model: its name, the layers it runs as, and why it falls back, if it does.

    It is one layer, or two where the module's own code runs between the GEMMs: of the first the up GEMM runs, of the
    second the down GEMM.
    """

    name: str
    layers: tuple[ExpertLayer, ...]
    reason: str | None

    @property
    def layer(self) -> ExpertLayer | None:
        """The layer whose up GEMM runs, None if the module falls back."""
        return self.layers[0] if self.layers else None


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """What a model's experts run on; `runtime` is None where none of them runs on the tuned kernels."""

    modules: tuple[AdaptedModule, ...]
    runtime: Runtime | None

    @property
    def layers(self) -> tuple[ExpertLayer, ...]:
        """The layers that run on the tuned kernels, in model order, each once."""
        return tuple(dict.fromkeys(layer for m in self.modules for layer in m.layers))


def log_adapted(adapted: AdaptedModel, otherwise: str) -> None:
    """Log how many layers run on Tilecast and by which table, and why others run as `otherwise` does."""
    for reason in dict.fromkeys(m.reason for m in adapted.modules if m.reason is not None):
        names = [m.name for m in adapted.modules if m.reason == reason]
        logger.warning("experts of %d layers (%s …) fall back to %s: %s", len(names), names[0], otherwise, reason)
    runtime = adapted.runtime
    if runtime is None:
        return
    decided = [layer for layer in adapted.layers if runtime.buckets(layer)]
    kinds = sorted({d.certificate for d in runtime.table.decisions if d.layer in decided}) or ["none"]
    largest = {max(b.tokens for b in runtime.buckets(layer)) for layer in decided}
    reach = f" up to {min(largest)} tokens" if largest else ""
    announce(
        logger,
        "experts of %d of %d layers run on Tilecast: table %s, %d decisions, %d of %d distinct layers covered%s, "
        "policy %s, certificate %s",
        sum(m.reason is None for m in adapted.modules), len(adapted.modules),
        runtime.table.digest[:12] if runtime.table.decisions else "none", len(runtime.table.decisions), len(decided),
        len(adapted.layers), reach, runtime.policy, "/".join(kinds),
    )  # fmt: skip
    if runtime.table.decisions and adapted.layers and not decided:
        logger.warning(
            "the table decides none of the layers that this model runs, so all are on default configs: %s",
            runtime.reason(adapted.layers[0], 1),
        )

"""The analytic cost model: what a config's work takes on a device that was calibrated, and the order that gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from tilecast.autotune.calibrate import Calibration
from tilecast.autotune.draws import typical_counts
from tilecast.autotune.routing_profiles import RoutingProfile, as_profile
from tilecast.environment import Environment
from tilecast.kernels.spec import Kernel, Registry
from tilecast.kernels.work import Predictable, SkipsZeros, Work
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

DRAWS = 3
"""Routings that a prediction is the mean of."""
MIN_US = 0.1
GPU_EXPOSED = 0.1
"""Part of computing, reading and waiting that does not hide behind the longest of them."""
ONE_UNIT = 2.0
"""What one SM can read at once, in units of its share of the bandwidth."""


class CostModel:
    """Predicts the time of launches on one device."""

    def __init__(self, environment: Environment, calibration: Calibration) -> None:
        """Predict for `environment` with its calibration."""
        self.environment = environment
        self.calibration = calibration
        self._counts: dict[tuple[ExpertLayer, int, RoutingProfile], tuple[list[int], ...]] = {}

    def counts(
        self, layer: ExpertLayer, tokens: int, routing: str | RoutingProfile = "uniform"
    ) -> tuple[list[int], ...]:
        """Return rows for each local expert of a few typical routings, always the same ones."""
        profile = as_profile(routing)
        key = layer, tokens, profile
        if key not in self._counts:
            self._counts[key] = tuple(typical_counts(layer, tokens, profile, seed) for seed in range(DRAWS))
        return self._counts[key]

    def predict_us(
        self,
        gemm: ExpertGemm,
        tokens: int,
        config: TileConfig,
        kernel: Kernel,
        routing: str | RoutingProfile = "uniform",
        *,
        counts: Sequence[Sequence[int]] | None = None,
    ) -> float | None:
        """Return the µs of one launch, the mean over typical routings or over `counts`; None for a kernel unknown."""
        if not isinstance(kernel, Predictable):
            return None
        drawn = self.counts(gemm.layer, tokens, routing) if counts is None else counts
        threads = dict(config.params).get("threads", 0)
        dead = as_profile(routing).sparsity
        if dead is not None and isinstance(kernel, SkipsZeros):
            works = [kernel.work(gemm, config, self.environment, rows, dead) for rows in drawn]
        else:
            works = [kernel.work(gemm, config, self.environment, rows) for rows in drawn]
        return sum(self.work_us(work, threads=threads if isinstance(threads, int) else 0) for work in works) / len(
            works
        )

    def work_us(self, work: Work, *, threads: int = 0) -> float:
        """Return the µs of a launch that does `work`; `threads` bounds a CPU's, 0 leaves them all."""
        calibration = self.calibration
        units, share = self._units(threads)
        rate = calibration.flops_s.get(work.path) or min(calibration.flops_s.values())
        compute = 1e6 * work.flops / (rate * share * work.efficiency)
        bandwidth = calibration.memory_bytes_s * min(1.0, math.sqrt(share)) * work.memory_efficiency
        memory = 1e6 * (work.memory_bytes / bandwidth + work.cache_bytes / calibration.cache_bytes_s)
        waiting = work.latency_steps * calibration.latency_us * math.ceil(work.programs / (units * work.resident))
        overhead = work.launches * calibration.launch_us + work.programs * calibration.program_us / units
        if self.environment.device_kind == "cuda":
            # Programs are dealt out: the last wave takes as long as a full one. Bandwidth is shared by those that run.
            even = math.ceil(work.programs / units) * units / max(1, work.programs)
            busy = min(1.0, ONE_UNIT * work.programs / units)
            parts = sorted((compute * even, memory / max(busy, ONE_UNIT / units), waiting))
            return max(MIN_US, overhead + parts[2] + GPU_EXPOSED * (parts[0] + parts[1]))
        both = max(compute, memory) + (1 - work.overlap) * min(compute, memory)
        # Jobs are taken from a counter: on average half of the longest one is waited for, and it alone is a bound.
        return max(MIN_US, overhead + both * max(units * work.largest, 1 + (units - 1) * work.largest / 2))

    def rank(
        self,
        gemm: ExpertGemm,
        tokens: int,
        candidates: Iterable[TileConfig],
        registry: Registry,
        routing: str | RoutingProfile = "uniform",
    ) -> dict[TileConfig, float]:
        """Return the predicted µs of each config, fastest first; what is unknown gets the median of the others."""
        predicted = {
            config: self.predict_us(gemm, tokens, config, registry[config.kernel], routing) for config in candidates
        }
        known = [value for value in predicted.values() if value is not None]
        middle = median(known) if known else 1.0
        filled = {config: middle if value is None else value for config, value in predicted.items()}
        return dict(sorted(filled.items(), key=lambda item: (item[1], item[0].sort_key)))

    def _units(self, threads: int) -> tuple[int, float]:
        """Return what programs run on, and the share of the calibrated rates that so many threads have."""
        if self.environment.device_kind == "cuda":
            return self.environment.units, 1.0
        available = max(1, self.environment.threads or self.environment.units)
        used = min(threads or available, available)
        return used, used / available


class ModelRanker:
    """A cost model with the kernels and the routing profile of one tuning."""

    def __init__(self, model: CostModel, registry: Registry, routing: str | RoutingProfile = "uniform") -> None:
        """Rank configs of kernels in `registry` under a routing profile. Raises InputError for an unknown one."""
        self.model = model
        self._registry, self._routing = registry, as_profile(routing)

    def rank(self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig]) -> dict[TileConfig, float]:
        """Return the expected µs of the configs whose kernels tell what they do."""
        predicted = {
            config: self.model.predict_us(gemm, tokens, config, self._registry[config.kernel], self._routing)
            for config in configs
        }
        return {config: value for config, value in predicted.items() if value is not None}

"""What a tuning will measure and how long that takes, before any time is spent: its own steps over predicted times."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tilecast.autotune.calibrate import Calibration
from tilecast.autotune.costs import (
    code_of,
    expected_check_s,
    expected_compile_s,
    expected_pack_s,
    expected_sample_s,
    expected_warming_s,
)
from tilecast.autotune.gate import Verdict
from tilecast.autotune.measure import Prepared
from tilecast.autotune.plan import Plan
from tilecast.autotune.prescreen import anchors, prescreen
from tilecast.autotune.rank import ModelRanker
from tilecast.autotune.search import Strategy
from tilecast.autotune.tuner import measure_plan
from tilecast.autotune.workload import weight_copies
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig
from tilecast.store import Store

NOISE = 0.04
"""Relative noise of the rehearsal's samples, that of recorded sweeps: with less, less would be in doubt."""
AGAIN = 1.25
"""Samples taken over samples kept: stretches in which others used the cores are taken again, a few even when quiet."""
UNKNOWN_US = 1000.0
"""What a config is taken to need where the model has no opinion of any."""
WORKER_S = 5.5
"""Starting this process and the one that measures."""


@dataclass(frozen=True, kw_only=True)
class TaskForecast:
    """What one (GEMM, bucket) will take.

    `space` counts the configs that kernels propose, `valid` those that can run here, `eligible` those that the policy
    allows to be chosen, `started` those that will be checked and timed, with `samples` samples in all.
    """

    gemm: ExpertGemm
    tokens: int
    space: int
    valid: int
    eligible: int
    started: int
    samples: int
    seconds: float


@dataclass
class _Costs:
    seconds: float = 0.0
    samples: int = 0


@dataclass
class Rehearsal:
    """A measurer that only adds up what measuring would cost; times are the model's."""

    ranker: ModelRanker
    registry: Registry
    seed: int = 0
    costs: dict[tuple[ExpertGemm, int], _Costs] = field(default_factory=dict)
    _stacks: set[tuple[ExpertGemm, str]] = field(default_factory=set)
    _compiled: set[tuple[ExpertGemm, TileConfig]] = field(default_factory=set)
    _sampled: set[tuple[ExpertGemm, int, TileConfig]] = field(default_factory=set)

    @property
    def _calibration(self) -> Calibration:
        return self.ranker.model.calibration

    @property
    def _device_kind(self) -> str:
        return self.ranker.model.environment.device_kind

    def prepare(self, gemm: ExpertGemm) -> None:
        """Nothing to do."""

    def release(self, gemm: ExpertGemm) -> None:
        """Weights are made again for the next GEMM."""
        self._stacks.clear()

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        """Add the gate, and the weights where it is the first to read a layout."""
        first = (gemm, tokens) not in self.costs
        costs = self.costs.setdefault((gemm, tokens), _Costs())
        costs.seconds += expected_check_s(gemm, tokens, self._us(gemm, tokens, config), self._calibration, first=first)
        stack = (gemm, self.registry[config.kernel].layout(gemm, config))
        if stack not in self._stacks:
            self._stacks.add(stack)
            copies = weight_copies(gemm, self.ranker.model.environment.llc_bytes)
            costs.seconds += expected_pack_s(gemm, self._calibration, copies=copies)
        costs.seconds += self._compile_s(gemm, config)
        return Verdict(error_ratio=0.0)

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        """Return the predicted time with noise, and add what taking it costs."""
        us = self._us(gemm, tokens, config)
        costs = self.costs.setdefault((gemm, tokens), _Costs())
        warm = 0.0
        if (gemm, tokens, config) not in self._sampled:
            self._sampled.add((gemm, tokens, config))
            warm = expected_warming_s(us, device_kind=self._device_kind)
        each = expected_sample_s(us, self._calibration, device_kind=self._device_kind)
        costs.seconds += AGAIN * (warm + count * each)
        costs.samples += count
        generator = random.Random(f"{self.seed} {gemm.name} {tokens} {config.digest} {round}")
        return tuple(us * max(0.5, 1 + NOISE * generator.gauss(0, 1)) for _ in range(count))

    def _compile_s(self, gemm: ExpertGemm, config: TileConfig) -> float:
        is_gpu, environment = self._device_kind != "cpu", self.ranker.model.environment
        if not is_gpu and not isinstance(self.registry[config.kernel], Prepared):
            return 0.0
        code = config if is_gpu else code_of(config)
        if (gemm, code) in self._compiled:
            return 0.0
        self._compiled.add((gemm, code))
        processes = max(1, environment.threads or environment.units)
        return expected_compile_s(gemm, device_kind=self._device_kind, processes=processes)

    def _us(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        return self.ranker.rank(gemm, tokens, [config]).get(config, UNKNOWN_US)


def forecast(
    plan: Plan, store: Store, registry: Registry, ranker: ModelRanker, strategy: Strategy | str, *, seed: int = 0
) -> list[TaskForecast]:
    """Return what tuning `plan` from nothing will measure, task by task, in its order.

    `store` is an empty one, which then holds the rehearsal's measurements.
    """
    rehearsal = Rehearsal(ranker, registry, seed)
    run = measure_plan(plan, store, registry, measurer=rehearsal, strategy=strategy, ranker=ranker, seed=seed)
    tokens = tuple(bucket.tokens for bucket in plan.buckets)
    held = {gemm: anchors(gemm, tokens, plan.environment, registry) for gemm in plan.gemms}
    found = []
    for report in run.tasks:
        screened = prescreen(report.gemm, report.tokens, plan.environment, registry, anchors=held[report.gemm])
        refused = [r for r in screened.rejections if r.config is not None]
        costs = rehearsal.costs[report.gemm, report.tokens]
        found.append(
            TaskForecast(
                gemm=report.gemm, tokens=report.tokens, space=len(screened.candidates) + len(refused),
                valid=len(screened.candidates), eligible=report.candidates, started=report.started,
                samples=costs.samples, seconds=costs.seconds,
            )
        )  # fmt: skip
    return found


def overhead_s(plan: Plan, ranker: ModelRanker) -> float:
    """Return the seconds besides the tasks: starting to measure, and the check of the chosen configs' classes."""
    if not plan.tasks:
        return 0.0
    calibration = ranker.model.calibration
    checks = 0.0
    if plan.policy == "reproducible":
        checks = sum(expected_check_s(gemm, b.tokens, 0.0, calibration, first=True) for gemm, b in plan.tasks)
        # Weights of its own, and once more with K reversed.
        checks += sum(expected_pack_s(gemm, calibration, copies=2) for gemm in plan.gemms)
    return WORKER_S + checks

"""From the measurements in a store to a table of decisions, the chosen configs' classes checked on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tilecast.autotune.classes import ClassVerifier, Verifier
from tilecast.autotune.plan import Plan
from tilecast.autotune.prescreen import anchors, prescreen
from tilecast.autotune.select import Evidence, bucket_weights, choose_pair
from tilecast.autotune.timing import breaks_class, pool
from tilecast.errors import CoverageError
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, TileConfig
from tilecast.store import Store

logger = logging.getLogger(__name__)

CLASS_CHECK_ROUND = 1 << 30
"""The round under which a failed class check is kept: beyond any round that is timed."""


def decide(
    plan: Plan,
    store: Store,
    registry: Registry,
    *,
    verify: bool = True,
    verifier: Verifier | None = None,
    weights: Mapping[int, float] | None = None,
) -> TuningTable:
    """Return the decisions for every layer and bucket of `plan`, made from the measurements in `store`.

    What must be the same in all buckets (the weight layout, under `reproducible` also the numerics class) has the
    smallest mean time of a call under `weights`, each token count's share of the calls; without them the smallest
    geometric mean over the buckets.

    Under `reproducible` the chosen configs must keep their class's bits on this machine (`verifier`, by default
    `ClassVerifier`): one that does not is kept as a measurement with status `unstable`, is out of its class from
    then on, and the choice is made again. Decisions that passed have the certificate `hardware`, if the verifier's
    negative control shows that the check would have failed another class; else, with `verify` False, and under
    `fastest`, which promises no bits, it is `none`. The store's decisions are left as they are.

    Raises CoverageError where measurements lack, DeviceError where no group of configs serves all buckets,
    InputError for weights that no bucket has a share of.
    """
    if not plan.buckets:
        return TuningTable((plan.environment,), ())
    check: Verifier | None = None
    if verify and plan.policy == "reproducible":
        check = verifier or ClassVerifier(plan.environment, registry)
    shares = None if weights is None else bucket_weights(weights, plan.buckets)
    decisions: list[Decision] = []
    for layer in plan.layers:
        up, down, certain = _settle(plan, layer, store, registry, check, shares)
        decisions += [
            Decision(
                environment=plan.environment.digest,
                layer=layer,
                bucket=bucket,
                policy=plan.policy,
                up=up_choice,
                down=down_choice,
                routing=plan.routing,
                certificate="hardware" if certain else "none",
            )
            for bucket, up_choice, down_choice in zip(plan.buckets, up, down, strict=True)
        ]
    return TuningTable((plan.environment,), tuple(decisions))


def _settle(
    plan: Plan,
    layer: ExpertLayer,
    store: Store,
    registry: Registry,
    verifier: Verifier | None,
    shares: Sequence[float] | None,
) -> tuple[tuple[Choice, ...], tuple[Choice, ...], bool]:
    """Choose for a layer, check the choices, and choose again without what failed, until none fails.

    Returns the choices of up and of down, and whether their classes are certain.
    """
    up, down = (_Side.of(plan, gemm, store, registry) for gemm in layer.gemms)
    try:
        while True:
            chosen = choose_pair(
                up.evidence,
                down.evidence,
                plan.policy,
                excluded_up=up.excluded,
                excluded_down=down.excluded,
                weights=shares,
            )
            if verifier is None:
                return *chosen, False
            # The second GEMM's operands are made when the first one's choices hold.
            if all(side.holds(verifier, choices) for side, choices in zip((up, down), chosen, strict=True)):
                return *chosen, up.certain(chosen[0]) and down.certain(chosen[1])
    finally:
        if verifier is not None:
            verifier.release()


@dataclass
class _Side:
    """One GEMM of a layer while its choices are checked.

    `excluded` failed, `passed` did not; `blind` says of each config of the last choices why the check could not
    have failed another class, None where it could.
    """

    plan: Plan
    gemm: ExpertGemm
    store: Store
    measured: Sequence[Measurement]
    evidence: tuple[Evidence, ...]
    excluded: set[TileConfig]
    passed: set[tuple[TileConfig, Bucket]] = field(default_factory=set)
    blind: dict[TileConfig, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, gemm: ExpertGemm, store: Store, registry: Registry) -> _Side:
        measured = store.measurements(environment=plan.environment.digest, gemm=gemm, routing=plan.routing)
        evidence = gather_evidence(plan, gemm, measured, registry)
        return cls(plan, gemm, store, measured, evidence, {m.config for m in measured if breaks_class(m)})

    def holds(self, verifier: Verifier, choices: Sequence[Choice]) -> bool:
        """Whether all choices keep their class's bits; those that do not are excluded, and kept as measurements."""
        failed = self._failed(verifier, choices)
        self.excluded.update(config for config, _, _ in failed)
        self.store.add_measurements([_record(self.plan, self.gemm, self.measured, *failure) for failure in failed])
        if failed:
            return False
        for config in dict.fromkeys(choice.config for choice in choices):
            if config not in self.blind:
                self.blind[config] = verifier.control(self.gemm, config)
        return True

    def certain(self, choices: Sequence[Choice]) -> bool:
        """Whether the check that the choices passed would have failed another class."""
        for config in dict.fromkeys(choice.config for choice in choices):
            reason = self.blind[config]
            if reason is not None:
                logger.warning(
                    "not certified: the class check of %s %s cannot tell classes apart: %s",
                    self.gemm.layer.label, self.gemm.name, reason,
                )  # fmt: skip
                return False
        return True

    def _failed(self, verifier: Verifier, choices: Sequence[Choice]) -> list[tuple[TileConfig, Bucket, str]]:
        failed: dict[TileConfig, tuple[TileConfig, Bucket, str]] = {}
        for e, choice in zip(self.evidence, choices, strict=True):
            config = choice.config
            if (config, e.bucket) in self.passed or config in failed:
                continue
            reason = verifier.verify(self.gemm, config, e.bucket)
            if reason is None:
                self.passed.add((config, e.bucket))
            else:
                failed[config] = (config, e.bucket, reason)
        return list(failed.values())


def _record(
    plan: Plan, gemm: ExpertGemm, measured: Sequence[Measurement], config: TileConfig, bucket: Bucket, reason: str
) -> Measurement:
    mine = [m for m in measured if m.config == config and m.tokens == bucket.tokens]
    latest = max(mine, key=lambda m: m.run)
    return Measurement(
        environment=plan.environment.digest,
        gemm=gemm,
        tokens=bucket.tokens,
        config=config,
        status="unstable",
        routing=plan.routing,
        numerics=latest.numerics,
        run=latest.run,
        world_size=latest.world_size,
        round=CLASS_CHECK_ROUND,
        detail=f"class check failed: {reason}"[:300],
        measured_at=time.time(),
    )


def gather_evidence(
    plan: Plan, gemm: ExpertGemm, measured: Sequence[Measurement], registry: Registry
) -> tuple[Evidence, ...]:
    """Return the evidence for each bucket, from the latest run in which the default ran on every rank.

    Raises CoverageError for a bucket that was never measured.
    """
    tokens = tuple(bucket.tokens for bucket in plan.buckets)
    held = anchors(gemm, tokens, plan.environment, registry)
    found = []
    for bucket in plan.buckets:
        screened = prescreen(gemm, bucket.tokens, plan.environment, registry, anchors=held)
        runs: dict[int, list[Measurement]] = {}
        for m in measured:
            if m.tokens == bucket.tokens:
                runs.setdefault(m.run, []).append(m)
        if not runs:
            raise CoverageError(
                f"no measurements of {gemm.layer.label} {gemm.name} at {bucket.tokens} tokens; run tune first"
            )
        pooled = [pool(runs[run]) for run in sorted(runs, reverse=True)]
        default = screened.default.config
        timings, failures = next((p for p in pooled if default in p[0]), pooled[0])
        found.append(
            Evidence(
                gemm=gemm,
                bucket=bucket,
                default=default,
                candidates=screened.by_config,
                timings=timings,
                failures=failures,
            )
        )
    return tuple(found)

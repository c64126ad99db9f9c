"""From the measurements in a store to a table of decisions, the chosen configs' classes checked on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from tilecast.autotune.classes import ClassVerifier, Verifier
from tilecast.autotune.plan import Plan
from tilecast.autotune.prescreen import anchors, prescreen
from tilecast.autotune.select import Evidence, breaks_class, choose, pool
from tilecast.errors import CoverageError
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertGemm, TileConfig
from tilecast.store import Store

logger = logging.getLogger(__name__)

CLASS_CHECK_ROUND = 1 << 30
"""The round under which a failed class check is kept: beyond any round that is timed."""


def decide(
    plan: Plan, store: Store, registry: Registry, *, verify: bool = True, verifier: Verifier | None = None
) -> TuningTable:
    """Return the decisions for every layer and bucket of `plan`, made from the measurements in `store`.

    Under `reproducible` the chosen configs must keep their class's bits on this machine (`verifier`, by default
    `ClassVerifier`): one that does not is kept as a measurement with status `unstable`, is out of its class from
    then on, and the choice is made again. Decisions that passed have the certificate `hardware`, if the verifier's
    negative control shows that the check would have failed another class; else, with `verify` False, and under
    `fastest`, which promises no bits, it is `none`. The store's decisions are left as they are.

    Raises CoverageError where measurements lack, DeviceError where no group of configs serves all buckets.
    """
    if not plan.buckets:
        return TuningTable((plan.environment,), ())
    check: Verifier | None = None
    if verify and plan.policy == "reproducible":
        check = verifier or ClassVerifier(plan.environment, registry)
    decisions: list[Decision] = []
    for layer in plan.layers:
        (up, up_certain), (down, down_certain) = (_settle(plan, gemm, store, registry, check) for gemm in layer.gemms)
        decisions += [
            Decision(
                environment=plan.environment.digest,
                layer=layer,
                bucket=bucket,
                policy=plan.policy,
                up=up_choice,
                down=down_choice,
                routing=plan.routing,
                certificate="hardware" if up_certain and down_certain else "none",
            )
            for bucket, up_choice, down_choice in zip(plan.buckets, up, down, strict=True)
        ]
    return TuningTable((plan.environment,), tuple(decisions))


def _settle(
    plan: Plan, gemm: ExpertGemm, store: Store, registry: Registry, verifier: Verifier | None
) -> tuple[tuple[Choice, ...], bool]:
    """Choose for one GEMM, check the choices, and choose again without what failed, until none fails.

    Returns the choices, and whether their class is certain.
    """
    measured = store.measurements(environment=plan.environment.digest, gemm=gemm, routing=plan.routing)
    evidence = gather_evidence(plan, gemm, measured, registry)
    excluded = {m.config for m in measured if breaks_class(m)}
    passed: set[tuple[TileConfig, Bucket]] = set()
    try:
        while True:
            _, choices = choose(evidence, plan.policy, excluded=excluded)
            if verifier is None:
                return choices, False
            failed = _failed(verifier, evidence, choices, passed)
            if not failed:
                return choices, _controlled(verifier, gemm, choices)
            excluded.update(config for config, _, _ in failed)
            store.add_measurements([_record(plan, gemm, measured, *failure) for failure in failed])
    finally:
        if verifier is not None:
            verifier.release()


def _controlled(verifier: Verifier, gemm: ExpertGemm, choices: Sequence[Choice]) -> bool:
    """Whether the check that the choices passed would have failed another class."""
    for config in dict.fromkeys(choice.config for choice in choices):
        reason = verifier.control(gemm, config)
        if reason is not None:
            logger.warning(
                "not certified: the class check of %s %s cannot tell classes apart: %s",
                gemm.layer.label, gemm.name, reason,
            )  # fmt: skip
            return False
    return True


def _failed(
    verifier: Verifier, evidence: Sequence[Evidence], choices: Sequence[Choice], passed: set[tuple[TileConfig, Bucket]]
) -> list[tuple[TileConfig, Bucket, str]]:
    failed: dict[TileConfig, tuple[TileConfig, Bucket, str]] = {}
    for e, choice in zip(evidence, choices, strict=True):
        config = choice.config
        if (config, e.bucket) in passed or config in failed:
            continue
        reason = verifier.verify(e.gemm, config, e.bucket)
        if reason is None:
            passed.add((config, e.bucket))
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

"""What must be tuned: layers × GEMMs × token buckets on one environment, under one policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tilecast.environment import Environment
from tilecast.evidence import POLICIES
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, buckets, check_name

ROUTINGS = ("uniform",)
"""Routing profiles that a measurement can be made under."""

Task = tuple[ExpertGemm, Bucket]
"""One thing to tune: a GEMM at the token counts of one bucket."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layers and buckets to tune, where, and under which policy and routing profile.

    A plan without layers or without buckets is empty: nothing to measure, an empty table.
    """

    environment: Environment
    layers: tuple[ExpertLayer, ...]
    buckets: tuple[Bucket, ...]
    policy: str = "reproducible"
    routing: str = "uniform"

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        check_name("policy", self.policy, POLICIES)
        check_name("routing profile", self.routing, ROUTINGS)

    @property
    def gemms(self) -> tuple[ExpertGemm, ...]:
        """Every grouped GEMM, layer by layer, up before down."""
        return tuple(gemm for layer in self.layers for gemm in layer.gemms)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Every (GEMM, bucket), all buckets of one GEMM in a row, so that its weights are built once."""
        return tuple((gemm, bucket) for gemm in self.gemms for bucket in self.buckets)


def make_plan(
    layers: Iterable[ExpertLayer],
    tokens: Iterable[int],
    environment: Environment,
    *,
    policy: str = "reproducible",
    routing: str = "uniform",
) -> Plan:
    """Return the plan for some layers and token counts; equal layers count once, their order is kept.

    Raises InputError for a token count below 1, an unknown policy or an unknown routing profile.
    """
    return Plan(
        environment=environment,
        layers=tuple(dict.fromkeys(layers)),
        buckets=buckets(tuple(tokens)),
        policy=policy,
        routing=routing,
    )

"""What must be tuned: layers × GEMMs × token buckets on one environment, under one policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tilecast.autotune.routing_profiles import RoutingProfile, as_profile
from tilecast.environment import Environment
from tilecast.errors import InputError
from tilecast.evidence import POLICIES
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, buckets, check_name

Task = tuple[ExpertGemm, Bucket]
"""One thing to tune: a GEMM at the token counts of one bucket."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layers and buckets to tune, where, and under which policy and routing profile.

    A plan without layers or without buckets is empty: nothing to measure, an empty table. `routing` is the profile's
    name, which keys hold; `profile` follows from it, except for a histogram, of which it holds the counts.
    """

    environment: Environment
    layers: tuple[ExpertLayer, ...]
    buckets: tuple[Bucket, ...]
    policy: str = "reproducible"
    routing: str = "uniform"
    profile: RoutingProfile | None = None

    def __post_init__(self) -> None:
        """Validate, and fill in whichever of `routing` and `profile` is not given; raises InputError."""
        check_name("policy", self.policy, POLICIES)
        if self.profile is None:
            object.__setattr__(self, "profile", as_profile(self.routing))
        elif self.routing not in ("uniform", self.profile.name):
            raise InputError(f"the plan's routing is {self.routing}, but its profile is {self.profile.name}")
        object.__setattr__(self, "routing", self.routing_profile.name)
        if not self.routing_profile.is_uniform:
            # Found out now, not after an hour: a histogram may know nothing of a layer.
            for layer in self.layers:
                self.routing_profile.probabilities(layer)

    @property
    def routing_profile(self) -> RoutingProfile:
        """How tokens are spread over experts."""
        assert self.profile is not None, "filled in when the plan is made"
        return self.profile

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
    routing: str | RoutingProfile = "uniform",
) -> Plan:
    """Return the plan for some layers and token counts; equal layers count once, their order is kept.

    Raises InputError for a token count below 1, an unknown policy, an unknown routing profile or one that says
    nothing of a layer.
    """
    profile = as_profile(routing)
    return Plan(
        environment=environment,
        layers=tuple(dict.fromkeys(layers)),
        buckets=buckets(tuple(tokens)),
        policy=policy,
        routing=profile.name,
        profile=profile,
    )

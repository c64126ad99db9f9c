"""What differs between two tables, by layer and bucket."""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.environment import Environment, Mismatch
from tilecast.evidence import Decision, TuningTable

MACHINE = ("device_kind", "device", "arch", "units")
"""Fields that are alike in environments of two tables that are compared: the same device, whatever its toolchain."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One bucket that differs. `kind` is `only in A`, `only in B`, `config`, `time` or `certificate`.

    `change` is B's time over A's, less 1, where both decide the bucket; `noise` what it had to exceed to count.
    """

    kind: str
    a: Decision | None = None
    b: Decision | None = None
    change: float | None = None
    noise: float | None = None

    @property
    def decision(self) -> Decision:
        """The decision that names layer, bucket, policy and routing: A's where there is one."""
        found = self.a or self.b
        assert found is not None, "a difference is of at least one decision"
        return found

    @property
    def beyond_noise(self) -> bool:
        """Whether the times differ by more than the noise."""
        return self.change is not None and self.noise is not None and abs(self.change) > self.noise


@dataclass(frozen=True, kw_only=True)
class Diff:
    """All differences of two tables. `environments` pairs those that were compared, with the fields that differ."""

    differences: tuple[Difference, ...]
    environments: tuple[tuple[Environment, Environment, tuple[Mismatch, ...]], ...]
    same: int
    """Buckets that both decide alike."""


def diff(a: TuningTable, b: TuningTable) -> Diff:
    """Compare two tables. An environment that B lacks is compared with B's nearest one of the same device, if any."""
    pairs = _paired(a, b)
    renamed = {theirs.digest: mine.digest for mine, theirs in pairs}
    ours = {_place(d, d.environment): d for d in a.decisions}
    others = {_place(d, renamed.get(d.environment, d.environment)): d for d in b.decisions}
    found = [_compared(ours.get(place), others.get(place)) for place in sorted(ours.keys() | others.keys())]
    differences = tuple(difference for difference in found if difference is not None)
    return Diff(
        differences=differences,
        environments=tuple((mine, theirs, mine.compare(theirs)) for mine, theirs in pairs),
        same=len(found) - len(differences),
    )


def _place(decision: Decision, environment: str) -> tuple[str, str, str, str, int, int]:
    _, layer, policy, routing, tokens = decision.sort_key
    # The label before the digest, so that people find layers in order.
    return environment, f"{decision.layer.label} {layer}", policy, routing, tokens, decision.bucket.above


def _paired(a: TuningTable, b: TuningTable) -> list[tuple[Environment, Environment]]:
    used = {d.environment for d in b.decisions}
    left = {e.digest: e for e in b.environments if e.digest in used}
    pairs = [(mine, left.pop(mine.digest)) for mine in a.environments if mine.digest in left]
    equal = {mine.digest for mine, _ in pairs}
    for mine in a.environments:
        alike = [e for e in left.values() if all(getattr(e, name) == getattr(mine, name) for name in MACHINE)]
        if mine.digest not in equal and alike:
            nearest = min(alike, key=lambda e: (len(mine.compare(e)), e.digest))
            pairs.append((mine, left.pop(nearest.digest)))
    return pairs


def _compared(a: Decision | None, b: Decision | None) -> Difference | None:
    if a is None or b is None:
        return Difference(kind="only in B" if a is None else "only in A", a=a, b=b)
    change = b.tuned_us / a.tuned_us - 1
    noise = max(choice.noise for d in (a, b) for choice in (d.up, d.down))
    kind = None
    if (a.up.config, a.down.config) != (b.up.config, b.down.config):
        kind = "config"
    elif abs(change) > noise:
        kind = "time"
    elif a.certificate != b.certificate:
        kind = "certificate"
    return None if kind is None else Difference(kind=kind, a=a, b=b, change=change, noise=noise)

"""What a benchmark found: times of every contestant at every point, against each other and against the limit.

Times are medians in µs with the 20th and 80th percentiles beside them. A speed-up is the other's median over
Tilecast's: above 1, Tilecast is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.evidence import percentile
from tilecast.kernels.cpu.peak import Peaks
from tilecast.problem import ExpertLayer, TileConfig, tokens_text

OURS = "tilecast"
"""The contestant that runs on the table."""
DEFAULT = "tilecast default"
"""The contestant that runs on the kernels' default configs, as without a table."""
FORMAT = 1
"""Version of the JSON form."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contestant at one point.

    status is `ok`, `unavailable` (with the reason in `detail`), `wrong_result` or `runtime_error`; only `ok`
    has samples. `error_ratio` is the error against float64 in units of same-dtype torch's; None where the
    whole layer was not run. `gemms_only` marks a target, not a peer.
    """

    name: str
    status: str = "ok"
    samples_us: tuple[float, ...] = ()
    error_ratio: float | None = None
    gemms_only: bool = False
    detail: str = ""

    @property
    def p50_us(self) -> float | None:
        """The median in µs; None without samples."""
        return percentile(self.samples_us, 50) if self.samples_us else None

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form, percentiles included."""
        times: dict[str, Json] = {
            f"p{percent}_us": percentile(self.samples_us, percent) if self.samples_us else None
            for percent in (20, 50, 80)
        }
        return {**asdict(self), "samples_us": list(self.samples_us), **times}


@dataclass(frozen=True, kw_only=True)
class PlacedPoint:
    """One layer at one token count with `near_experts` of its experts on the device `near` and the others on `far`.

    `alone` is the layer on the near device, by the same clock. A share is the same call without the other's slots; None
    where a device has no experts. `near_bytes` and `far_bytes` are the weights held there; `crossing_bytes` what goes
    between the devices in a call, the mean over the routings drawn. From `stream_from` tokens on the far experts'
    weights are sent near; None: never.
    """

    near_experts: int
    near: str
    far: str
    near_bytes: int
    far_bytes: int
    crossing_bytes: float
    stream_from: int | None
    alone: Timing
    both: Timing
    near_share: Timing | None
    far_share: Timing | None

    @property
    def ratio(self) -> float | None:
        """How many times as long as on one device the layer takes on two; None where one of both has no time."""
        if self.alone.p50_us is None or self.both.p50_us is None:
            return None
        return self.both.p50_us / self.alone.p50_us

    @property
    def timings(self) -> tuple[Timing, ...]:
        """All that was timed."""
        shares = (self.near_share, self.far_share)
        return (self.alone, self.both, *(timing for timing in shares if timing is not None))

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form, with the ratio worked out."""
        kept = ("near_experts", "near", "far", "near_bytes", "far_bytes", "crossing_bytes", "stream_from", "ratio")
        timed = {name: getattr(self, name) for name in ("alone", "both", "near_share", "far_share")}
        return {
            **{name: getattr(self, name) for name in kept},
            **{name: None if timing is None else timing.to_json() for name, timing in timed.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Point:
    """One layer at one token count.

    `up` and `down` are the configs that Tilecast ran, `hit` whether the table decided them; `flops` and
    `bytes` (active experts' weights, activations once) are means over the routings drawn, both without what the configs
    leave out because random operands make it zero; `dot` whether the
    configs use bf16 dot products; `limit_us` is the least time that this machine needs by its measured peaks,
    bound by `memory` or `compute`. `placed` is the layer with its experts on two devices, for each placement asked for.
    """

    layer: ExpertLayer
    tokens: int
    policy: str
    up: TileConfig
    down: TileConfig
    hit: bool
    active_experts: float
    flops: float
    bytes: float
    dot: bool
    limit_us: float
    bound: str
    timings: tuple[Timing, ...]
    placed: tuple[PlacedPoint, ...] = ()

    def with_peaks(self, peaks: Peaks) -> Point:
        """Return this point with its limit worked out from other peaks."""
        limit_us = peaks.limit_us(bytes_read=self.bytes, flops=self.flops, dot=self.dot)
        read_us = peaks.limit_us(bytes_read=self.bytes, flops=0.0)
        return replace(self, limit_us=limit_us, bound="memory" if read_us >= limit_us else "compute")

    @property
    def limit_exceeded(self) -> bool:
        """Whether a contestant was faster than the limit: then a peak was measured too low, on a busy machine.

        No share of such a point says anything.
        """
        return any((self.share(timing.name) or 0.0) > 1.0 for timing in self.timings)

    def timing(self, name: str) -> Timing | None:
        """Return one contestant's timing, None if it was not asked for."""
        return next((timing for timing in self.timings if timing.name == name), None)

    def p50_us(self, name: str = OURS) -> float | None:
        """Return one contestant's median in µs, None if it has no time."""
        timing = self.timing(name)
        return None if timing is None else timing.p50_us

    def gflop_s(self, name: str = OURS) -> float | None:
        """Return the rate of a contestant in GFLOP/s."""
        time = self.p50_us(name)
        return None if time is None else self.flops / time / 1e3

    def gb_s(self, name: str = OURS) -> float | None:
        """Return the bytes of the active experts and activations over a contestant's time, in GB/s."""
        time = self.p50_us(name)
        return None if time is None else self.bytes / time / 1e3

    def share(self, name: str = OURS) -> float | None:
        """Return the share of the machine's limit that a contestant reaches; above 1 see `limit_exceeded`."""
        time = self.p50_us(name)
        return None if time is None else self.limit_us / time

    def speedup(self, *names: str) -> float | None:
        """Return Tilecast's speed-up over the fastest of some contestants (none given: of all whole-layer peers)."""
        ours = self.p50_us()
        others = [time for name in names or self.peers if (time := self.p50_us(name)) is not None]
        return min(others) / ours if ours is not None and others else None

    @property
    def peers(self) -> tuple[str, ...]:
        """The names of the contestants that run the whole layer and are not Tilecast's."""
        return tuple(t.name for t in self.timings if t.name not in (OURS, DEFAULT) and not t.gemms_only)

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form with rates, shares and speed-ups worked out."""
        contestants: list[Json] = []
        for timing in self.timings:
            derived: dict[str, Json] = {
                "gflop_s": self.gflop_s(timing.name),
                "gb_s": self.gb_s(timing.name),
                "share_of_limit": self.share(timing.name),
                "speedup": self.speedup(timing.name) if timing.name != OURS else None,
            }
            contestants.append({**timing.to_json(), **derived})
        return {
            "layer": self.layer.to_json(),
            "tokens": self.tokens,
            "policy": self.policy,
            "up": self.up.to_json(),
            "down": self.down.to_json(),
            "hit": self.hit,
            "active_experts": self.active_experts,
            "flops": self.flops,
            "bytes": self.bytes,
            "limit_us": self.limit_us,
            "bound": self.bound,
            "limit_exceeded": self.limit_exceeded,
            "speedup_over_best_peer": self.speedup(),
            "contestants": contestants,
            "placed": [placed.to_json() for placed in self.placed],
        }


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Tilecast against some contestants over all points: geometric mean, and where it is worst."""

    against: str
    points: int
    geometric_mean: float
    worst: float
    worst_point: str

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Points measured in one process on one machine, with that machine's limits.

    A peak is the best of the readings taken between the points: what the machine can do, not what its
    neighbours happened to leave over. All points' limits are worked out from these.
    """

    environment: Environment
    threads: int
    read_gb_s: float
    fma_gflop_s: float
    dot_bf16_gflop_s: float
    points: tuple[Point, ...]

    @property
    def peaks(self) -> Peaks:
        """The machine's limits."""
        return Peaks(
            threads=self.threads,
            read_gb_s=self.read_gb_s,
            fma_gflop_s=self.fma_gflop_s,
            dot_bf16_gflop_s=self.dot_bf16_gflop_s,
        )

    def merged(self, other: BenchResult) -> BenchResult:
        """Return this result with another's points appended, all under the better readings of both."""
        peaks = best_peaks((self.peaks, other.peaks))
        return replace(
            self,
            read_gb_s=peaks.read_gb_s,
            fma_gflop_s=peaks.fma_gflop_s,
            dot_bf16_gflop_s=peaks.dot_bf16_gflop_s,
            points=tuple(point.with_peaks(peaks) for point in self.points + other.points),
        )

    @property
    def contestants(self) -> tuple[str, ...]:
        """Every contestant's name, in order of first appearance."""
        return tuple(dict.fromkeys(timing.name for point in self.points for timing in point.timings))

    def summary(self, *names: str) -> Summary | None:
        """Sum up the speed-ups over the fastest of `names` at each point (none: of all whole-layer peers).

        Points at which nobody of them has a time do not count; None if no point does.
        """
        return _summarise(" or ".join(names) or "best peer", self.points, lambda point: point.speedup(*names))

    def share_summary(self) -> Summary | None:
        """Sum up the share of the machine's limit that Tilecast reaches, over the points whose limit held."""
        return _summarise("limit", [p for p in self.points if not p.limit_exceeded], lambda point: point.share())

    def summaries(self, also: Sequence[Sequence[str]] = ()) -> tuple[Summary, ...]:
        """Return the summaries over the limit, the best peer, each contestant, and groups given in `also`."""
        groups: Iterable[Sequence[str]] = [(), *((name,) for name in self.contestants if name != OURS), *also]
        found = [self.share_summary(), *(self.summary(*group) for group in groups)]
        return tuple(summary for summary in found if summary is not None)

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form, summaries included."""
        return {
            "format": FORMAT,
            "environment": self.environment.to_json(),
            "threads": self.threads,
            "peaks": {
                "read_gb_s": self.read_gb_s,
                "fma_gflop_s": self.fma_gflop_s,
                "dot_bf16_gflop_s": self.dot_bf16_gflop_s,
            },
            "points": [point.to_json() for point in self.points],
            "summaries": [summary.to_json() for summary in self.summaries()],
        }


def best_peaks(readings: Sequence[Peaks]) -> Peaks:
    """Return the best of several readings of one machine's limits, field by field."""
    return Peaks(
        threads=readings[0].threads,
        read_gb_s=max(reading.read_gb_s for reading in readings),
        fma_gflop_s=max(reading.fma_gflop_s for reading in readings),
        dot_bf16_gflop_s=max(reading.dot_bf16_gflop_s for reading in readings),
    )


def _summarise(against: str, points: Iterable[Point], value_of: Callable[[Point], float | None]) -> Summary | None:
    found = [(value, point) for point in points if (value := value_of(point)) is not None]
    if not found:
        return None
    worst, at = min(found, key=lambda pair: pair[0])
    return Summary(
        against=against,
        points=len(found),
        geometric_mean=math.exp(sum(math.log(value) for value, _ in found) / len(found)),
        worst=worst,
        worst_point=f"{at.layer.label}, {tokens_text(at.tokens)}, {at.policy}",
    )

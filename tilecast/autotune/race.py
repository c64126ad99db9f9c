"""One task's race: interleaved rounds in rotating order, the slow ones dropped, every measurement kept at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from tilecast.autotune.measure import Measurer, device_lost, failure
from tilecast.autotune.peers import Peers
from tilecast.autotune.plan import Plan
from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.select import Group, Timing, breaks_class, group_of, pool
from tilecast.errors import DeviceError
from tilecast.evidence import Measurement
from tilecast.problem import Bucket, ExpertGemm, TileConfig
from tilecast.store import Store

SAMPLES = (1, 2, 3)
"""Samples per config in round 0, 1 and every later one."""
KEEP_WITHIN = (1.5, 1.2)
"""After round 0 and 1, configs within this factor of the best go on."""
KEEP_BEST = 6
"""From round 2 on, at most this many go on, besides the default and the groups' best."""
GROUP_WITHIN = 1.5
"""The best config of a group and order goes on within this factor: one group must serve all buckets."""
FEW = 4
"""Candidates besides the default that get a sample even when a task's share of the budget is spent."""

SCREENING_SHARE = 0.6
"""Part of a task's time that round 0 may take: many configs sampled once and none twice tell nothing from noise."""

TaskKey = tuple[ExpertGemm, int]


@dataclass
class Session:
    """What all tasks of one tuning share.

    `known` holds this run's measurements of all ranks, by key; `broken` the configs that failed a class check.
    """

    plan: Plan
    store: Store
    measurer: Measurer
    peers: Peers
    run: int
    known: dict[TaskKey, dict[str, Measurement]] = field(default_factory=dict)
    broken: dict[ExpertGemm, set[TileConfig]] = field(default_factory=dict)
    made: int = 0

    def learn(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """Remember measurements of this run and return the ones that are new."""
        new = []
        for m in measurements:
            of_task = self.known.setdefault((m.gemm, m.tokens), {})
            if m.run == self.run and m.key not in of_task:
                of_task[m.key] = m
                new.append(m)
        return new

    def keep(self, measurement: Measurement) -> None:
        """Store a measurement the moment it is made."""
        self.store.add_measurements([measurement])
        self.learn([measurement])
        self.made += 1

    def exchange(self, measurements: Sequence[Measurement], stop: bool) -> bool:
        """Merge a round with the other ranks', keep what is theirs, return whether any rank stops."""
        merged, stop = self.peers.merge(measurements, stop)
        new = self.learn(merged)
        if new:
            self.store.add_measurements(new)
        return stop


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a tuning stands; given to the progress callback after every measurement.

    `task` counts from 0; times of configs are medians in µs, None before the first; `remaining_s` is an
    estimate, None before there is one; `cut` counts the (config, round) pairs that the budget left out.
    """

    task: int
    tasks: int
    label: str
    round: int
    rounds: int
    alive: int
    candidates: int
    best_us: float | None
    default_us: float | None
    elapsed_s: float
    remaining_s: float | None
    fraction: float
    cut: int = 0


@dataclass(frozen=True, kw_only=True)
class RaceState:
    """How a race stands: its round, the configs still in it, the best time so far, the share that is done."""

    round: int
    alive: int
    best_us: float | None
    default_us: float | None
    done: float
    cut: int = 0


def survivors(
    alive: Sequence[Candidate], timings: dict[TileConfig, Timing], *, round: int, policy: str
) -> list[Candidate]:
    """Return who goes on after `round`, in the order given: near enough to the best, among the best few.

    That holds for each order of the intermediate by itself, if its best is not far behind: the layer's other GEMM may
    be much faster in that order. The default goes on as long as it runs at all; so does each group's best in each
    order if it is not far behind.
    """
    timed = sorted((c for c in alive if c.config in timings), key=lambda c: timings[c.config].p50_us)
    if not timed:
        return []
    best = timings[timed[0].config].p50_us
    within = KEEP_WITHIN[min(round, len(KEEP_WITHIN) - 1)]
    kept: set[TileConfig] = set()
    for order in sorted({c.order for c in timed}):
        of_order = [c for c in timed if c.order == order]
        best_of_order = timings[of_order[0].config].p50_us
        if best_of_order > best * GROUP_WITHIN:
            continue
        few = of_order if round == 0 else of_order[:KEEP_BEST]
        near = best_of_order * within
        kept |= {c.config for c in few if timings[c.config].p50_us <= near or round >= len(KEEP_WITHIN)}
    leaders: dict[tuple[Group, str], Candidate] = {}
    for c in timed:
        if (group := group_of(c, policy)) is not None:
            leaders.setdefault((group, c.order), c)
    kept |= {c.config for c in leaders.values() if timings[c.config].p50_us <= best * GROUP_WITHIN}
    kept |= {c.config for c in timed if c.is_default}
    return [c for c in alive if c.config in kept]


class Race:
    """Measures one GEMM at one bucket's token count."""

    def __init__(
        self,
        session: Session,
        gemm: ExpertGemm,
        bucket: Bucket,
        candidates: Sequence[Candidate],
        *,
        required: int,
        deadline: float,
        rounds: int,
        report: Callable[[RaceState], None],
    ) -> None:
        """Race `candidates`; the first `required` of them are measured even after the deadline (monotonic s)."""
        self._session = session
        self._gemm = gemm
        self._tokens = bucket.tokens
        self._candidates = list(candidates)
        self._required = required
        self._deadline = deadline
        now = time.monotonic()
        self._screening_end = now + SCREENING_SHARE * max(0.0, deadline - now)
        self._rounds = rounds
        self._report = report
        self._cost_s: dict[TileConfig, float] = {}
        self._first_costs_s: list[float] = []
        self._cut = 0

    def run(self) -> int:
        """Run all rounds and return how many (config, round) pairs the deadline cut."""
        alive = self._candidates
        for number in range(self._rounds):
            made, stop = self._round(alive, number)
            stop = self._session.exchange(made, stop)
            timings = pool(m for m in self._measurements() if m.round <= number)[0]
            alive = survivors(alive, timings, round=number, policy=self._session.plan.policy)
            if self._cut:
                self._report(self._state(number, len(alive), 1.0))
            if stop or not alive:
                break
        return self._cut

    def timings(self) -> dict[TileConfig, Timing]:
        """Return what is known so far of the configs that ran on every rank."""
        return pool(self._measurements())[0]

    def _measurements(self) -> list[Measurement]:
        return list(self._session.known.get((self._gemm, self._tokens), {}).values())

    def _round(self, alive: Sequence[Candidate], number: int) -> tuple[list[Measurement], bool]:
        rank = self._session.peers.rank
        present = {m.config: m for m in self._measurements() if m.rank == rank and m.round == number}
        turn = number % len(alive)
        order = [*alive[turn:], *alive[:turn]]
        made: list[Measurement] = []
        stop = False
        for position, candidate in enumerate(order):
            if candidate.config in present:
                continue
            must = number == 0 and position < self._required
            cost = self._expected_cost_s(candidate.config, number)
            stop = stop or (not must and time.monotonic() + cost > self._deadline)
            if not must and (stop or (number == 0 and time.monotonic() + cost > self._screening_end)):
                self._cut += 1
                continue
            measurement = self._measure(candidate, number)
            self._session.keep(measurement)
            if measurement.status == "runtime_error" and device_lost(measurement.detail):
                raise DeviceError(
                    f"{candidate.config.label} left the device unusable to this process ({measurement.detail}); "
                    "that is recorded: run tune again, it goes on without this config"
                )
            made.append(measurement)
            self._report(self._state(number, len(alive), (position + 1) / len(order)))
        return made, stop

    def _expected_cost_s(self, config: TileConfig, number: int) -> float:
        if number == 0:
            # The median: the first config of each weight layout packs for all that follow it.
            return median(self._first_costs_s) if self._first_costs_s else 0.0
        return self._cost_s.get(config, 0.0) * _samples(number)

    def _measure(self, candidate: Candidate, number: int) -> Measurement:
        config, session = candidate.config, self._session
        start = time.monotonic()
        status, detail, ratio = "ok", "", None
        samples: tuple[float, ...] = ()
        try:
            if number == 0:
                verdict = session.measurer.check(self._gemm, self._tokens, config)
                status, detail, ratio = verdict.status, verdict.detail, verdict.error_ratio
            if status == "ok":
                count = _samples(number)
                samples = session.measurer.sample(self._gemm, self._tokens, config, round=number, count=count)
                self._cost_s[config] = max(samples) / 1e6
        except Exception as error:  # Whatever a kernel raises is evidence about it, not the end of tuning.
            status, detail = failure(error)
        if number == 0:
            self._first_costs_s.append(time.monotonic() - start)
        return Measurement(
            environment=session.plan.environment.digest,
            gemm=self._gemm,
            tokens=self._tokens,
            config=config,
            status=status,
            samples_us=samples,
            routing=session.plan.routing,
            numerics=candidate.numerics,
            error_ratio=ratio,
            rank=session.peers.rank,
            world_size=session.peers.world_size,
            run=session.run,
            round=number,
            detail=detail,
            measured_at=time.time(),
        )

    def _state(self, number: int, alive: int, part: float) -> RaceState:
        own = {m.config: m.p50_us for m in self._measurements() if m.samples_us and not breaks_class(m)}
        default = self._candidates[0].config
        # Round 0 takes about half of a race: every candidate is checked and sampled.
        done = 0.5 * part if number == 0 else 0.5 + 0.5 * (number - 1 + part) / max(1, self._rounds - 1)
        return RaceState(
            round=number,
            alive=alive,
            best_us=min(own.values(), default=None),
            default_us=own.get(default),
            done=done,
            cut=self._cut,
        )


def _samples(number: int) -> int:
    return SAMPLES[min(number, len(SAMPLES) - 1)]

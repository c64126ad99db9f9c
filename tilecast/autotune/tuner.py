"""The tuning loop: measure what a plan asks for, keep every measurement as it is made, decide on all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tilecast.autotune.budget import Budget, expected_cost_s, expected_gains, nominal_launch_s
from tilecast.autotune.classes import Verifier
from tilecast.autotune.decide import decide
from tilecast.autotune.measure import DeviceMeasurer, Measurer
from tilecast.autotune.neighbours import Shown, best_of_nearest, drawn, medians, nearness
from tilecast.autotune.peers import Alone, Peers
from tilecast.autotune.plan import Plan, Task
from tilecast.autotune.prescreen import Candidate, Prescreened, anchors, prescreen
from tilecast.autotune.prior import Expectation, Neighbour, expect
from tilecast.autotune.race import Entry, Progress, Race, RaceState
from tilecast.autotune.search import Strategy, strategy_for
from tilecast.autotune.session import Ahead, Session
from tilecast.autotune.timing import Timing, breaks_class, pool
from tilecast.autotune.watches import Watch
from tilecast.errors import UsageError
from tilecast.evidence import Measurement, TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig, tokens_text
from tilecast.store import Store

__all__ = ["Progress", "TaskReport", "TuningRun", "broken_classes", "decide", "latest_run", "measure_plan", "tune"]

EFFORT = "standard"
MIN_BUDGET_S = 1e-3
OWN_ROUNDS = 4.0
"""What the task itself has shown counts this many times a neighbour's."""


class Ranker(Protocol):
    """Says beforehand how long configs take: the cost model, or nothing."""

    def rank(self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig]) -> Mapping[TileConfig, float]:
        """Return the expected µs of the configs that it has an opinion of."""
        ...


Hints = Callable[[ExpertGemm, int], Sequence[TileConfig]]
"""What was good for a task like this one elsewhere: other shards, other environments, other tuners' files."""


class NoRanker:
    """Knows nothing."""

    def rank(self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig]) -> Mapping[TileConfig, float]:
        """Return no opinion."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """What was done for one (GEMM, bucket), in this run: `started` configs were checked, and timed `samples` times.

    `cut` counts the (config, round) pairs that the budget left out.
    """

    gemm: ExpertGemm
    tokens: int
    candidates: int
    rejected: int
    cut: int
    started: int = 0
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class TuningRun:
    """What a call of `measure_plan` did: `measured` counts the measurements made by this rank in this call,
    `disturbed` the stretches of them that were measured again since something else used the device."""

    run: int
    measured: int
    elapsed_s: float
    disturbed: int
    tasks: tuple[TaskReport, ...]

    @property
    def cut(self) -> int:
        """How many (config, round) pairs the budget left out."""
        return sum(task.cut for task in self.tasks)


ProgressCallback = Callable[[Progress], None]


def measure_plan(
    plan: Plan,
    store: Store,
    registry: Registry,
    *,
    measurer: Measurer | None = None,
    budget_s: float | None = None,
    progress: ProgressCallback | None = None,
    peers: Peers | None = None,
    fresh: bool = False,
    strategy: Strategy | str = EFFORT,
    ranker: Ranker | None = None,
    watch: Watch | None = None,
    ahead: Ahead | None = None,
    hints: Hints | None = None,
    split: bool = False,
    seed: int = 0,
    weights: Mapping[int, float] | None = None,
) -> TuningRun:
    """Measure every task of `plan` and keep every measurement in `store` the moment it is made.

    Called again, it goes on: what the latest run holds is not measured twice; `fresh` starts a new run, and so
    does another number of ranks. `budget_s` bounds the time in seconds, the class check of `decide` included;
    the default config of every task is measured whatever the budget, and most of it goes to tasks that cost much and
    may win much of the serving time, of which `weights` are token counts' shares of the calls. `strategy` is an effort
    (`quick`, `standard`, `exhaustive`), a strategy's name, or one; `ranker` tells it what to expect; what it draws at
    random follows from `seed`; `hints` gives configs that a task should start with, if they are valid. `measurer` is
    by default the device of this process; `watch` has disturbed times measured again, `ahead` compiles what comes
    next. With `peers`, all ranks call this with the same arguments and take the same steps; with `split` they share
    the configs of the first rounds out and measure the finalists all at the same time.

    Raises DeviceError when nothing runs here, UsageError for a budget that is not above 0 or an unknown strategy,
    InputError for weights that no bucket has a share of; failures of single configs are measurements with a status.
    """
    if budget_s is not None and not (math.isfinite(budget_s) and budget_s > 0):
        raise UsageError(f"the budget is {budget_s} seconds, expected a finite number above 0")
    search = strategy_for(strategy) if isinstance(strategy, str) else strategy
    measurer = measurer or DeviceMeasurer(plan.environment, registry, routing=plan.routing_profile)
    store.add_environment(plan.environment)
    session = _open_session(plan, store, measurer, peers or Alone(), fresh=fresh)
    session.watch, session.ahead = watch, ahead
    session.split = split and session.peers.world_size > 1
    loop = _Loop(
        session, registry, budget_s=budget_s, strategy=search, ranker=ranker or NoRanker(), hints=hints, seed=seed,
        weights=weights, progress=progress,
    )  # fmt: skip
    return loop.run()


def tune(
    plan: Plan,
    store: Store,
    registry: Registry,
    *,
    measurer: Measurer | None = None,
    budget_s: float | None = None,
    progress: ProgressCallback | None = None,
    fresh: bool = False,
    strategy: Strategy | str = EFFORT,
    ranker: Ranker | None = None,
    watch: Watch | None = None,
    ahead: Ahead | None = None,
    seed: int = 0,
    weights: Mapping[int, float] | None = None,
    verify: bool = True,
    verifier: Verifier | None = None,
) -> TuningTable:
    """Measure, decide, keep the decisions in `store`, and return them as a table; see `measure_plan`, `decide`.

    One rank only: ranks that tune together call `measure_plan`, and one of them decides for all.
    """
    start = time.monotonic()
    while True:
        left = None if budget_s is None else max(MIN_BUDGET_S, budget_s - (time.monotonic() - start))
        measure_plan(
            plan, store, registry, measurer=measurer, budget_s=left, progress=progress, fresh=fresh,
            strategy=strategy, ranker=ranker, watch=watch, ahead=ahead, seed=seed, weights=weights,
        )  # fmt: skip
        before = broken_classes(plan, store)
        table = decide(plan, store, registry, verify=verify, verifier=verifier, weights=weights)
        if broken_classes(plan, store) == before:
            break
        # What failed its class check may have driven others out of the race; without it they run on.
        fresh = False
    store.put_decisions(list(table.decisions))
    return table


def broken_classes(plan: Plan, store: Store) -> set[str]:
    """Return the keys of the measurements of `plan` that found a config's bits not those of its class."""
    found = store.measurements(environment=plan.environment.digest, routing=plan.routing)
    return {m.key for m in found if breaks_class(m)}


def _open_session(plan: Plan, store: Store, measurer: Measurer, peers: Peers, *, fresh: bool) -> Session:
    merged, _ = peers.merge(latest_run(plan, store), False)
    tokens = {bucket.tokens for bucket in plan.buckets}
    runs = [m for m in merged if m.tokens in tokens]
    run = max((m.run for m in runs), default=0)
    other_ranks = any(m.run == run and m.world_size != peers.world_size for m in runs)
    if runs and (fresh or other_ranks):
        run += 1
    session = Session(plan=plan, store=store, measurer=measurer, peers=peers, run=run)
    for m in merged:
        if breaks_class(m):
            session.broken.setdefault(m.gemm, set()).add(m.config)
    new = session.learn(merged)
    if new and peers.world_size > 1:
        store.add_measurements(new)
    return session


def latest_run(plan: Plan, store: Store) -> list[Measurement]:
    """Return what a tuning of `plan` goes on with: the latest run, and every class that was found broken.

    Earlier runs are left out, as all of this is sent to all ranks. A config that broke its class at any number
    of tokens is out at all of them, as it is in `decide`.
    """
    tokens = {bucket.tokens for bucket in plan.buckets}
    found: list[Measurement] = []
    for gemm in plan.gemms:
        found += store.measurements(environment=plan.environment.digest, gemm=gemm, routing=plan.routing)
    latest = max((m.run for m in found if m.tokens in tokens), default=0)
    return [m for m in found if breaks_class(m) or (m.tokens in tokens and m.run == latest)]


class _Loop:
    """Goes through the tasks of a plan in order."""

    def __init__(
        self,
        session: Session,
        registry: Registry,
        *,
        budget_s: float | None,
        strategy: Strategy,
        ranker: Ranker,
        hints: Hints | None,
        seed: int,
        weights: Mapping[int, float] | None,
        progress: ProgressCallback | None,
    ) -> None:
        plan = session.plan
        self._session = session
        self._strategy = strategy
        self._ranker = ranker
        self._hints = hints
        self._seed = seed
        self._progress = progress
        self._tasks: tuple[Task, ...] = plan.tasks
        self._screened = tuple(_screen(plan, registry))
        self._eligible = tuple(
            _eligible(screened, plan.policy, session.broken.get(gemm, set()))
            for (gemm, _), screened in zip(self._tasks, self._screened, strict=True)
        )
        costs = tuple(
            expected_cost_s(gemm, bucket.tokens, len(eligible))
            for (gemm, bucket), eligible in zip(self._tasks, self._eligible, strict=True)
        )
        self._budget = Budget(budget_s, costs, self._gains(weights))
        self._seen: list[Shown] = []

    def _gains(self, weights: Mapping[int, float] | None) -> tuple[float, ...]:
        predicted: list[float] = []
        doubts = []
        for (gemm, bucket), eligible in zip(self._tasks, self._eligible, strict=True):
            predicted += self._ranker.rank(gemm, bucket.tokens, [eligible[0].config]).values()
            doubts.append(self._doubt(gemm, bucket.tokens, [c.config for c in eligible]))
        if len(predicted) < len(self._tasks):
            predicted = [1e6 * nominal_launch_s(gemm, bucket.tokens) for gemm, bucket in self._tasks]
        return expected_gains(self._tasks, predicted, doubts, weights)

    def _doubt(self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig]) -> float:
        """Return how much is in doubt before the task goes on: less where an earlier call measured some of it."""
        timings, _ = pool(self._session.known.get((gemm, tokens), {}).values())
        predicted = self._ranker.rank(gemm, tokens, configs) if timings else {}
        return expect(configs, predicted, [Neighbour(times=medians(timings), predicted=predicted, weight=1.0)]).doubt

    def run(self) -> TuningRun:
        """Run every task."""
        reports = []
        measurer = self._session.measurer
        for number, (gemm, bucket) in enumerate(self._tasks):
            if number == 0 or self._tasks[number - 1][0] != gemm:
                measurer.prepare(gemm)
            try:
                cut = self._race(number)
            finally:
                if number + 1 == len(self._tasks) or self._tasks[number + 1][0] != gemm:
                    measurer.release(gemm)
            screened = self._screened[number]
            reports.append(
                TaskReport(
                    gemm=gemm,
                    tokens=bucket.tokens,
                    candidates=len(self._eligible[number]),
                    rejected=len(screened.rejections),
                    cut=cut,
                    **self._done(gemm, bucket.tokens),
                )
            )
        session = self._session
        return TuningRun(
            run=session.run,
            measured=session.made,
            elapsed_s=self._budget.elapsed_s,
            disturbed=session.disturbed,
            tasks=tuple(reports),
        )

    def _done(self, gemm: ExpertGemm, tokens: int) -> dict[str, int]:
        own = [m for m in self._session.known.get((gemm, tokens), {}).values() if m.rank == self._session.peers.rank]
        return {"started": len({m.config for m in own}), "samples": sum(len(m.samples_us) for m in own)}

    def _race(self, number: int) -> int:
        gemm, bucket = self._tasks[number]
        eligible = self._eligible[number]
        configs = [c.config for c in eligible]
        predicted = self._ranker.rank(gemm, bucket.tokens, configs)
        neighbours = [
            Neighbour(times=seen.times, predicted=seen.predicted, weight=nearness(seen, gemm, bucket.tokens))
            for seen in self._seen
        ]

        def expectation(timings: Mapping[TileConfig, Timing]) -> Expectation:
            own = Neighbour(times=medians(timings), predicted=predicted, weight=OWN_ROUNDS)
            return expect(configs, predicted, [*neighbours, own])

        entry = Entry(
            candidates=eligible,
            must=tuple(c.config for c in eligible if c.is_default or c.is_anchor),
            hints=self._started(gemm, bucket.tokens, configs),
            drawn=drawn(configs, self._seed),
        )
        race = Race(
            self._session,
            gemm,
            bucket,
            entry,
            strategy=self._strategy,
            deadline=self._budget.deadline(number),
            expect=expectation,
            report=lambda state: self._report(number, len(eligible), state),
        )
        cut = race.run()
        timings = race.timings()
        if timings:
            self._seen.append(Shown(gemm=gemm, tokens=bucket.tokens, times=medians(timings), predicted=predicted))
        return cut

    def _started(self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig]) -> tuple[TileConfig, ...]:
        """Return what starts besides what is expected to be good: the neighbours' best, and what came from outside."""
        given = () if self._hints is None else self._hints(gemm, tokens)
        own = best_of_nearest(self._seen, gemm, tokens, set(configs))
        return tuple(dict.fromkeys([*own, *(config for config in given if config in configs)]))

    def _report(self, number: int, candidates: int, state: RaceState) -> None:
        if self._progress is None:
            return
        gemm, bucket = self._tasks[number]
        self._progress(
            Progress(
                task=number,
                tasks=len(self._tasks),
                label=f"{gemm.layer.label} {gemm.name} {tokens_text(bucket.tokens)}",
                round=state.round,
                rounds=self._strategy.rounds,
                alive=state.alive,
                candidates=candidates,
                best_us=state.best_us,
                default_us=state.default_us,
                elapsed_s=self._budget.elapsed_s,
                remaining_s=self._budget.remaining_s(number, state.done),
                fraction=self._budget.fraction(number, state.done),
                cut=state.cut,
            )
        )


def _screen(plan: Plan, registry: Registry) -> list[Prescreened]:
    tokens = tuple(bucket.tokens for bucket in plan.buckets)
    held = {gemm: anchors(gemm, tokens, plan.environment, registry) for gemm in plan.gemms}
    return [
        prescreen(gemm, bucket.tokens, plan.environment, registry, anchors=held[gemm]) for gemm, bucket in plan.tasks
    ]


def _eligible(screened: Prescreened, policy: str, broken: set[TileConfig]) -> tuple[Candidate, ...]:
    if policy == "fastest":
        return screened.candidates
    # Nothing else could be chosen, and would only crowd out what can; the default races whatever it is.
    return tuple(c for c in screened.candidates if c.is_default or (c.batch_invariant and c.config not in broken))

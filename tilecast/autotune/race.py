"""One task's race: rounds that a strategy composes, interleaved in rotating order, every measurement kept at once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

from tilecast.autotune.gate import Verdict
from tilecast.autotune.measure import failure
from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.prior import Expectation
from tilecast.autotune.sampling import Batch, Sampling
from tilecast.autotune.search.base import Strategy, Turn, View
from tilecast.autotune.session import Session
from tilecast.autotune.timing import Timing, breaks_class, pool
from tilecast.errors import DeviceError
from tilecast.evidence import Measurement
from tilecast.problem import Bucket, ExpertGemm, TileConfig

logger = logging.getLogger(__name__)

FEW = 4
"""Candidates besides the default that get a sample even when a task's share of the budget is spent."""

SCREENING_SHARE = 0.6
"""Part of a task's time that round 0 may take: many configs sampled once and none twice tell nothing from noise."""

COMPILED_AT_ONCE, COMPILED_IN_A_BUDGET = 8, 2
"""Configs that are compiled together before the first of them is checked; few where a deadline may come first."""

SPLIT_ROUNDS = 2
"""Rounds whose configs are shared out among ranks that divide the work."""
COMMON_ROUNDS = 2
"""Rounds in which the best few run on all ranks at the same time whatever the strategy thinks is known."""


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


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Who may run: all candidates, default first; those that must; neighbours' best; and all in a random order."""

    candidates: tuple[Candidate, ...]
    must: tuple[TileConfig, ...]
    hints: tuple[TileConfig, ...]
    drawn: tuple[TileConfig, ...]


class Race:
    """Measures one GEMM at one bucket's token count."""

    def __init__(
        self,
        session: Session,
        gemm: ExpertGemm,
        bucket: Bucket,
        entry: Entry,
        *,
        strategy: Strategy,
        deadline: float,
        expect: Callable[[Mapping[TileConfig, Timing]], Expectation],
        report: Callable[[RaceState], None],
    ) -> None:
        """Race the candidates of `entry` until the deadline (monotonic s), those that must be measured beyond it.

        `expect` says what to expect of all candidates, given what the race has shown so far.
        """
        self._session = session
        self._gemm = gemm
        self._tokens = bucket.tokens
        self._entry = entry
        self._by_config = {c.config: c for c in entry.candidates}
        self._strategy = strategy
        self._deadline = deadline
        # Whatever the deadline: what selection cannot do without, and a few more to choose from.
        self._required = len(entry.must) + (FEW if deadline > time.monotonic() else 0)
        now = time.monotonic()
        self._screening_end = now + SCREENING_SHARE * max(0.0, deadline - now)
        self._expect = expect
        self._report = report
        self._sampling = Sampling(session, gemm, bucket.tokens, self._by_config)
        self._first_costs_s: list[float] = []
        self._cut = 0
        self._read = 0
        self._last_us: dict[TileConfig, float] = {}
        self._passed: set[TileConfig] = set()
        self._coded: dict[str, TileConfig] = {}
        self._compiled: dict[TileConfig, float] = {}

    def run(self) -> int:
        """Run all rounds and return how many (config, round) pairs the deadline cut."""
        for number in range(self._strategy.rounds + (COMMON_ROUNDS if self._session.split else 0)):
            view = self._view(number)
            turn = self._strategy.turn(view)
            if (turn is None or not turn.configs) and self._session.split:
                turn = self._common(view)
            if turn is None or not turn.configs:
                break
            made, stop = self._round(turn, number)
            stop = self._session.exchange(made, stop)
            if self._cut:
                self._report(self._state(number, len(turn.configs), 1.0))
            if stop:
                break
        return self._cut

    def _common(self, view: View) -> Turn | None:
        """Return a round for the best few on all ranks, as long as those did not run there often enough."""
        if view.round >= SPLIT_ROUNDS + COMMON_ROUNDS or not view.timings:
            return None
        best = sorted(view.timings.values(), key=lambda t: (t.p50_us, t.config.sort_key))[:FEW]
        return Turn(configs=tuple(dict.fromkeys([*self._entry.must, *(t.config for t in best)])), samples=2)

    def _view(self, number: int) -> View:
        before = [m for m in self._measurements() if m.round < number and not breaks_class(m)]
        timings, failures = pool(before, anywhere=self._session.split)
        expectation = self._expect(timings)
        entry = self._entry
        return View(
            gemm=self._gemm, tokens=self._tokens, policy=self._session.plan.policy, round=number,
            candidates=entry.candidates, must=entry.must, hints=entry.hints, expected=expectation.log_time,
            doubt=expectation.doubt, drawn=entry.drawn, timings=timings, failed=frozenset(failures),
            ran=tuple(frozenset(m.config for m in before if m.round == r) for r in range(number)),
        )  # fmt: skip

    def timings(self) -> dict[TileConfig, Timing]:
        """Return what is known so far of the configs that ran on every rank."""
        return pool(self._measurements())[0]

    def _measurements(self) -> list[Measurement]:
        return list(self._session.known.get((self._gemm, self._tokens), {}).values())

    def _round(self, turn: Turn, number: int) -> tuple[list[Measurement], bool]:
        rank = self._session.peers.rank
        present = {m.config for m in self._measurements() if m.rank == rank and m.round == number}
        first = number % len(turn.configs)
        order = self._share([*turn.configs[first:], *turn.configs[:first]], number)
        if self._session.ahead is not None:
            self._session.ahead.submit(self._gemm, [config for config in order if config not in present])
        made: list[Measurement] = []
        batch = Batch(self._sampling, number, turn.samples)
        stop = False
        for position, config in enumerate(order):
            if config in present:
                continue
            must = number == 0 and position < self._required
            cost = batch.waiting_s() + self._expected_cost_s(config, turn.samples)
            stop = stop or (not must and time.monotonic() + cost > self._deadline)
            if not must and (stop or (number == 0 and time.monotonic() + cost > self._screening_end)):
                self._cut += 1
                continue
            self._compile(config, order[position:])
            made += batch.add(config, self._check(config) or Verdict())
            self._report(self._state(number, len(turn.configs), (position + 1) / len(order)))
        made += batch.close()
        self._report(self._state(number, len(turn.configs), 1.0))
        return made, stop

    def _share(self, order: list[TileConfig], number: int) -> list[TileConfig]:
        """Return what this rank measures of a round: all of it, or its share and what must run on all ranks."""
        peers = self._session.peers
        if not self._session.split or number >= SPLIT_ROUNDS:
            return order
        return [c for i, c in enumerate(order) if i % peers.world_size == peers.rank or c in self._entry.must]

    def _expected_cost_s(self, config: TileConfig, samples: int) -> float:
        known_s = self._sampling.cost_s(config)
        if known_s is None:
            # The median: the first config of each weight layout packs for all that follow it.
            return median(self._first_costs_s) if self._first_costs_s else 0.0
        return known_s * samples

    def _compile(self, config: TileConfig, following: Sequence[TileConfig]) -> None:
        """Have the next few that are to be checked compiled at once, `config` first, where the measurer can do that."""
        compile_all = getattr(self._session.measurer, "compile", None)
        if compile_all is None or config in self._compiled:
            return
        self._catch_up()
        at_once = COMPILED_AT_ONCE if math.isinf(self._deadline) else COMPILED_IN_A_BUDGET
        fresh = [c for c in following if c not in self._passed and c not in self._compiled][:at_once]
        if config not in fresh:
            return
        start = time.monotonic()
        try:
            compile_all(self._gemm, fresh)
        except DeviceError:
            raise
        except Exception as error:  # One that ends the compiler ends it again, when it is checked alone.
            logger.debug("compiling %d configs at once failed: %s", len(fresh), error)
        each_s = (time.monotonic() - start) / len(fresh)
        self._compiled |= dict.fromkeys(fresh, each_s)

    def _check(self, config: TileConfig) -> Verdict | None:
        """Run the gate if the config was not checked before: a verdict, or None for one that passed it earlier."""
        self._catch_up()
        if config in self._passed:
            return None
        start = time.monotonic()
        ahead = self._session.ahead
        refused = None if ahead is None else ahead.wait(self._gemm, config)
        if refused is not None:
            return Verdict(status="compile_error", detail=refused)
        twin = self._twin(config)
        if twin is not None:
            return Verdict(status="duplicate", detail=f"its launches are those of {twin.label}")
        try:
            return self._session.measurer.check(self._gemm, self._tokens, config)
        except DeviceError:
            # Nothing is known of the config: measuring itself does not work.
            raise
        except Exception as error:  # Whatever a kernel raises is evidence about it, not the end of tuning.
            status, detail = failure(error)
            return Verdict(status=status, detail=detail)
        finally:
            self._first_costs_s.append(time.monotonic() - start + self._compiled.get(config, 0.0))

    def _twin(self, config: TileConfig) -> TileConfig | None:
        """Return a config that ran here with the very same machine code, unless `config` has to run itself."""
        ahead = self._session.ahead
        code = None if ahead is None else ahead.code(self._gemm, config)
        if code is None:
            return None
        own, first = self._by_config[config], self._coded.setdefault(code, config)
        twin = self._by_config[first]
        alike = (own.numerics, own.layout, own.order) == (twin.numerics, twin.layout, twin.order)
        return first if alike and first in self._passed and config not in self._entry.must else None

    def _catch_up(self) -> None:
        """Take in what was measured since the last call: this is asked after every measurement."""
        known = self._session.known.get((self._gemm, self._tokens), {})
        for m in islice(known.values(), self._read, None):
            if m.samples_us and not breaks_class(m):
                self._last_us[m.config] = m.p50_us
            if m.status == "ok" and m.rank == self._session.peers.rank:
                self._passed.add(m.config)
        self._read = len(known)

    def _state(self, number: int, alive: int, part: float) -> RaceState:
        self._catch_up()
        own = self._last_us
        default = self._entry.candidates[0].config
        # Round 0 takes about half of a race: whoever starts is checked and sampled.
        done = 0.5 * part if number == 0 else 0.5 + 0.5 * (number - 1 + part) / max(1, self._strategy.rounds - 1)
        return RaceState(
            round=number,
            alive=alive,
            best_us=min(own.values(), default=None),
            default_us=own.get(default),
            done=done,
            cut=self._cut,
        )

"""Why a decision is what it is, from the measurements alone: who ran, who was cut when and why, who won by how much.

Pure functions: no device, no clock. Whatever they return can be computed again from the decisions and measurements
of one exported file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tilecast.autotune.fates import Entrant, Standing, entrants
from tilecast.autotune.prescreen import Candidate, describe
from tilecast.autotune.reproducibility import ReproducibilityCost, reproducibility_cost
from tilecast.autotune.select import Evidence, Group, bucket_weights, choose_pair, group_call_us
from tilecast.autotune.timing import Pool, breaks_class, moments_apart, pooled
from tilecast.environment import Environment
from tilecast.errors import ConfigError, CoverageError, DeviceError, InputError
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.kernels.spec import Registry, outside_domain
from tilecast.problem import ExpertGemm, GemmName, TileConfig
from tilecast.store import Store

SAME = 1e-9
"""Relative difference within which a stored time is the one computed again."""
GEMMS: tuple[GemmName, GemmName] = ("up", "down")


@dataclass(frozen=True, kw_only=True)
class GemmRace:
    """One GEMM's race in the run that decided.

    `rounds` is the number of rounds that any config ran in, `ranks` how many measured; the entrants are in the
    order of their times, failures last. `as_stored`: whether the times stored with the choice are the ones that
    these measurements give. `groups` are the times of a call of each layout and class over all buckets. `drift` is how
    far apart the levels of moments were, which were taken out of all samples.
    """

    gemm: ExpertGemm
    choice: Choice
    run: int
    ranks: int
    rounds: int
    entrants: tuple[Entrant, ...]
    drift: float
    as_stored: bool
    groups: Mapping[Group, float]
    group: Group | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A decision with its races (none without measurements) and what reproducibility costs its layer.

    `repeated`: whether choosing again from these measurements gives the decision; None where that cannot be told.
    `notes` say what is missing and why.
    """

    decision: Decision
    races: tuple[GemmRace, ...]
    cost: ReproducibilityCost | None
    repeated: bool | None
    notes: tuple[str, ...]


def series_of(decision: Decision, table: TuningTable) -> tuple[Decision, ...]:
    """Return the decisions that were made together with one, itself included, by bucket."""
    return tuple(d for d in table.decisions if d.sort_key[:4] == decision.sort_key[:4])


def deciding_run(measurements: Iterable[Measurement], choice: Choice) -> int | None:
    """Return the run a choice was made from, of the measurements of its GEMM, tokens and routing profile.

    The latest that gives the stored times; else the latest in which the default ran on every rank, None without.
    """
    return _deciding(measurements, choice)[0]


def _deciding(measurements: Iterable[Measurement], choice: Choice) -> tuple[int | None, list[Measurement], Pool]:
    """Return what `deciding_run` does, that run's measurements, and them pooled."""
    runs: dict[int, list[Measurement]] = {}
    for m in measurements:
        runs.setdefault(m.run, []).append(m)
    latest: tuple[int | None, list[Measurement], Pool] = (None, [], Pool({}, {}, {}))
    for run in sorted(runs, reverse=True):
        found = pooled(runs[run])
        timings = found.timings
        if choice.default not in timings:
            continue
        if choice.config in timings and _same(timings[choice.config].p50_us, choice.p50_us):
            return run, runs[run], found
        latest = (run, runs[run], found) if latest[0] is None else latest
    return latest


def deciding_times(decision: Decision, name: GemmName, measurements: Iterable[Measurement]) -> dict[TileConfig, float]:
    """Return the times in µs of all configs that ran well in the run that one of a decision's choices was made from."""
    gemm, tokens = ExpertGemm(layer=decision.layer, name=name), decision.bucket.tokens
    mine = [m for m in measurements if _belongs(m, decision) and (m.gemm, m.tokens) == (gemm, tokens)]
    _, _, found = _deciding(mine, decision.choice(name))
    return {config: timing.p50_us for config, timing in found.timings.items()}


def deciding_measurements(table: TuningTable, store: Store) -> list[Measurement]:
    """Return what the decisions of a table rest on: their runs' measurements, and every class found broken."""
    found: dict[str, Measurement] = {}
    for decision in table.decisions:
        for name in GEMMS:
            gemm = ExpertGemm(layer=decision.layer, name=name)
            held = store.measurements(environment=decision.environment, gemm=gemm, routing=decision.routing)
            mine = [m for m in held if m.tokens == decision.bucket.tokens]
            run = deciding_run(mine, decision.choice(name))
            found |= {m.key: m for m in held if breaks_class(m)}
            found |= {m.key: m for m in mine if m.run == run}
    return list(found.values())


def explain(
    decision: Decision,
    series: Sequence[Decision],
    measurements: Sequence[Measurement],
    environment: Environment,
    registry: Registry | None,
    *,
    weights: Mapping[int, float] | None = None,
) -> Explanation:
    """Explain a decision of `series`, the ones made together with it, by `measurements`.

    `registry` tells layout and order of configs; None where the kernels here are not those that were measured.
    `weights` are token counts' shares of the calls, the ones that were decided with. Raises InputError for weights
    that no bucket has a share of.
    """
    shares = None if weights is None else bucket_weights(weights, [d.bucket for d in series])
    of_layer = [m for m in measurements if _belongs(m, decision)]
    sides = {name: _Side.of(name, series, of_layer, environment, registry) for name in GEMMS}
    at = list(series).index(decision)
    if any(side.evidence[at] is None for side in sides.values()):
        note = "the table holds no measurements of this decision: only what the decision itself keeps can be shown"
        return Explanation(decision=decision, races=(), cost=None, repeated=None, notes=(note,))
    notes: list[str] = []
    if registry is None:
        notes.append("made by other kernel sources than these: layouts and orders of configs are not known here")
    whole = registry is not None and all(side.is_whole for side in sides.values())
    if registry is not None and not whole:
        notes.append(
            "the table lacks measurements of other buckets of this layer, or has configs that no kernel here knows: "
            "classes are not compared"
        )
    chosen = _choose_again(sides, decision, shares) if whole else None
    cost = _cost(sides, series, shares, notes) if whole and decision.policy == "reproducible" else None
    races = tuple(side.race(at, decision, shares if whole else None, whole) for side in sides.values())
    repeated = None if chosen is None else _equal(chosen[0][at], decision.up) and _equal(chosen[1][at], decision.down)
    return Explanation(decision=decision, races=races, cost=cost, repeated=repeated, notes=tuple(notes))


def table_costs(
    table: TuningTable,
    measurements: Sequence[Measurement],
    registry: Registry,
    *,
    weights: Mapping[int, float] | None = None,
) -> dict[tuple[str, ...], ReproducibilityCost]:
    """Return the cost of reproducibility of each series of `reproducible` decisions, by `Decision.sort_key[:4]`.

    A series whose measurements are not all there, or that `weights` give no share to, is left out.
    """
    environments = {e.digest: e for e in table.environments}
    by_series: dict[tuple[str, ...], list[Decision]] = {}
    for d in table.decisions:
        if d.policy == "reproducible":
            by_series.setdefault(d.sort_key[:4], []).append(d)
    found = {}
    for key, series in by_series.items():
        of_layer = [m for m in measurements if _belongs(m, series[0])]
        place = environments[series[0].environment]
        sides = {name: _Side.of(name, series, of_layer, place, registry) for name in GEMMS}
        if all(side.is_whole for side in sides.values()):
            try:
                shares = None if weights is None else bucket_weights(weights, [d.bucket for d in series])
            except InputError:
                continue  # Decisions that were there before, for token counts that the weights say nothing of.
            cost = _cost(sides, series, shares, [])
            if cost is not None:
                found[key] = cost
    return found


@dataclass(frozen=True)
class _Side:
    """One GEMM of a series: for each bucket the evidence of the run that decided, None without measurements."""

    gemm: ExpertGemm
    evidence: Sequence[Evidence | None]
    raced: Sequence[tuple[Sequence[Measurement], Pool]]
    excluded: frozenset[TileConfig]

    @property
    def is_whole(self) -> bool:
        """Whether every bucket is measured, its default of a known group."""
        return all(e is not None and e.default in e.candidates for e in self.evidence)

    @classmethod
    def of(
        cls,
        name: GemmName,
        series: Sequence[Decision],
        measurements: Sequence[Measurement],
        environment: Environment,
        registry: Registry | None,
    ) -> _Side:
        gemm = ExpertGemm(layer=series[0].layer, name=name)
        mine = [m for m in measurements if m.gemm.name == name]
        # Nearly all that are equal are one object, which is told apart faster.
        configs = set({id(m.config): m.config for m in mine}.values())
        candidates = _candidates(gemm, configs, environment, registry)
        evidence: list[Evidence | None] = []
        raced = []
        held: dict[int, list[Measurement]] = {}
        for m in mine:
            held.setdefault(m.tokens, []).append(m)
        for decision in series:
            choice = decision.choice(name)
            run, of_run, found = _deciding(held.get(decision.bucket.tokens, ()), choice)
            raced.append((of_run, found))
            evidence.append(
                None
                if run is None or choice.config not in found.timings
                else Evidence(
                    gemm=gemm, bucket=decision.bucket, default=choice.default, candidates=candidates,
                    timings=found.timings, failures=found.failures,
                )
            )  # fmt: skip
        return cls(gemm, evidence, raced, frozenset(m.config for m in mine if breaks_class(m)))

    def race(self, at: int, decision: Decision, shares: Sequence[float] | None, whole: bool) -> GemmRace:
        e = self.evidence[at]
        assert e is not None
        raced, found = self.raced[at]
        measured = [m for m in raced if not breaks_class(m)]
        choice = decision.choice(self.gemm.name)
        standing = Standing(choice=choice, policy=decision.policy, candidates=e.candidates, excluded=self.excluded)
        return GemmRace(
            gemm=self.gemm,
            choice=choice,
            run=measured[0].run,
            ranks=len({m.rank for m in measured}),
            rounds=len({m.round for m in measured}),
            entrants=entrants(measured, standing, found),
            drift=moments_apart(measured),
            as_stored=_as_stored(e, choice),
            groups=self._groups(decision.policy, shares) if whole else {},
            group=standing.group,
        )

    def _groups(self, policy: str, shares: Sequence[float] | None) -> dict[Group, float]:
        try:
            return group_call_us(_known(self), policy, excluded=self.excluded, weights=shares)
        except DeviceError:
            return {}  # Buckets that were tuned apart may have no group in common.


def _candidates(
    gemm: ExpertGemm, configs: Iterable[TileConfig], environment: Environment, registry: Registry | None
) -> dict[TileConfig, Candidate]:
    found: dict[TileConfig, Candidate] = {}
    for config in configs if registry is not None else ():
        assert registry is not None
        try:
            if outside_domain(registry[config.kernel], config) is None:
                found[config] = describe(gemm, config, environment, registry)
        except ConfigError:
            continue  # A kernel that is not registered here: its timings are shown, its group is not known.
    return found


def _choose_again(
    sides: Mapping[GemmName, _Side], decision: Decision, shares: Sequence[float] | None
) -> tuple[tuple[Choice, ...], tuple[Choice, ...]] | None:
    up, down = (_known(sides[name]) for name in GEMMS)
    try:
        return choose_pair(
            up, down, decision.policy, weights=shares,
            excluded_up=sides["up"].excluded, excluded_down=sides["down"].excluded,
        )  # fmt: skip
    except (CoverageError, DeviceError):
        return None


def _cost(
    sides: Mapping[GemmName, _Side], series: Sequence[Decision], shares: Sequence[float] | None, notes: list[str]
) -> ReproducibilityCost | None:
    try:
        return reproducibility_cost(
            _known(sides["up"]), _known(sides["down"]), series[0].up.config, series[0].down.config,
            excluded_up=sides["up"].excluded, excluded_down=sides["down"].excluded, weights=shares,
        )  # fmt: skip
    except InputError as error:
        notes.append(f"the cost of reproducibility is not known: {error}")
        return None


def _known(side: _Side) -> list[Evidence]:
    return [e for e in side.evidence if e is not None]


def _belongs(m: Measurement, decision: Decision) -> bool:
    return (m.environment, m.gemm.layer, m.routing) == (decision.environment, decision.layer, decision.routing)


def _as_stored(e: Evidence, choice: Choice) -> bool:
    pairs = [(choice.config, choice.p50_us), (choice.default, choice.default_us)]
    if choice.runner_up is not None and choice.runner_up_us is not None:
        pairs.append((choice.runner_up, choice.runner_up_us))
    return all(config in e.timings and _same(e.timings[config].p50_us, us) for config, us in pairs)


def _equal(a: Choice, b: Choice) -> bool:
    return (a.config, a.default, a.runner_up) == (b.config, b.default, b.runner_up) and _same(a.p50_us, b.p50_us)


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= SAME * abs(b)

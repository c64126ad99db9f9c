"""How a decision's explanation is printed, and its JSON form; and the lines on what reproducibility costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.table import Table

from tilecast.autotune.explain import GEMMS, Explanation, GemmRace
from tilecast.autotune.fates import Entrant
from tilecast.autotune.reproducibility import Cost, ReproducibilityCost
from tilecast.canonical import Json
from tilecast.cli._output import Output, add_row, microseconds, percent, plural, table
from tilecast.cli._peers import PeerTime, peer_lines
from tilecast.cli._tables import config_text, decision_json, span_text
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.problem import tokens_text

ENTRANTS = ("#", "rounds", "samples", "p20 µs", "p50 µs", "p80 µs", "what became of it", "config")
COSTS = ("tokens", "class µs", "one layout µs", "free µs", "bits", "layout", "total", "noise")
GROUPS = ("call µs", "class", "layout", "")

Costs = Mapping[tuple[str, ...], ReproducibilityCost]
"""Costs by the series that a decision belongs to, `Decision.sort_key[:4]`."""


def show_explanation(
    output: Output, explanation: Explanation, peers: Sequence[PeerTime] = (), *, entrants: int | None = None
) -> None:
    """Print an explanation for people; `peers` are what other engines would run.

    Of each race the `entrants` fastest are shown, those that the choice names, and how many there are besides; None
    is for all of them.
    """
    if output.json_wanted or output.quiet:
        return
    decision = explanation.decision
    output.show(f"{decision.layer.label}, {span_text(decision)}, {decision.policy}, routing {decision.routing}, "
                f"certificate: {decision.certificate}")  # fmt: skip
    if not explanation.races:
        for name in GEMMS:
            output.show(*_choice_lines(name, decision.choice(name)), *peer_lines(peers, name))
    for race in explanation.races:
        output.heading(_race_title(race, decision))
        output.show(*_choice_lines(race.gemm.name, race.choice), *peer_lines(peers, race.gemm.name))
        output.show(
            f"  meanwhile the machine's own speed varied by {percent(race.drift)} (10th to 90th percentile of the "
            "moments), which is taken out of what is compared and not in its noise"
        )
        shown = _shown(race, entrants)
        output.show(_entrant_table(race, shown))
        if len(shown) < len(race.entrants):
            output.show(f"and {plural(len(race.entrants) - len(shown), 'config')} more: --all or --json shows them")
        if len(race.groups) > 1:
            output.show(_group_table(race))
    if explanation.cost is not None:
        output.show(cost_table(decision.layer.label, explanation.cost))
    if explanation.repeated is not None:
        result = "gives this decision" if explanation.repeated else "does NOT give this decision"
        output.show(f"choosing again from these measurements {result}")
    for note in explanation.notes:
        output.warn(note)


def _race_title(race: GemmRace, decision: Decision) -> str:
    text = f"{race.gemm.name}: {plural(len(race.entrants), 'config')} in {plural(race.rounds, 'round')}, "
    text += f"run {race.run}, {plural(race.ranks, 'rank')}, timed at {tokens_text(decision.bucket.tokens)}"
    return text if race.as_stored else f"{text}; the decision stores OTHER times"


def _choice_lines(name: str, choice: Choice) -> list[str]:
    kept = choice.config == choice.default
    lines = [
        f"{name}: {'the default is kept' if kept else 'chosen'}: {config_text(choice.config)}",
        f"  {microseconds(choice.p50_us)} µs; default {microseconds(choice.default_us)} µs "
        f"({choice.default_us / choice.p50_us:.3f}×); to be exceeded: noise of {percent(choice.noise)}; "
        f"class {choice.numerics[:8] or '—'}",
    ]
    if choice.runner_up is not None:
        ahead = percent(choice.margin, sign=True)
        lines.append(f"  runner-up {microseconds(choice.runner_up_us)} µs ({ahead}): {config_text(choice.runner_up)}")
    return lines


def _shown(race: GemmRace, most: int | None) -> dict[int, Entrant]:
    """Return entrants by place, from 1."""
    named = (race.choice.config, race.choice.default, race.choice.runner_up)
    every = enumerate(race.entrants, start=1)
    return {place: e for place, e in every if most is None or place <= most or e.config in named}


def _entrant_table(race: GemmRace, shown: Mapping[int, Entrant]) -> Table:
    kernels = {e.config.kernel for e in race.entrants}
    result = table("", ENTRANTS, left=("what became of it", "config"))
    for place, e in shown.items():
        default = e.config == race.choice.default and e.fate != "chosen"
        add_row(
            result, str(place), str(e.last_round + 1), str(e.samples), microseconds(e.p20_us), microseconds(e.p50_us),
            microseconds(e.p80_us), ("default; " if default else "") + _became(e),
            config_text(e.config, kernel=len(kernels) > 1), style="bold" if e.fate == "chosen" else None,
        )  # fmt: skip
    return result


def _became(entrant: Entrant) -> str:
    return f"{entrant.fate}: {entrant.reason}"


def _group_table(race: GemmRace) -> Table:
    result = table(f"{race.gemm.name}: a call over all buckets, by class", GROUPS, left=("class", "layout", ""))
    for group, us in sorted(race.groups.items(), key=lambda item: (item[1], item[0])):
        layout, *numerics = group
        chosen = "the layer's" if group == race.group else ""
        add_row(result, microseconds(us), numerics[0][:8] if numerics else "any", layout, chosen)
    return result


def cost_table(label: str, cost: ReproducibilityCost) -> Table:
    """Return a row for each bucket and one over all."""
    result = table(f"{label}: cost of reproducibility", COSTS)
    for each in (*cost.buckets, cost.overall):
        add_row(
            result, "overall" if each.tokens is None else str(each.tokens), microseconds(each.class_us),
            microseconds(each.layout_us), microseconds(each.free_us), _factor(each.bits), _factor(each.layout),
            _factor(each.total), percent(each.noise), style="bold" if each.tokens is None else None,
        )  # fmt: skip
    return result


def cost_lines(costs: Costs, table: TuningTable) -> list[str]:
    """Return one line for each series of decisions: the overall cost of reproducibility, and the worst bucket's."""
    lines = []
    for key, layer in {d.sort_key[:4]: d.layer for d in table.decisions}.items():
        if (cost := costs.get(key)) is not None:
            worst = max(cost.buckets, key=lambda c: c.total)
            lines.append(
                f"cost of reproducibility, {layer.label}: {_factor(cost.overall.total)} overall "
                f"(bits {_factor(cost.overall.bits)}, one layout {_factor(cost.overall.layout)}, noise "
                f"{percent(cost.overall.noise)}), at most {_factor(worst.total)} at {tokens_text(worst.tokens or 0)}"
            )
    return lines


def costs_json(costs: Costs, table: TuningTable) -> list[Json]:
    """Return the costs of each series of decisions that has them."""
    series: dict[tuple[str, ...], Decision] = {}
    for d in table.decisions:
        series.setdefault(d.sort_key[:4], d)
    return [
        {"layer": d.layer.label, "layer_digest": d.layer.digest, "environment": d.environment, "routing": d.routing,
         **cost_json(costs[key])}
        for key, d in series.items() if key in costs
    ]  # fmt: skip


def cost_json(cost: ReproducibilityCost) -> dict[str, Json]:
    """Return the cost in every bucket and over all."""
    return {"buckets": [_one_cost(c) for c in cost.buckets], "overall": _one_cost(cost.overall)}


def _one_cost(cost: Cost) -> dict[str, Json]:
    return {**asdict(cost), "bits": cost.bits, "layout": cost.layout, "total": cost.total}


def explanation_json(explanation: Explanation) -> dict[str, Json]:
    """Return all of an explanation."""
    return {
        "decision": decision_json(explanation.decision),
        "races": [_race_json(race) for race in explanation.races],
        "reproducibility": None if explanation.cost is None else cost_json(explanation.cost),
        "repeated": explanation.repeated,
        "notes": list(explanation.notes),
    }


def _race_json(race: GemmRace) -> dict[str, Json]:
    return {
        "gemm": race.gemm.name,
        "run": race.run,
        "ranks": race.ranks,
        "rounds": race.rounds,
        "drift": race.drift,
        "as_stored": race.as_stored,
        "entrants": [_entrant_json(e) for e in race.entrants],
        "groups": [
            {"layout": group[0], "numerics": group[1] if len(group) > 1 else None, "call_us": us,
             "chosen": group == race.group}
            for group, us in race.groups.items()
        ],
    }  # fmt: skip


def _entrant_json(entrant: Entrant) -> dict[str, Json]:
    # Not `asdict`, which copies each value: there are hundreds of entrants.
    return {**vars(entrant), "config": entrant.config.to_json()}


def _factor(value: float) -> str:
    return f"{value:.3f}×"

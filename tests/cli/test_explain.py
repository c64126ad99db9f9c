"""`tilecast cache explain` on measurements made up here, and on a real, short tuning."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from statistics import median

import pytest

from tests.cli.conftest import LAYER, SPEC, Command, table_of
from tilecast.autotune.decide import decide
from tilecast.autotune.explain import table_costs
from tilecast.autotune.plan import make_plan
from tilecast.autotune.prescreen import anchors, prescreen
from tilecast.autotune.timing import moments_apart
from tilecast.cache_store.bundle import export_table, read_bundle
from tilecast.cache_store.memory import MemoryStore
from tilecast.cli import cache_explain
from tilecast.cli._explained import cost_lines
from tilecast.environment import cpu_environment
from tilecast.evidence import Measurement, TuningTable
from tilecast.kernels import registry
from tilecast.problem import ExpertLayer

TOKENS = (1, 4)
HERE = cpu_environment()
PLAN = make_plan([LAYER], TOKENS, HERE)


def measurements() -> list[Measurement]:
    """Return a race of twelve configs for each GEMM and bucket: the n-th is n % slower than the first."""
    found = []
    for gemm, bucket in PLAN.tasks:
        held = anchors(gemm, TOKENS, HERE, registry)
        screened = prescreen(gemm, bucket.tokens, HERE, registry, anchors=held)
        must = [c for c in screened.candidates if c.is_default or c.is_anchor]
        few = list(dict.fromkeys([*must, *islice(screened.candidates, 12)]))
        for place, candidate in enumerate(few):
            us = 100.0 + 5 * (len(few) - place)
            found += [
                Measurement(
                    environment=HERE.digest, gemm=gemm, tokens=bucket.tokens, config=candidate.config,
                    numerics=candidate.numerics, round=r, samples_us=tuple(us + 0.1 * i for i in range(6)),
                )
                for r in range(1 if place == 5 else 3)
            ]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = MemoryStore()
    store.add_environment(HERE)
    store.add_measurements(measurements())
    file = tmp_path_factory.mktemp("raced") / "raced.db"
    export_table(decide(PLAN, store, registry, verify=False), file, store.measurements())
    return file


def test_the_race_is_printed_and_recomputable_from_the_file(cli: Command, raced: Path) -> None:
    done = cli("cache", "explain", raced, SPEC, "3", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["decision"]["tokens"] == 4 and document["repeated"] is True and document["notes"] == []
    bundle = read_bundle(raced, measurements=True)
    for race in document["races"]:
        assert race["as_stored"] and race["rounds"] == 3
        mine = [m for m in bundle.measurements if (m.gemm.name, m.tokens) == (race["gemm"], 4)]
        assert race["drift"] == pytest.approx(moments_apart(mine)) and race["drift"] >= 0
        for entrant in race["entrants"]:
            samples = [
                us for m in bundle.measurements for us in m.samples_us
                if (m.gemm.name, m.tokens) == (race["gemm"], 4) and m.config.to_json() == entrant["config"]
            ]  # fmt: skip
            assert entrant["p50_us"] == pytest.approx(median(samples)) and entrant["samples"] == len(samples)
        fates = [e["fate"] for e in race["entrants"]]
        assert fates.count("chosen") == 1 and {"cut", "left out"} & set(fates)
    overall = document["reproducibility"]["overall"]
    assert overall["total"] == pytest.approx(overall["class_us"] / overall["free_us"]) and overall["total"] >= 1


def test_people_read_it_as_tables(cli: Command, raced: Path) -> None:
    done = cli("cache", "explain", raced, "1", "1")
    assert done.code == 0 and done.err == "" and f"{LAYER.label}, 1 token, " in done.out
    for text in ("up: ", "down: ", "chosen: ", "runner-up", "cost of reproducibility", "overall", "p20 µs"):
        assert text in done.out, text
    assert "choosing again from these measurements gives this decision" in done.out


@pytest.mark.parametrize("layer", ["1", "H64 I96", LAYER.digest[:8], SPEC, LAYER.label])
def test_a_layer_has_many_names(cli: Command, raced: Path, layer: str) -> None:
    done = cli("cache", "explain", raced, layer, "1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["decision"]["layer_digest"] == LAYER.digest


def test_tune_sums_the_cost_up_in_a_line_per_layer(raced: Path) -> None:
    bundle = read_bundle(raced, measurements=True)
    costs = table_costs(bundle.table, bundle.measurements, registry)
    (line,) = cost_lines(costs, bundle.table)
    (cost,) = costs.values()
    assert f"{LAYER.label}: {cost.overall.total:.3f}× overall (bits {cost.overall.bits:.3f}×" in line
    assert line.endswith((" at 1 token", " at 4 tokens"))
    assert cost_lines({}, bundle.table) == []


def test_weights_move_the_overall_cost_alone(cli: Command, raced: Path) -> None:
    flat, weighted = (
        json.loads(cli("cache", "explain", raced, "1", "1", "--json", *more).out)["reproducibility"]
        for more in ((), ("--weights", "1=0.9,4=0.1"))
    )
    assert flat["buckets"] == weighted["buckets"]
    mean = 0.9 * flat["buckets"][0]["class_us"] + 0.1 * flat["buckets"][1]["class_us"]
    assert weighted["overall"]["class_us"] == pytest.approx(mean)


def test_a_table_without_measurements_shows_what_the_decision_holds(cli: Command, table: Path) -> None:
    done = cli("cache", "explain", table, "1", "4")
    assert done.code == 0
    assert "80.0 µs; default 100 µs (1.250×)" in done.out
    (line,) = done.err.splitlines()
    assert "no measurements" in line
    assert json.loads(cli("cache", "explain", table, "1", "4", "--json").out)["races"] == []


def test_the_default_store_has_a_short_name(cli: Command, table: Path) -> None:
    assert cli("cache", "import", table).code == 0
    assert cli("cache", "explain", "store", SPEC, "1").code == 0


def test_wrong_questions_are_one_line(cli: Command, table: Path, tmp_path: Path) -> None:
    ask = ("cache", "explain")
    cli(*ask, table, "1", "9").failed(4, "no decision", "9 tokens", "1, 4")
    cli(*ask, table, "E=4,H=64,I=128,k=2", "1").failed(3, "is no layer of", "1: E4 H64 I96")
    cli(*ask, table, "nonsense", "1").failed(3, "'nonsense' is no layer of")
    cli(*ask, table, "7", "1").failed(3, "is no layer of")
    cli(*ask, table, "1", "1", "--policy", "fastest").failed(4, "no decision of this layer")
    cli(*ask, table, "1", "1", "--policy", "best").failed(2, "--policy", "reproducible, fastest")
    cli(*ask, table, "1", "1", "--weights", "1:3").failed(2, "--weights", "1:3")
    cli(*ask, table, "1", "1", "--environment", "").failed(2, "--environment", "''")
    cli(*ask, tmp_path / "none.db", "1", "1").failed(3, "none.db")
    both = tmp_path / "both.db"
    other = table_of(LAYER.__class__(hidden=64, intermediate=128, experts=4, top_k=2))
    export_table(table_of().merged(other), both)
    cli(*ask, both, "H64", "1").failed(3, "matches 2 layers", "I96", "I128")


def test_what_tune_exports_explains_itself(cli: Command, tmp_path: Path) -> None:
    file = tmp_path / "tuned.db"
    line = ["tune", SPEC, "--tokens", "1,4", "--budget", "3s", "--store", tmp_path / "s.db", "--export", file, "--json"]
    done = cli(*line)
    assert done.code == 0, done.err
    (cost,) = json.loads(done.out)["reproducibility"]
    assert cost["layer_digest"] == LAYER.digest and cost["overall"]["total"] >= 1
    document = json.loads(cli("cache", "explain", file, SPEC, "2", "--json").out)
    assert document["repeated"] is True and all(race["as_stored"] for race in document["races"])
    assert document["reproducibility"]["overall"] == cost["overall"]


def test_of_many_configs_the_fastest_are_printed_and_those_the_choice_names(
    cli: Command, raced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_explain, "SHOWN", 2)
    every = json.loads(cli("cache", "explain", raced, "1", "4", "--json").out)["races"]
    few, whole = cli("cache", "explain", raced, "1", "4").out, cli("cache", "explain", raced, "1", "4", "--all").out
    assert "more: --all or --json shows them" in few and "--all" not in whole
    assert all(len(race["entrants"]) > 5 for race in every)
    # Rows begin with a number; the lines that long configs are folded into do not.
    rows = [len(re.findall(r"^│ +\d+ │", text, re.MULTILINE)) for text in (few, whole)]
    assert rows[1] - rows[0] == sum(map(int, re.findall(r"and (\d+) configs? more", few))) > 0
    assert "default; " in few or "the default is kept" in few


def test_an_error_names_some_of_many_layers_in_one_line(cli: Command, tmp_path: Path) -> None:
    layers = [ExpertLayer(hidden=64, intermediate=96, experts=4 + n, top_k=2) for n in range(40)]
    tables = [table_of(layer) for layer in layers]
    file = tmp_path / "many.db"
    export_table(TuningTable((HERE,), tuple(d for table in tables for d in table.decisions)), file)
    done = cli("cache", "explain", file, "no such layer", "1")
    assert done.code == 3 and "and 32 more, which `tilecast cache show` lists" in done.err
    assert len(done.err.splitlines()) == 1 and len(done.err) < 1000
    several = cli("cache", "explain", file, "E4", "1").err
    assert "matches 5 layers" in several and "more" not in several and several.count("E4") == 6

"""The commands for many tables: merge, diff, gc, verify, coverage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import LAYER, SPEC, Command, choice_of, table_of
from tilecast.autotune.routing_profiles import load_profile
from tilecast.cache_store.bundle import adopt, export_table, import_table, read_bundle
from tilecast.cache_store.store import open_store
from tilecast.environment import cpu_environment
from tilecast.evidence import Measurement, TuningTable


@pytest.fixture
def faster(tmp_path: Path) -> Path:
    """A table like `table` whose configs differ, and win by more."""
    base = table_of()
    decisions = []
    for d in base.decisions:
        up = replace(d.up, config=d.up.config.with_params(block_n=128), p50_us=50.0)
        decisions.append(replace(d, up=up, down=replace(d.down, p50_us=50.0)))
    path = tmp_path / "faster.db"
    export_table(TuningTable(base.environments, tuple(decisions)), path)
    return path


def test_merge_settles_conflicts_and_says_how(cli: Command, table: Path, faster: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.db"
    done = cli("cache", "merge", table, faster, "--out", out)
    assert done.code == 0, done.err
    assert done.out.count("theirs kept: faster by 60.0%") == 2
    assert "2 conflicts" in done.out.splitlines()[-1]
    assert import_table(out) == import_table(faster)
    document = json.loads(cli("cache", "merge", table, faster, "--out", out, "--policy", "ours", "--json").out)
    assert [c["kept"] for c in document["conflicts"]] == ["ours", "ours"]
    assert import_table(out) == import_table(table)


def test_merge_refuses_in_one_line(cli: Command, table: Path, faster: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.db"
    cli("cache", "merge", table, faster, "--out", out, "--policy", "error").failed(3, "both tables decide", "1 more")
    cli("cache", "merge", table, "--out", table).failed(3, "one of the inputs")
    cli("cache", "merge", table, "--out", out, "--policy", "luck").failed(2, "'luck'", "newest")
    cli("cache", "merge", table, tmp_path / "none.db", "--out", out).failed(3, "none.db")
    assert not out.exists()


def test_diff_shows_layers_and_buckets(cli: Command, table: Path, faster: Path) -> None:
    assert cli("cache", "diff", table, table, "--exit-code").code == 0
    done = cli("cache", "diff", table, faster)
    assert done.code == 0
    assert "-37.5%" in done.out
    assert "0 buckets the same, 2 differ" in done.out
    done = cli("cache", "diff", table, faster, "--exit-code", "--json")
    assert done.code == 1
    assert done.err == ""
    found = json.loads(done.out)["differences"]
    assert [(d["kind"], d["tokens"], d["beyond_noise"]) for d in found] == [("config", 1, True), ("config", 4, True)]


def test_diff_names_what_changed_on_the_machine(cli: Command, table: Path, tmp_path: Path) -> None:
    older = tmp_path / "older.db"
    export_table(table_of(torch="1.0.0"), older)
    done = cli("cache", "diff", older, table)
    assert "torch: '1.0.0' in A" in done.out
    assert "2 buckets the same, 0 differ" in done.out


def test_gc_says_what_goes(cli: Command, tmp_path: Path) -> None:
    store = tmp_path / "store.db"
    here = cpu_environment()
    base = table_of()
    config = base.decisions[0].up.config
    made = [
        Measurement(environment=here.digest, gemm=LAYER.up, tokens=1, config=config, samples_us=(1.0,), measured_at=1.0)
    ]
    export_table(base, tmp_path / "table.db", made)
    with open_store(store) as opened:
        adopt(read_bundle(tmp_path / "table.db", measurements=True), opened)
    done = cli("cache", "gc", store, "--older-than", "90d", "--dry-run")
    assert done.code == 0, done.err
    assert "would go: E4 H64 I96 top2 bf16, 1 token, " in done.out
    assert "1 decision of unknown age kept" in done.err
    document = json.loads(cli("cache", "gc", store, "--older-than", "90d", "--json").out)
    assert (len(document["decisions"]), document["measurements"]) == (1, 1)
    assert len(import_table(store)) == 1
    cli("cache", "gc", store).failed(2, "--older-than, --environment or --superseded")
    cli("cache", "gc", store, "--older-than", "soon").failed(2, "'soon'", "90d")
    cli("cache", "gc", tmp_path / "none.db", "--superseded").failed(3, "there is no store")


def test_coverage_lists_gaps_and_exits_with_4(cli: Command, table: Path) -> None:
    assert cli("cache", "coverage", SPEC, table, "--tokens", "1,3").code == 0
    done = cli("cache", "coverage", SPEC, table, "--tokens", "1,3,9", "--json")
    assert done.code == 4
    line = done.err.splitlines()[-1]
    assert "lacks 1 of 3 points" in line
    assert f"tilecast tune {SPEC} --tokens 1,3,9 --policy reproducible" in line
    points = json.loads(done.out)["points"]
    assert [(p["tokens"], p["by"], p["bucket"]) for p in points] == [
        (1, "exact", [1, 1]), (3, "bucket", [2, 4]), (9, "default", None),
    ]  # fmt: skip
    assert points[-1]["reasons"] == ["no decision covers 9 tokens; covered: 1…4"]
    assert cli("cache", "coverage", SPEC, table, "--tokens", "2", "--reach", "1.5").code == 4


@pytest.mark.parametrize(
    ("own", "options", "hint"),
    [
        ("uniform", ("--routing", "zipf:1.2"), " --routing zipf:1.2 "),
        ("uniform+sparsity:0.9", (), " --routing uniform+sparsity:0.9 "),
        ("histogram:5b0c", (), " --routing FILE "),
        ("zipf:1.2", ("--routing", "uniform"), ""),
    ],
)
def test_coverage_says_how_to_tune_for_the_routing_that_it_asked_for(
    cli: Command, tmp_path: Path, own: str, options: tuple[str, ...], hint: str
) -> None:
    path = tmp_path / "table.db"
    export_table(with_routing(table_of(), own), path)
    done = cli("cache", "coverage", SPEC, path, "--tokens", "9", *options)
    line = done.err.splitlines()[-1]
    assert done.code == 4 and "lacks 1 of 1 point of" in line and "tune what is missing on" in line
    assert hint in line and ("--routing" in line) == bool(hint)


@pytest.mark.parametrize("own", ["uniform", "zipf:1.2"])
def test_doctor_asks_for_the_routing_that_serving_would(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    path = tmp_path / "table.db"
    export_table(with_routing(table_of(), own), path)
    assert cli("doctor", SPEC, "--table", path, "--tokens", "1").code == 0
    monkeypatch.setenv("TM_GEMM_ROUTING", "zipf:1.5")
    done = cli("doctor", SPEC, "--table", path, "--tokens", "1")
    assert done.code == 4 and "--routing zipf:1.5 --export FILE" in done.err.splitlines()[-1]


def with_routing(table: TuningTable, routing: str) -> TuningTable:
    return TuningTable(table.environments, tuple(replace(d, routing=routing) for d in table.decisions))


def test_coverage_says_why_field_by_field(cli: Command, table: Path, foreign: Path) -> None:
    done = cli("cache", "coverage", SPEC, table, "--dtype", "fp32", "--tokens", "1", "--json")
    assert "dtype: here 'fp32', there 'bf16'" in json.loads(done.out)["points"][0]["reasons"]
    done = cli("cache", "coverage", SPEC, foreign, "--tokens", "1", "--json")
    assert done.code == 4
    assert "there 'another CPU'" in json.loads(done.out)["points"][0]["reasons"][0]


def test_coverage_asks_for_another_machine(cli: Command, foreign: Path) -> None:
    digest = import_table(foreign).environments[0].digest
    assert cli("cache", "coverage", SPEC, foreign, "--tokens", "1", "--environment", digest[:8]).code == 0
    cli("cache", "coverage", SPEC, foreign, "--environment", "f00").failed(3, "'f00'", "another CPU")


def test_coverage_relaxes_what_is_named(cli: Command, foreign: Path) -> None:
    done = cli("cache", "coverage", SPEC, foreign, "--tokens", "1", "--relax", "device", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert document["relax"] == ["device"]
    assert [(d["field"], d["hard"]) for d in document["points"][0]["differences"]] == [("device", True)]
    cli("cache", "coverage", SPEC, foreign, "--relax", "driver").failed(2, "'driver'", "kernel_source")


def test_coverage_of_every_rank(cli: Command, table: Path) -> None:
    done = cli("cache", "coverage", "E=4,H=64,I=97,k=2", table, "--tp", "2", "--tokens", "1", "--json")
    assert done.code == 4
    assert len({p["layer"] for p in json.loads(done.out)["points"]}) == 2


def measured_table(us: float, default_us: float, **fields: object) -> TuningTable:
    """A table that keeps the default in one bucket and claims times for it."""
    base = table_of(tokens=(1,), **fields)  # type: ignore[arg-type]  # each case gives options
    (d,) = base.decisions
    up, down = (
        replace(choice_of(gemm, d.choice(gemm.name).config, base.environments[0]), p50_us=us, default_us=default_us)
        for gemm in LAYER.gemms
    )
    return TuningTable(base.environments, (replace(d, up=up, down=down),))


def test_verify_measures_again(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "slow.db"
    # Nothing takes that long, whatever else this machine does.
    export_table(measured_table(1e8, 1e8), path)
    done = cli("cache", "verify", path, "--rounds", "2", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert [r["verdict"] for r in document["results"]] == ["holds", "holds"]
    assert all(0 < r["p50_us"] < 1e8 for r in document["results"])


def test_verify_measures_under_a_recorded_routing(cli: Command, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({"counts": [5, *[1] * (LAYER.global_experts - 1)]}))
    profile = load_profile(str(counts))
    base = measured_table(1e8, 1e8)
    skewed = tuple(replace(d, routing=profile.name) for d in base.decisions)
    path = tmp_path / "skewed.db"
    export_table(TuningTable(base.environments, (*base.decisions, *skewed)), path)
    cli("cache", "verify", path).failed(4, profile.name, "--routing FILE")
    cli("cache", "verify", path, "--routing", "zipf:1.2").failed(4, "no decision for routing zipf:1.2", "uniform")
    for given, name in ((counts, profile.name), ("uniform", "uniform")):
        done = cli("cache", "verify", path, "--rounds", "2", "--routing", given, "--json")
        assert done.code == 0, done.err
        assert {r["routing"] for r in json.loads(done.out)["results"]} == {name}


def test_verify_says_what_drifted(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "fast.db"
    # Nothing is that fast.
    export_table(measured_table(1e-3, 1e-3), path)
    done = cli("cache", "verify", path, "--rounds", "2", "--sample", "1", "--json")
    assert done.code == 4
    assert "1 of 1 config of" in done.err.splitlines()[-1]
    assert [r["verdict"] for r in json.loads(done.out)["results"]] == ["slower"]


def test_verify_says_what_else_differs_where_the_table_was_decided(cli: Command, tmp_path: Path) -> None:
    threads = cpu_environment().threads
    for there, told in ((threads, False), (threads + 1, True)):
        path = tmp_path / f"{there}.db"
        export_table(measured_table(1e8, 1e8, threads=there), path)
        done = cli("cache", "verify", path, "--rounds", "2", "--sample", "1")
        line = f"warning: decided where threads: here '{threads}', there '{there}': times may differ for that alone"
        assert done.code == 0 and (line in done.err) == told, done.err


def test_verify_refuses_other_environments(cli: Command, foreign: Path, impossible: Path) -> None:
    cli("cache", "verify", foreign).failed(4, "device: here", "there 'another CPU'")
    cli("cache", "verify", impossible).failed(3, "impossible")


def test_import_settles_conflicts_by_policy(cli: Command, table: Path, faster: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.db"
    assert cli("cache", "import", faster, "--store", store).code == 0
    done = cli("cache", "import", table, "--store", store, "--policy", "best")
    assert done.code == 0, done.err
    assert done.out.count("ours kept: theirs are slower") == 2
    assert import_table(store) == import_table(faster)
    cli("cache", "import", table, "--store", store, "--policy", "error").failed(3, "both tables decide")
    document = json.loads(cli("cache", "import", table, "--store", store, "--json").out)
    assert [c["kept"] for c in document["conflicts"]] == ["theirs", "theirs"]
    assert import_table(store) == import_table(table)


def test_import_relaxes_what_is_named(cli: Command, tmp_path: Path) -> None:
    store, older = tmp_path / "store.db", tmp_path / "older.db"
    export_table(table_of(torch="1.0.0"), older)
    assert cli("cache", "import", older, "--store", store).code == 0
    assert cli("cache", "coverage", SPEC, store, "--tokens", "1").code == 4
    done = cli("cache", "import", older, "--store", store, "--relax", "torch")
    assert done.code == 0, done.err
    assert "relaxed" in done.out
    assert cli("cache", "coverage", SPEC, store, "--tokens", "1").code == 0
    kept = import_table(store)
    (made_up,) = [e for e in kept.environments if e.torch != "1.0.0"]
    assert "torch was '1.0.0'" in made_up.system
    assert {d.certificate for d in kept.for_environment(made_up.digest).decisions} == {"none"}


def test_explain_says_whether_the_decision_holds_here(cli: Command, table: Path, foreign: Path) -> None:
    assert "fits this machine" in cli("cache", "explain", table, "1", "3").out
    done = cli("cache", "explain", foreign, "1", "3")
    assert "not for this machine: device: here" in done.out
    document = json.loads(cli("cache", "explain", foreign, "1", "3", "--json").out)
    assert document["usable_here"] is False
    assert [text.split(":")[0] for text in document["hard"]] == ["device"]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A table with a measured config outside of its kernel's domain."""
    base = table_of()
    config = base.decisions[0].up.config.with_params(mr=-3)
    made = Measurement(
        environment=base.environments[0].digest, gemm=LAYER.up, tokens=1, config=config, samples_us=(1.0,)
    )  # fmt: skip
    path = tmp_path / "hostile.db"
    export_table(base, path, [made])
    return path


def test_import_refuses_measured_configs_outside_their_domain(cli: Command, hostile: Path, tmp_path: Path) -> None:
    cli("cache", "import", hostile, "--store", tmp_path / "store.db").failed(3, "hostile.db", "impossible")


def test_merge_refuses_what_import_refuses(
    cli: Command, table: Path, impossible: Path, hostile: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.db"
    for sources in ((table, hostile), (hostile, table)):
        cli("cache", "merge", *sources, "--out", out).failed(3, "hostile.db", "a measured config", "impossible")
    cli("cache", "merge", table, impossible, "--out", out).failed(3, impossible.name, "impossible")
    assert not out.exists()
    # Without its measurements the file is sound.
    assert cli("cache", "merge", table, hostile, "--out", out, "--no-measurements").code == 0


def test_import_of_other_engines_files_takes_no_options_about_decisions(cli: Command, tmp_path: Path) -> None:
    file = tmp_path / "E=8,N=3584,device_name=NVIDIA_H200.json"
    file.write_text("{}")
    for option in (("--policy", "best"), ("--relax", "torch")):
        cli("cache", "import", "--format", "vllm", file, *option).failed(2, "--policy and --relax", "hints only")


def test_export_takes_the_measurements_of_its_part_along(cli: Command, tmp_path: Path) -> None:
    mine, theirs = table_of(), table_of(device="another CPU")
    config = mine.decisions[0].up.config
    made = [
        Measurement(environment=t.environments[0].digest, gemm=LAYER.up, tokens=1, config=config, samples_us=(1.0,))
        for t in (mine, theirs)
    ]
    both, out = tmp_path / "both.db", tmp_path / "out.db"
    export_table(mine.merged(theirs), both, made)
    document = json.loads(cli("cache", "export", both, out, "--measurements", "--here", "--json").out)
    assert document["measurements"] == 1
    assert read_bundle(out, measurements=True).measurements == (made[0],)
    assert import_table(out) == mine
    none = tmp_path / "none.db"
    cli("cache", "export", both, none, "--measurements", "--policy", "fastest").failed(4, "nothing was written")
    assert not none.exists()


def test_measurements_are_not_left_out_of_another_engines_files_in_silence(cli: Command, tmp_path: Path) -> None:
    done = cli("cache", "export", tmp_path / "a.db", tmp_path / "out", "--format", "vllm", "--measurements")
    done.failed(2, "--measurements", "--format vllm")

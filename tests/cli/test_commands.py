"""What the commands say about tables and machines, without measuring anything."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from tests.cli.conftest import LAYER, SPEC, Command, table_of
from tilecast.cache_store.bundle import export_table, import_table
from tilecast.cli._bench_tables import show_bench
from tilecast.cli._output import Output
from tilecast.cli._tables import config_text, decision_tables
from tilecast.cli.check import Bits, _judge
from tilecast.cli.demo import _run
from tilecast.engine.bench_result import OURS, BenchResult, Point, Timing
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment
from tilecast.errors import AgreementError, CoverageError
from tilecast.evidence import TuningTable
from tilecast.kernels import registry
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.problem import TileConfig


def test_show_tells_every_decision(cli: Command, table: Path) -> None:
    done = cli("cache", "show", table)
    assert done.code == 0
    assert "E4 H64 I96 top2 bf16" in done.out
    assert "2–4" in done.out
    assert "fits this machine" in done.out
    document = json.loads(cli("cache", "show", table, "--json").out)
    assert document["digest"] == table_of().digest
    assert [d["tokens"] for d in document["decisions"]] == [1, 4]
    assert document["decisions"][0]["speed_up"] == pytest.approx(1.25)


def test_decisions_fit_a_narrow_terminal_and_keep_their_configs_apart(cli: Command, table: Path) -> None:
    shown = cli("cache", "show", table).out
    rows = [line for line in shown.splitlines() if line[:1] in "│┃"]
    assert max(map(len, rows)) <= 100
    assert max(len(row) for row in rows if "%" in row) <= 80
    up = table_of().decisions[0].up.config
    assert "threads=0" in up.label
    assert any("layout=" in line and "unroll=" in line for line in rows), shown
    assert "=0" not in shown
    assert "reproducible, certificate: hardware" in shown


def test_decisions_of_several_devices_are_shown_apart() -> None:
    here, there = table_of(tokens=(1,)), table_of(tokens=(1,), device="another CPU", certificate="none")
    titles = [str(shown.title) for shown in decision_tables(here.merged(there).decisions)]
    assert len(titles) == 4
    for each, certificate in ((here, "hardware"), (there, "none")):
        title = next(title for title in titles if each.environments[0].digest[:12] in title)
        assert title.startswith(f"E4 H64 I96 top2 bf16, reproducible, certificate: {certificate}, environment ")


def test_configs_are_written_without_what_is_off() -> None:
    config = TileConfig("k", {"mr": 10, "stage": 0, "dot": "fma"})
    assert config_text(config) == "k dot=fma mr=10"
    assert config_text(config, kernel=False) == "dot=fma mr=10"


def test_show_selects_layers_by_label_or_digest(cli: Command, table: Path) -> None:
    digest = table_of().decisions[0].layer.digest
    for wanted in ("i96", digest[:8]):
        assert len(json.loads(cli("cache", "show", table, wanted, "--json").out)["decisions"]) == 2
    cli("cache", "show", table, "H999").failed(3, "H999", "E4 H64 I96")


def test_a_part_of_a_table_is_shown_under_the_tables_own_digest(cli: Command, tmp_path: Path) -> None:
    one, other = table_of(), table_of(replace(LAYER, hidden=128))
    path = tmp_path / "two.db"
    export_table(TuningTable(one.environments, (*one.decisions, *other.decisions)), path)
    digest = import_table(path).digest
    assert f"two.db: 2 of 4 decisions, table {digest[:12]}" in cli("cache", "show", path, "H128").out
    assert f"two.db: 4 decisions, table {digest[:12]}" in cli("cache", "show", path, "E4").out
    assert json.loads(cli("cache", "show", path, "H128", "--json").out)["digest"] == digest


def test_an_empty_table_is_shown(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    export_table(table_of(tokens=(1,)).for_environment("none"), path)
    assert "0 decisions" in cli("cache", "show", path).out


def test_import_then_export_keeps_the_bytes(cli: Command, table: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store.db", tmp_path / "out.db"
    document = json.loads(cli("cache", "import", table, "--store", store, "--json").out)
    assert (document["decisions"], document["configs_checked"]) == (2, 4)
    assert cli("cache", "export", store, out).code == 0
    assert import_table(out) == table_of()
    assert out.read_bytes() == table.read_bytes()


def test_a_foreign_table_is_imported_and_reported(cli: Command, foreign: Path, tmp_path: Path) -> None:
    done = cli("cache", "import", foreign, "--store", tmp_path / "store.db")
    assert done.code == 0
    assert "another CPU" in done.out
    assert "not for this machine" in done.out


def test_import_without_a_store_uses_the_cache_folder(cli: Command, table: Path) -> None:
    where = json.loads(cli("cache", "import", table, "--json").out)["store"]
    assert import_table(where).decisions


def test_doctor_describes_the_machine(cli: Command) -> None:
    document = json.loads(cli("doctor", "--json").out)
    assert document["machine"]["environment"]["digest"] == cpu_environment().digest
    assert {fact["kernel"] for fact in document["kernels"]} == {kernel.name for kernel in registry}
    assert document["table"] is None
    shown = cli("doctor").out
    assert "none" in shown
    # A kernel that runs all layers, or none for one reason, has one row; a reason that both GEMMs have stands once.
    rows = [line for line in shown.splitlines() if "llvm." in line]
    assert ["yes" in row for row in rows] == [True, False] and "up:" not in rows[1]
    assert document["settings"].keys() >= {"import", "miss", "routing", "sandbox", "lock_dir"}
    assert all(name in shown for name in ("TM_GEMM_IMPORT", "TM_GEMM_ROUTING", "TILECAST_LOCK_DIR"))


def test_doctor_tells_kernels_that_run_some_layers_alone(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoeGemm, "rejects", lambda self, gemm, here: "no" if gemm.layer.dtype == "fp16" else None)
    rows = [line.split("│") for line in cli("doctor").out.splitlines() if "llvm.moe_gemm" in line]
    assert [row[2].split()[-1] for row in rows] == ["fp32", "fp16"]
    assert [row[3].strip() for row in rows] == ["yes", "no: no"]


def test_doctor_tells_hits_and_misses(cli: Command, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TM_GEMM_IMPORT", str(table))
    assert cli("doctor", SPEC, "--tokens", "1,3").code == 0
    done = cli("doctor", SPEC, "--tokens", "1,3,9", "--json")
    assert done.code == 4
    assert "does not cover 1 point" in done.err.splitlines()[-1]
    assert f"tilecast tune {SPEC} --tokens 1,3,9 --export FILE" in done.err.splitlines()[-1]
    points = json.loads(done.out)["coverage"]
    assert [(p["tokens"], p["hit"]) for p in points] == [(1, True), (3, True), (9, False)]
    assert "covers 9 tokens" in points[-1]["why"]


def test_doctor_names_the_field_that_differs(cli: Command, table: Path, foreign: Path) -> None:
    done = cli("doctor", SPEC, "--dtype", "fp32", "--tokens", "1", "--table", table, "--json")
    assert done.code == 4
    assert "dtype" in json.loads(done.out)["coverage"][0]["why"]
    done = cli("doctor", SPEC, "--tokens", "1", "--table", foreign, "--json")
    assert done.code == 4
    assert "device" in json.loads(done.out)["coverage"][0]["why"]


def test_without_a_table_a_model_is_no_error(cli: Command) -> None:
    assert cli("doctor", SPEC, "--tokens", "1").code == 0


def test_doctor_says_that_no_table_is_in_use(cli: Command) -> None:
    document = json.loads(cli("doctor", SPEC, "--tokens", "1", "--json").out)
    assert [point["why"] for point in document["coverage"]] == ["no table is in use"]


def test_bench_saves_its_document_beside_the_tables(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text("an older one")
    line = ["bench", SPEC, "--tokens", "1", "--rounds", "1", "--no-tune", "--peers", "none", "--save"]
    done = cli(*line, path)
    assert done.code == 0, done.err
    assert "of limit" in done.out
    assert [point["tokens"] for point in json.loads(path.read_text())["points"]] == [1]
    for wrong in (tmp_path, tmp_path / "no" / "bench.json"):
        cli(*line, wrong).failed(3, str(wrong))


def test_a_share_of_a_limit_that_did_not_hold_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    for limit_us, marked in ((50.0, False), (200.0, True)):
        config = TileConfig("k", {})
        point = Point(
            layer=LAYER, tokens=1, policy="reproducible", up=config, down=config, hit=True, active_experts=2,
            flops=1e6, bytes=1e6, dot=False, limit_us=limit_us, bound="memory",
            timings=(Timing(name=OURS, samples_us=(100.0,)),),
        )  # fmt: skip
        result = BenchResult(
            environment=cpu_environment(), threads=1, read_gb_s=1.0, fma_gflop_s=1.0, dot_bf16_gflop_s=1.0,
            points=(point,),
        )  # fmt: skip
        show_bench(Output(), result)
        shown = capsys.readouterr().out
        assert (f"{limit_us:.1f}% !" in shown) is marked
        assert ("a peak was measured too low" in shown) is marked


@pytest.mark.parametrize(("ended", "code"), [(5, 5), (-9, 137)])
def test_the_demo_ends_as_its_step_did(
    ended: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, ended))
    with pytest.raises(typer.Exit) as caught:
        _run(["check", SPEC, "--tp", "1"], [], tmp_path / "table.db")
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == f"tilecast: demo ended with its step `tilecast check {SPEC}`, exit code {code}\n"


def test_check_warns_where_the_table_was_tuned_with_other_threads(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "threads.db"
    export_table(table_of(threads=77), path)
    done = cli("check", SPEC, "--tokens", "1", "--table", path)
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if "threads" in line]
    assert len(told) == 1 and told[0].startswith("warning: the table was tuned with threads '77'"), done.err


def test_doctor_is_loud_about_weak_certificates(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "weak.db"
    export_table(table_of(certificate="none"), path)
    done = cli("doctor", "--table", path, "--json")
    assert done.code == 0
    assert "warning" in done.err
    assert json.loads(done.out)["table"]["weak_certificates"] == 2


def test_doctor_says_which_shards_are_different_layers(cli: Command) -> None:
    done = cli("doctor", "E=4,H=64,I=97,k=2", "--tp", "2", "--tokens", "1", "--json")
    assert "different layers" in done.err
    assert [part["layer"]["intermediate"] for part in json.loads(done.out)["model"]["layers"]] == [49, 48]


def test_check_runs_the_table_and_repeats_its_bits(cli: Command, table: Path) -> None:
    first, second = (json.loads(cli("check", SPEC, "--tokens", "1,4,9", "--table", table, "--json").out) for _ in "ab")
    assert first == second
    assert first["table_digest"] == table_of().digest
    assert [point["decided"] for point in first["points"]] == [True, True, False]
    assert all(point["same_alone"] for point in first["points"])


def _bits(**changes: object) -> Bits:
    fields = {"layer": "L", "tokens": 4, "decided": True, "sha256": ("aa", "aa"), "same_alone": True}
    return Bits(**{**fields, **changes})  # type: ignore[arg-type]


def test_other_bits_are_a_disagreement() -> None:
    reproducible, fastest = (
        Runtime(table_of(), environment=cpu_environment(), registry=registry, policy=policy)
        for policy in ("reproducible", "fastest")
    )
    _judge([_bits()], reproducible)
    with pytest.raises(AgreementError, match="rank 1 returned other bits"):
        _judge([_bits(sha256=("aa", "bb"))], fastest)
    with pytest.raises(CoverageError, match="alone"):
        _judge([_bits(same_alone=False)], reproducible)
    _judge([_bits(same_alone=False)], fastest)


def test_help_and_version(cli: Command) -> None:
    commands = ([], ["tune"], ["bench"], ["doctor"], ["check"], ["demo"], *(["cache", c] for c in ("show", "export")))
    for command in commands:
        done = cli(*command, "--help")
        assert done.code == 0
        assert done.err == ""
        assert "Usage: tilecast" in done.out
    assert "Exit codes" in cli("--help").out
    assert "mixtral-8x7b" in cli("tune", "--help").out
    assert cli("--version").out.startswith("tilecast ")

"""The command in processes of its own: the whole way, interrupts, closed pipes, several ranks."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import SPEC, Command, two_ranks
from tests.programs import start
from tilecast.cache_store.store import open_store
from tilecast.settings import child_environment


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from tilecast.cli.app import app\n"
        "code = app(['tune', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'sqlalchemy', 'llvmlite', 'numpy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy or code else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_completion_offers_commands_and_presets() -> None:
    words = {"_TILECAST_COMPLETE": "complete_bash", "COMP_CWORD": "2", "COMP_WORDS": "tilecast tune mixtral-8x2"}
    command, environment = [sys.executable, "-m", "tilecast"], child_environment(words)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "mixtral-8x22b" in done.stdout


@pytest.mark.slow
def test_the_whole_way(process: Command, tmp_path: Path) -> None:
    store, table = tmp_path / "store.db", tmp_path / "table.db"
    arguments = ["tune", SPEC, "--tokens", "1,4", "--budget", "4s", "--store", store, "--export", table, "--json"]
    tuned = process(*arguments)
    assert tuned.code == 0, tuned.err
    digest = json.loads(tuned.out)["table"]["digest"]
    assert "tuning" in tuned.err
    assert json.loads(process("cache", "show", table, "--json").out)["digest"] == digest
    assert json.loads(process("cache", "show", store, "--json").out)["digest"] == digest
    imported = process("cache", "import", table, "--store", tmp_path / "other.db", "--json")
    assert json.loads(imported.out)["decisions"] == 2
    assert process("doctor", SPEC, "--tokens", "1,4", "--json", TM_GEMM_IMPORT=str(table)).code == 0
    checked = [process("check", SPEC, "--tokens", "1,4", "--json", TM_GEMM_IMPORT=str(table)) for _ in "ab"]
    assert checked[0].out == checked[1].out
    bench = ["bench", SPEC, "--tokens", "1,4", "--rounds", "3", "--budget", "5s", "--peers", "torch loop", "--json"]
    document = json.loads(process(*bench, TM_GEMM_IMPORT=str(table)).out)
    assert document["table"]["buckets_tuned_now"] == 0
    assert [point["hit"] for point in document["points"]] == [True, True]
    assert document["summaries"]


@pytest.mark.slow
def test_ctrl_c_keeps_measurements_and_the_next_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    words = ["tune", SPEC, "--tokens", "1,2,4,8,16,32,64,128,256", "--store", path]
    running = start("tilecast", *words, environment=child_environment({"OMP_NUM_THREADS": "1"}))
    kept = 0
    deadline = time.monotonic() + 60
    while kept == 0 and time.monotonic() < deadline:
        time.sleep(0.3)
        if path.exists():
            with open_store(path) as store:
                kept = len(store.measurements())
    running.send_signal(signal.SIGINT)
    done = running.ended(30)
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("tilecast: interrupted; measurements made so far are kept")
    assert "Traceback" not in done.stderr
    with open_store(path) as store:
        assert len(store.measurements()) >= kept > 0


def test_ctrl_c_while_starting_is_one_line() -> None:
    code = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tilecast.cli.app':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from tilecast.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tilecast: interrupted\n")


def test_a_closed_pipe_is_quiet(table: Path) -> None:
    command = [sys.executable, "-m", "tilecast", "cache", "show", table, "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    err = running.stderr.read()
    running.stderr.close()
    assert running.wait(timeout=60) == 141
    assert err == ""


@pytest.mark.torchrun
def test_ranks_run_one_table_and_return_the_same_bits(table: Path) -> None:
    line = ["check", SPEC, "--tokens", "1,4", "--table", str(table), "--json"]
    (code, out, err), (other_code, other_out, _) = two_ranks(line, line)
    assert (code, other_code) == (0, 0), err
    assert other_out == ""
    document = json.loads(out)
    assert document["ranks"] == 2
    assert all(point["same_on_all_ranks"] for point in document["points"])


@pytest.mark.torchrun
def test_ranks_out_of_step_all_end_with_five(table: Path) -> None:
    line = ["check", SPEC, "--table", str(table), "--tokens"]
    found = two_ranks([*line, "1"], [*line, "4"])
    assert [code for code, _, _ in found] == [5, 5]
    assert len({err.splitlines()[-1] for _, _, err in found}) == 1


@pytest.mark.slow
@pytest.mark.torchrun
def test_the_demo_on_a_small_layer(process: Command, tmp_path: Path) -> None:
    done = process(
        "demo", "--layer", SPEC, "--budget", "5s", "--out", tmp_path / "demo.db", "--store", tmp_path / "s.db"
    )
    assert done.code == 0, done.err
    assert "torch loop" in done.out
    assert "all 2 ranks run the same table and return the same bits" in done.out
    *_, title, table, speed, bits, took = done.out.splitlines()
    assert title == "What this showed"
    assert re.fullmatch(rf"  table: [0-9a-f]{{12}}, 5 decisions in {tmp_path}/demo.db, the same in .*", table)
    assert re.match(r"  speed: [\d.]+× a plain PyTorch loop over experts \(worst [\d.]+×\)", speed)
    assert bits.startswith("  bits:  equal on 2 ranks")
    assert took.startswith("done in ")
    assert (tmp_path / "demo.db").exists()

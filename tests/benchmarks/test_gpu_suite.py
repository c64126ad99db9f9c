"""The GPU suite, tried on the CPU: what it keeps, how it goes on, and what it publishes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import checks, report, run, sanitizer, shapes, worker
from benchmarks.gpu.clock import CudaClock, clock_for
from benchmarks.gpu.device import Limits
from benchmarks.gpu.layers import DEFAULT
from benchmarks.gpu.picture import Dot, roofline
from benchmarks.gpu.record import ROOT, OutOfTime, Poisoned, Record, Setup, read_json
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertLayer

SMALL = ExpertLayer(hidden=32, intermediate=48, experts=4, top_k=2)


def setup_for(out: Path, **changes: Any) -> Setup:
    return Setup(**{"out": out, "device": "cpu", "tiny": True, "rounds": 3, "python": sys.executable, **changes})


# The driver --------------------------------------------------------------------------------------------------


def command(out: Path) -> list[str]:
    words = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu", "--tiny", "--out", str(out)]
    return [*words, "--only", "device", "layers", "--tune-seconds", "1", "--rounds", "3"]


def workers(out: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "--worker" in words and str(out) in words:
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that was killed once and then gone on with."""
    out = tmp_path_factory.mktemp("suite")
    first = subprocess.Popen(command(out), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        assert wait_until((out / "layers/tiny.parts/tuned.json").exists, 120), "the first run never got to tuning"
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert wait_until(lambda: not workers(out), 10), "the worker outlived its driver"
    assert not (out / "layers/tiny.json").exists(), "the first run was to be killed before its end"
    kept = {path: path.read_bytes() for path in (out / "device/device.json", out / "layers/tiny.parts/tuned.json")}
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in kept} == kept, "what was finished was made again"
    return out


@pytest.mark.slow
def test_a_killed_run_goes_on(tried: Path) -> None:
    record = read_json(tried / "layers/tiny.json")
    assert record["status"] == "ok"
    assert [point["tokens"] for point in record["result"]["points"]] == list(shapes.TINY_TOKENS)
    point = record["result"]["points"][-1]
    times = {c["name"]: c for c in point["contestants"]}
    assert all(len(times[name]["samples_us"]) == 3 for name in ("tilecast tuned", DEFAULT))
    assert times["triton_kernels"]["status"] == "unavailable"
    assert times["transformers grouped_mm"]["status"] == "ok"
    assert point["bits"]["tilecast tuned"] == {"checked": 4, "equal": 4}
    assert point["derived"]["contestants"][DEFAULT]["roofline_share"] > 0


def test_a_finished_run_runs_nothing(tried: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tried.rglob("*.json")}
    assert run.main(command(tried)[2:]) == 0
    assert {path: path.stat().st_mtime_ns for path in tried.rglob("*.json")} == before
    assert "layers/tiny" in capsys.readouterr().out


def test_without_time_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*command(tmp_path)[2:], "--minutes", "0.001"]) == 4
    assert "left: device/device, layers/tiny" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


def test_a_process_that_dies_is_on_record_and_the_others_run(tmp_path: Path) -> None:
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\necho died of it\nexit 7\n")
    dies.chmod(0o755)
    setup = setup_for(tmp_path / "out", python=str(dies))
    records = [Record(setup, "sanitizer", name) for name in shapes.SANITIZERS]
    run.run_step(setup, "sanitizer", records)
    for record in records:
        found = record.read()
        assert found is not None and found["status"] == "failed"
        assert "code 7" in found["error"] and "died of it" in found["error"]
    assert run.summary(setup, {"sanitizer": records}) == 1


def test_a_unit_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_for(tmp_path)
    record = Record(setup, "sanitizer", "memcheck")
    sleeps = tmp_path / "sleeps"
    record.running.parent.mkdir(parents=True)
    sleeps.write_text(f"#!/bin/sh\ntouch {record.running}\nsleep 60\n")
    sleeps.chmod(0o755)
    # What a killed run has left must not count as this one's time.
    record.running.touch()
    os.utime(record.running, (0, 0))
    monkeypatch.setitem(run.UNIT_LIMIT_S, "sanitizer", 0.3)
    run.run_step(setup_for(tmp_path, python=str(sleeps)), "sanitizer", [record])
    found = record.read()
    assert found is not None and "ended after 0 s" in found["error"]


def test_a_step_that_raises_leaves_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(setup: Setup, record: Record) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr(sanitizer, "run", fails)
    record = Record(setup_for(tmp_path), "sanitizer", "memcheck")
    worker.run_unit(record.setup, record)
    found = record.read()
    assert found is not None and "ValueError: no such luck" in found["error"] and "Traceback" in found["error"]
    assert not record.running.exists()


def test_unknown_steps_are_refused() -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "everything"])


# Records -----------------------------------------------------------------------------------------------------


def test_parts_are_kept_failures_too(tmp_path: Path) -> None:
    record = Record(setup_for(tmp_path), "layers", "x")
    calls: list[str] = []

    def fails() -> None:
        calls.append("fails")
        raise RuntimeError("broken part")

    assert record.part("good", lambda: calls.append("good") or 7)["result"] == 7
    assert record.part("bad", fails)["status"] == "failed"
    assert record.part("good", lambda: 8)["result"] == 7
    assert "broken part" in record.part("bad", fails)["error"]
    assert calls == ["good", "fails"]
    record.finish(status="partial", seconds=1.0, result={"failures": ["…"]})
    record.forget(failures_only=True)
    assert record.read() is None
    assert record.part("good", lambda: 8)["result"] == 7
    assert record.part("bad", lambda: 9)["result"] == 9


def test_a_part_that_breaks_the_process_is_kept_before_it_ends(tmp_path: Path) -> None:
    record = Record(setup_for(tmp_path), "layers", "x")

    def breaks() -> None:
        raise RuntimeError("illegal memory access")

    with pytest.raises(Poisoned):
        record.part("bad", breaks, healthy=lambda: False)
    assert record.part("bad", breaks, healthy=lambda: False)["status"] == "failed"


def test_no_part_begins_without_the_time_it_needs(tmp_path: Path) -> None:
    record = Record(setup_for(tmp_path, deadline=time.time() + 5), "layers", "x")
    with pytest.raises(OutOfTime):
        record.part("long", lambda: 1, needs_s=20)
    assert record.part("short", lambda: 1, needs_s=1)["result"] == 1


def test_a_torn_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"status": "ok"')
    assert read_json(tmp_path / "torn.json") is None


# Shapes ------------------------------------------------------------------------------------------------------


def test_shapes_are_the_models() -> None:
    found = {shape.name: shape.layer for shape in shapes.layer_shapes()}
    assert len(found) == 6
    assert [found[f"mixtral-8x7b-tp{tp}"].intermediate for tp in (1, 2, 8)] == [14336, 7168, 1792]
    deepseek, oss = found["deepseek-v3-ep8"], found["gpt-oss-120b-tp1"]
    assert (deepseek.experts, deepseek.global_experts, deepseek.top_k) == (32, 256, 8)
    assert (oss.activation, oss.bias, oss.experts, oss.top_k) == ("swiglu_oai", True, 128, 4)
    assert {layer.dtype for layer in found.values()} == {"bf16"}


@pytest.mark.parametrize("step", shapes.STEPS)
@pytest.mark.parametrize("tiny", [False, True])
def test_every_step_has_units_and_a_module(step: str, tiny: bool) -> None:
    names = shapes.units(step, tiny=tiny)
    assert names and len(set(names)) == len(names)
    assert (ROOT / "benchmarks/gpu" / f"{worker.MODULES[step]}.py").exists()


# The other steps ---------------------------------------------------------------------------------------------


def test_pytest_results_are_read_and_failures_shown(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\n@pytest.mark.skip(reason='no device')\ndef test_skipped(): pass\n"
    )
    setup = setup_for(tmp_path)
    found = checks.run_pytest(setup, tmp_path / "parts", (str(tests),), "not gpu", timeout_s=60)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 0, 1)
    assert found["skip_reasons"] == {"no device": 1}
    tests.write_text("def test_bad(): assert 1 == 2\n")
    with pytest.raises(checks.WrongResults, match=r"1 of 1 tests failed:\n.*test_bad"):
        checks.run_pytest(setup, tmp_path / "parts", (str(tests),), "not gpu", timeout_s=60)


def test_no_kernel_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "default_registry", Registry)
    with pytest.raises(checks.WrongResults, match="nothing was checked"):
        checks.check_cases(setup_for(tmp_path), 1, 1)


@pytest.mark.parametrize(
    ("code", "said", "good"),
    [
        (0, "24 right\n========= ERROR SUMMARY: 0 errors", True),
        (9, "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors", False),
        (1, "1 wrong\n========= ERROR SUMMARY: 0 errors", False),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        (0, "========= RACECHECK SUMMARY: 2 hazards displayed", False),
        (0, "nothing that is known", False),
    ],
)
def test_what_the_sanitizer_says_is_judged(code: int, said: str, good: bool) -> None:
    if good:
        assert sanitizer.judge(code, said)["errors"] == 0
    else:
        with pytest.raises(sanitizer.SanitizerError):
            sanitizer.judge(code, said)


# The report --------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    page = report.write_page(docs=tmp_path)
    assert page.read_text() == (report.DOCS / report.PAGE).read_text(), "run `make gpu-report`"
    for picture in tmp_path.glob("pictures/*.svg"):
        assert picture.read_text() == (report.DOCS / "pictures" / picture.name).read_text()


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    assert "Nothing was measured on a GPU yet." in report.write_page(tmp_path / "none", tmp_path).read_text()


def test_a_trial_is_not_published(tried: Path, tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="a trial of the suite"):
        report.collect(tried, tmp_path)
    with pytest.raises(report.ReportError, match="no finished `device` step"):
        report.collect(tmp_path, tmp_path)


def test_the_page_holds_the_numbers_of_the_records(tried: Path, tmp_path: Path) -> None:
    report.collect(tried, tmp_path / "results", trial=True)
    failed = Record(setup_for(tried), "sanitizer", "memcheck")
    failed.finish(status="failed", seconds=0.0, error="Traceback\nRuntimeError: it broke")
    folder = report.collect(tried, tmp_path / "results", trial=True)
    failed.path.unlink()
    text = report.write_page(tmp_path / "results", tmp_path / "docs").read_text()
    record = read_json(folder / "layers/tiny.json")
    for point in record["result"]["points"]:
        for contestant in point["contestants"]:
            if contestant["name"] == DEFAULT:
                assert f"| {point['tokens']} | {report._us(contestant)} |" in text
    assert f"torch {torch.__version__}" in text and record["command"] in text
    assert "- sanitizer/memcheck: RuntimeError: it broke" in text
    (picture,) = (tmp_path / "docs/pictures").glob("*.svg")
    assert f"(pictures/{picture.name})" in text


def test_the_roofline_is_a_picture_with_every_point() -> None:
    dots = [Dot(intensity=2.0, tflop_s=6.0, label="a & b"), Dot(intensity=300.0, tflop_s=500.0, label="c")]
    text = roofline("H < I", Limits(read_gb_s=4000.0, dense_tflop_s=700.0), {"Mixtral": dots})
    root = ElementTree.fromstring(text)
    circles = [tag for tag in root.iter() if tag.tag.endswith("circle") and len(tag)]
    assert len(circles) == 2
    low, high = ((float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles)
    assert low[0] < high[0] and low[1] > high[1]
    assert high[1] > 0 and low[1] < 460


# On a device -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_calls_are_captured_and_those_that_wait_are_timed_as_they_are() -> None:
    clock = clock_for("cuda")
    assert isinstance(clock, CudaClock)
    tensor = torch.ones(1 << 20, device="cuda")
    captured = clock.prepare(lambda: tensor * 2)
    waits = clock.prepare(lambda: tensor.sum().item())
    assert captured.graph and not waits.graph and waits.note
    assert clock.sample(captured, touch=[tensor]) > 0 and clock.sample(waits) > 0
    assert clock.healthy()

"""The GPU suite, tried on the CPU: what it keeps, how it goes on, and what it makes of contestants that fail."""

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

from benchmarks.gpu import cases, certification, checks, questions, report, run, sanitizer, shapes, sweep, worker
from benchmarks.gpu.clock import CpuClock, CudaClock, clock_for
from benchmarks.gpu.device import Limits
from benchmarks.gpu.layers import DEFAULT, Contestant, LayerBench, derive
from benchmarks.gpu.peers import Call, FixedOperands, TorchGroupedMm, Transformers
from benchmarks.gpu.picture import Dot, roofline
from benchmarks.gpu.record import ROOT, OutOfTime, Poisoned, Record, Setup, read_json
from tests.cases import Case, operands
from tests.torch_kernel import TorchKernel
from tilecast.autotune.certify import certify, claimed_configs
from tilecast.autotune.prescreen import prescreen
from tilecast.engine.peers import LayerWeights
from tilecast.environment import cpu_environment
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


# Contestants -------------------------------------------------------------------------------------------------


class Odd:
    """A peer that fails in its own way."""

    def __init__(self, name: str) -> None:
        self.name = name

    def unavailable(self, layer: ExpertLayer, tokens: int) -> str | None:
        return "not on Sundays" if self.name == "absent" else None

    def prepare(self, layer: ExpertLayer, weights: LayerWeights) -> Callable[[FixedOperands], Call]:
        if self.name == "unprepared":
            raise ValueError("cannot hold this")
        return lambda fixed: lambda: self._run(fixed)

    def _run(self, fixed: FixedOperands) -> torch.Tensor:
        if self.name == "raises":
            raise RuntimeError("boom\nand more")
        return torch.zeros_like(fixed.hidden)


def test_a_peer_that_fails_is_recorded_and_the_others_race(tmp_path: Path) -> None:
    peers = [Odd(name) for name in ("raises", "unprepared", "zeros", "absent")]
    bench = LayerBench(setup_for(tmp_path), SMALL, clock_for("cpu", tiny=True), None, peers)
    found = {c["name"]: c for c in bench.point(5)["contestants"]}
    assert (found["raises"]["status"], found["raises"]["detail"]) == ("runtime_error", "RuntimeError: boom")
    assert "cannot hold this" in found["unprepared"]["detail"]
    assert found["zeros"]["status"] == "wrong_result" and "times that of torch" in found["zeros"]["detail"]
    assert (found["absent"]["status"], found["absent"]["detail"]) == ("unavailable", "not on Sundays")
    assert all(not found[peer.name]["samples_us"] for peer in peers)
    assert len(found[DEFAULT]["samples_us"]) == 3


@pytest.mark.parametrize(
    "layer",
    [
        ExpertLayer(hidden=32, intermediate=48, experts=3, top_k=2, global_experts=8),
        ExpertLayer(hidden=32, intermediate=48, experts=4, top_k=2, activation="swiglu_oai", bias=True),
    ],
    ids=["one rank's experts", "gpt-oss"],
)
def test_peers_are_right_on_every_form_of_layer(tmp_path: Path, layer: ExpertLayer) -> None:
    peers = [TorchGroupedMm(), Transformers("grouped_mm"), Transformers("batched_mm")]
    bench = LayerBench(setup_for(tmp_path, rounds=1), layer, clock_for("cpu", tiny=True), None, peers)
    for contestant in bench.point(9)["contestants"]:
        assert contestant["status"] == "ok", contestant
        assert contestant["samples_us"]


def test_a_failure_on_a_broken_device_is_not_the_contestants() -> None:
    class Broken(CpuClock):
        def healthy(self) -> bool:
            return False

    def fails() -> None:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        Contestant(name="x").guarded(fails, Broken(1 << 10))


def test_figures_follow_from_the_times() -> None:
    point = {
        "flops": 2e9,
        "bytes": 1e6,
        "weight_bytes": 5e5,
        "contestants": [
            {"name": DEFAULT, "p50_us": 10.0},
            {"name": "a", "p50_us": 15.0},
            {"name": "b", "p50_us": None},
        ],
    }
    found = derive(point, Limits(read_gb_s=1000.0, dense_tflop_s=400.0))
    assert (found["bound"], found["limit_us"], found["best_peer"]) == ("compute", 5.0, "a")
    assert found["contestants"][DEFAULT] == {
        "tflop_s": 200.0,
        "weights_gb_s": 50.0,
        "roofline_share": 0.5,
        "best_peer_over_this": 1.5,
    }
    assert derive(point, None)["contestants"][DEFAULT]["roofline_share"] is None


# The other steps ---------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Torch kernels in place of compiled ones, and a layer that they run at once."""
    registry = Registry((TorchKernel(),))
    shape = shapes.Shape(name="tiny", title="Tiny", layer=SMALL)
    for module in (sweep, certification, questions):
        monkeypatch.setattr(module, "default_registry", lambda: registry)
    for module in (sweep, questions):
        monkeypatch.setattr(module, "find_shape", lambda name, tiny: shape)
    return registry


def test_a_sweep_measures_every_config_and_goes_on(tmp_path: Path, small: Registry) -> None:
    valid = {gemm.name: len(prescreen(gemm, 1, cpu_environment(), small).candidates) for gemm in SMALL.gemms}
    with pytest.raises(OutOfTime):
        sweep.run(setup_for(tmp_path, deadline=time.time()), Record(setup_for(tmp_path), "sweep", "tiny.T1"))
    found = sweep.run(setup_for(tmp_path), Record(setup_for(tmp_path), "sweep", "tiny.T1"))
    measured = [(m["gemm"], str(m["config"])) for m in found["measurements"]]
    assert len(set(measured)) == len(measured)
    assert {gemm: sum(name == gemm for name, _ in measured) for gemm in valid} == valid
    assert found["counts"]["ok"] == len(measured)
    again = sweep.run(setup_for(tmp_path), Record(setup_for(tmp_path), "sweep", "tiny.T1"))
    assert again["measurements"] == found["measurements"], "what the store holds was measured again"


def test_a_form_that_is_wrong_answers_by_saying_so(small: Registry) -> None:
    registry = Registry((TorchKernel("zeros"),))
    name = "torch.moe_gemm"
    forms = (
        questions.Form(name="right", kernel=name, where={"variant": "ordered"}),
        questions.Form(name="wrong", kernel=name, where={"variant": "zeros"}),
        questions.Form(name="absent", kernel="torch.absent"),
    )
    question = questions.Question(name="q", text="?", shape="tiny", gemm="up", tokens=3, forms=forms)
    found = questions.answer(question, cpu_environment(), registry, lambda: True, rounds=2, tiny=True)
    good, bad, absent = found["forms"]
    assert good["p50_us"] > 0 and good["config"]["params"]["variant"] == "ordered" and not good["notes"]
    assert bad["p50_us"] is None and "wrong_result" in bad["notes"][0]
    assert "no kernel is named" in absent["notes"][0]


def test_forms_fix_parameters() -> None:
    kernel = TorchKernel()
    name, value = next(iter(next(iter(kernel.space(SMALL.up, 1, cpu_environment()))).params))
    form = questions.Form(name="x", kernel=kernel.name, where={name: value})
    configs, why = questions.configs_of(form, SMALL.up, 1, cpu_environment(), Registry((kernel,)))
    assert configs and not why and {config[name] for config in configs} == {value}
    impossible = questions.Form(name="x", kernel=kernel.name, where={name: -1})
    assert questions.configs_of(impossible, SMALL.up, 1, cpu_environment(), Registry((kernel,)))[0] == []


def test_gpu_questions_name_kernels_and_shapes_that_exist() -> None:
    asked = questions.questions(tiny=False)
    assert {"tma-up", "tma-down", "stages-up", "stages-down", "one-token-up", "one-token-down"} == {
        q.name for q in asked
    }
    known = {shape.name for shape in shapes.layer_shapes()}
    assert {question.shape for question in asked} <= known


def test_certificates_are_told_class_by_class() -> None:
    registry = Registry((TorchKernel(),))
    environment = cpu_environment()
    configs = claimed_configs(SMALL.up, (1,), environment, registry)
    found = certification.answers(certify(SMALL.up, configs, environment, registry, inputs=8, members=2))
    classes = [line for line in found if "members" in line]
    pairs = [line for line in found if "members" not in line]
    assert classes and len(pairs) == len(classes) * (len(classes) - 1) // 2
    assert all(line["answer"] == "equal" and not line["certified"] for line in classes)
    assert len({line["question"] for line in classes}) == len(classes), "classes cannot be told apart"


def test_cases_find_a_kernel_that_is_wrong() -> None:
    for variant, what in (("ordered", ""), ("zeros", "times what is allowed"), ("overwrites", "rows of absent slots")):
        registry = Registry((TorchKernel(variant),))
        tiny = ExpertLayer(hidden=16, intermediate=16, experts=3, top_k=2)
        some = [Case("few", tiny, 3), Case("absent slots", tiny, 7, "absent")]
        found = cases.check_cases(cpu_environment(), registry, configs=4, cases=some, dtypes=("bf16",))
        said = [wrong["what"] for wrong in found["wrong"]]
        assert found["right"] > 0 and found["unreached"] == 0
        assert bool(said) == bool(what) and (not what or any(what in text for text in said)), (variant, said)


def test_cases_stop_when_their_time_is_up() -> None:
    some = [Case("few", SMALL, 3)] * 2
    found = cases.check_cases(cpu_environment(), Registry((TorchKernel(),)), cases=some, dtypes=("bf16",), seconds=-1)
    assert (found["right"], found["wrong"], found["unreached"]) == (0, [], 2)


def test_cases_bring_sorted_rows_into_slot_order() -> None:
    class Sorted(TorchKernel):
        """Writes and reads the intermediate in sorted order."""

        def order(self, gemm: Any, config: Any) -> str:
            return "sorted"

        def up(self, config: Any, hidden: Any, weights: Any, route: Any, out: torch.Tensor) -> None:
            by_slot = torch.full_like(out, torch.nan)
            super().up(config, hidden, weights, route, by_slot)
            present = route.slots[: int(route.offsets[-1])].long()
            out[: len(present)] = by_slot[present]

        def down(self, config: Any, rows: Any, weights: Any, route: Any, scale: Any, out: torch.Tensor) -> None:
            by_slot = torch.full_like(rows, torch.nan)
            present = route.slots[: int(route.offsets[-1])].long()
            by_slot[present] = rows[: len(present)]
            super().down(config, by_slot, weights, route, scale, out)

    kernel = Sorted()
    given = operands(Case("absent", SMALL, 9, "absent").layer, 9, "absent")
    for gemm in SMALL.gemms:
        config = kernel.default(gemm, 9, cpu_environment())
        assert cases.judged(kernel, gemm, config, given) <= 1


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

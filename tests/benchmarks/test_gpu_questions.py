"""What the GPU suite asks of configs and kernels: sweeps, forms, certificates and cases, on kernels of the CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, certification, questions, shapes, sweep
from benchmarks.gpu.record import OutOfTime, Record
from tests.benchmarks.test_gpu_suite import SMALL, setup_for
from tests.cases import Case, operands
from tests.torch_kernel import TorchKernel
from tilecast.autotune.certify import certify, claimed_configs
from tilecast.autotune.prescreen import prescreen
from tilecast.environment import cpu_environment
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertLayer


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

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from tests.fake_gpus import H200, L40S, MI300X, Gpus, fresh
from tests.strategies import environments
from tilecast import environment as environment_module
from tilecast.canonical import canonical_json
from tilecast.environment import Environment, cpu_environment, cuda_environment, environment_for, kernel_source_digest
from tilecast.errors import DeviceError, InputError
from tilecast.kernels.gpu.target import parse_target, target_of

__all__ = ["fresh"]

HERE = Environment(
    device_kind="cpu", device="A CPU", arch="x86_64", features="avx2,fma", units=2, llc_bytes=1 << 25,
    kernel_source="0" * 64, torch="2.13.0", compiler="0.50.0", threads=2,
)  # fmt: skip


def test_the_digest_is_pinned() -> None:
    assert HERE.digest == "c5ca81e08aba9cfbf57727e54157d2b4925a0799272e86d51f9df53209fc4a45"


@given(environments())
def test_environment_survives_its_json(environment: Environment) -> None:
    again = Environment.from_json(json.loads(canonical_json(environment.to_json())))
    assert again == environment
    assert again.digest == environment.digest


@given(environments(), environments())
def test_comparison_is_complete(here: Environment, there: Environment) -> None:
    mismatches = here.compare(there)
    unlike = {f.name for f in fields(here) if getattr(here, f.name) != getattr(there, f.name)}
    assert {m.field for m in mismatches} == unlike - ({"threads"} if 0 in (here.threads, there.threads) else set())
    hard = [m.hard for m in mismatches]
    assert hard == sorted(hard, reverse=True)
    assert here.accepts(there) == there.accepts(here) == (not any(hard))


def test_what_is_seen_without_torch_is_this_machine_but_for_threads() -> None:
    code = "import sys; sys.modules['torch'] = None; from tilecast.environment import seen; print(seen().canonical)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    found = Environment.from_json(json.loads(done.stdout))
    assert found == replace(cpu_environment(), threads=0)
    assert cpu_environment().compare(found) == ()


@pytest.mark.parametrize("present", [True, False])
def test_a_gpu_driver_makes_torch_be_asked(present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidiactl"
    if present:
        driver.touch()
    # One of several is enough.
    monkeypatch.setattr(environment_module, "GPU_FILES", (tmp_path / "nvmap", driver, tmp_path / "kfd"))
    monkeypatch.setattr(environment_module, "here", lambda: HERE)
    monkeypatch.delitem(sys.modules, "torch")
    assert (environment_module.seen() == HERE) == present


@pytest.mark.parametrize("asked", ["torch is there", "Windows", "no"])
def test_torch_is_asked_where_it_is_there_or_drivers_leave_no_file(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "GPU_FILES", (Path("/no such driver"), Path("/nor this one")))
    monkeypatch.setattr(environment_module, "here", lambda: HERE)
    if asked != "torch is there":
        monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "platform", "win32" if asked == "Windows" else "linux")
    assert (environment_module.seen() == HERE) == (asked != "no")


def test_an_environment_accepts_itself() -> None:
    assert HERE.compare(HERE) == ()
    assert HERE.accepts(HERE)


@pytest.mark.parametrize(
    ("changes", "hard"),
    [
        ({"device_kind": "cuda"}, True),
        ({"device": "Another CPU"}, True),
        ({"arch": "aarch64"}, True),
        ({"features": "avx2"}, True),
        ({"units": 4}, True),
        ({"kernel_source": "1" * 64}, True),
        ({"llc_bytes": 1}, False),
        ({"threads": 1}, False),
        ({"driver": "550"}, False),
        ({"system": "Linux"}, False),
        ({"torch": "2.13.1"}, False),
        ({"torch": "2.13.0+cpu"}, False),
        ({"torch": "2.14.0"}, True),
        ({"torch": "3.13.0"}, True),
        ({"compiler": "0.50.1"}, False),
        ({"compiler": "0.5.0"}, True),
        ({"compiler": "absent"}, True),
    ],
)
def test_which_fields_are_hard(changes: dict[str, Any], hard: bool) -> None:
    there = replace(HERE, **changes)
    (mismatch,) = HERE.compare(there)
    assert mismatch.hard is hard
    assert HERE.accepts(there) is not hard
    ((name, value),) = changes.items()
    assert str(mismatch) == f"{name}: here {str(getattr(HERE, name))!r}, there {str(value)!r}"


def test_json_of_another_shape_is_refused() -> None:
    good = HERE.to_json()
    for bad in ({**good, "units": "2"}, {**good, "extra": 1}, {**good, "units": True}, [], {}):
        with pytest.raises(InputError, match="environment"):
            Environment.from_json(bad)


def test_this_machine() -> None:
    here = cpu_environment()
    assert here == cpu_environment()
    assert (here.device_kind, here.kernel_source) == ("cpu", kernel_source_digest("cpu"))
    assert here.units >= 1
    assert here.llc_bytes > 0
    assert here.device
    assert Environment.from_json(here.to_json()) == here


def test_kernel_sources_of_devices_differ() -> None:
    assert len(kernel_source_digest("cpu")) == 64
    assert kernel_source_digest("cpu") != kernel_source_digest("cuda")


# GPUs, told by what torch would say of them ------------------------------------------------------------------


def test_an_nvidia_gpu(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "nvidia").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 12.3.0\n"
    )
    Gpus(monkeypatch, H200)
    here = cuda_environment()
    assert (here.device_kind, here.device, here.arch, here.features) == ("cuda", "NVIDIA H200", "sm_90", "")
    assert (here.units, here.llc_bytes, here.threads) == (132, 50 << 20, 0)
    assert (here.torch, here.compiler) == (torch.__version__, metadata.version("triton"))
    assert (here.driver, here.kernel_source) == ("580.65.06", kernel_source_digest("cuda"))
    assert here.system == cpu_environment().system
    assert target_of(here) == parse_target("cuda:90")
    assert Environment.from_json(here.to_json()) == here
    assert environment_module.here() == environment_for("cuda") == environment_for(torch.device("cuda", 0)) == here


def test_an_amd_gpu(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "amdgpu").write_text("6.12.12\n")
    Gpus(monkeypatch, MI300X, hip="6.4")
    here = cuda_environment()
    assert (here.device_kind, here.arch, here.features) == ("cuda", "gfx942", "sramecc+,xnack-")
    assert (here.units, here.driver) == (304, "6.12.12")
    assert target_of(here) == parse_target("hip:gfx942")


def test_the_driver_is_soft_and_may_be_unknown(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, H200, L40S)
    assert cuda_environment(0).driver == ""
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13020, raising=False)
    assert cuda_environment(1).driver == "CUDA 13.2"
    assert cuda_environment(0).accepts(replace(cuda_environment(0), driver="580.65.06"))
    assert not cuda_environment(0).accepts(cuda_environment(1))


def test_which_gpu(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, H200, L40S)
    assert cuda_environment().arch == "sm_90"
    gpus.current = 1
    assert cuda_environment().arch == environment_module.here().arch == environment_for("cuda").arch == "sm_89"
    assert environment_for("cuda:0").arch == "sm_90"
    assert environment_for("cpu") == cpu_environment()
    for index in (2, -1):
        with pytest.raises(DeviceError, match=f"no GPU {index}; torch sees 2"):
            cuda_environment(index)


def test_devices_that_nothing_runs_on(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch)
    assert environment_module.here() == cpu_environment()
    with pytest.raises(DeviceError, match="torch sees no GPU"):
        environment_for("cuda")
    with pytest.raises(DeviceError, match="no kernel runs on meta"):
        environment_for("meta")


def test_a_gpu_without_triton_says_what_to_install(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, H200)
    monkeypatch.setattr(environment_module, "TRITON_PACKAGES", ("no-such-package-of-triton",))
    with pytest.raises(DeviceError, match=r"NVIDIA H200 needs Triton.*pip install triton") as caught:
        environment_module.here()
    assert "\n" not in str(caught.value)


def test_what_the_kernels_digest_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tilecast"
    shutil.copytree(environment_module.PACKAGE / "kernels", package / "kernels")
    monkeypatch.setattr(environment_module, "PACKAGE", package)
    kernel_source_digest.cache_clear()
    try:
        before = {kind: kernel_source_digest(kind) for kind in ("cpu", "cuda")}
        for name, changed in {
            "gpu/build.py": {"cuda"},
            "gpu/target.py": {"cuda"},
            "cpu/_micro.py": {"cpu"},
            "routing.py": {"cpu", "cuda"},
            "reference.py": set(),
        }.items():
            path = package / "kernels" / name
            text = path.read_text()
            path.write_text(text + "# changed\n")
            kernel_source_digest.cache_clear()
            assert {kind for kind in before if kernel_source_digest(kind) != before[kind]} == changed, name
            path.write_text(text)
    finally:
        kernel_source_digest.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_this_gpu() -> None:
    here = cuda_environment()
    assert here.device == torch.cuda.get_device_name()
    assert here.units > 0 and here.llc_bytes > 0 and here.driver and here.compiler != "absent"
    assert target_of(here) is not None

"""Calibrations: probed once, kept, believed only where they are whole and this device's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.autotune.shared import HERE, LAYER
from tilecast.autotune import calibrate as module
from tilecast.autotune.calibrate import (
    Calibration,
    GpuProbe,
    calibrate,
    calibration_file,
    calibration_for,
    device_key,
    is_here,
    library_flops_s,
    load_calibration,
    nominal,
)
from tilecast.autotune.clock import HostClock
from tilecast.autotune.contention import Reading
from tilecast.autotune.costs import (
    code_of,
    expected_check_s,
    expected_compile_s,
    expected_pack_s,
    expected_sample_s,
    expected_warming_s,
)
from tilecast.environment import cpu_environment
from tilecast.errors import InputError
from tilecast.kernels.gpu.target import TARGETS
from tilecast.problem import TileConfig


class FixedProbe:
    """A device with round figures, which counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def memory_bytes_s(self) -> float:
        self.asked += 1
        return 20e9

    def cache_bytes_s(self) -> float:
        return 10e9

    def flops_s(self) -> dict[str, float]:
        return {"fma": 200e9, "library_bf16": 20e9}

    def launch_us(self) -> float:
        return 4.0


class Watch:
    """Counters of a second in which others used a part of two CPUs."""

    def __init__(self, stolen: float) -> None:
        self._stolen = stolen

    def read(self) -> Reading | None:
        return Reading(0.0, 0.0, 0.0)

    def stolen(self, start: Reading | None, end: Reading | None) -> float | None:
        return self._stolen


def kept(folder: Path, probe: FixedProbe, stolen: float = 0.0, **changes: Any) -> Calibration:
    watch: Any = Watch(stolen)
    return calibration_for(replace(HERE, **changes), folder=folder, probe=probe, watch=watch)


def test_a_probe_is_made_once_for_a_device_whatever_the_kernels(tmp_path: Path) -> None:
    probe = FixedProbe()
    first = kept(tmp_path, probe)
    assert kept(tmp_path, probe) == first == kept(tmp_path, probe, kernel_source="1" * 64)
    assert probe.asked == 1
    assert first.cache_bytes_s == first.memory_bytes_s, "a cache is not slower than memory"
    kept(tmp_path, probe, device="another")
    assert probe.asked == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 1}', "x" * (1 << 17), "negative", "infinite", "foreign", "format", "nominal"],
)
def test_a_broken_or_foreign_file_is_probed_again(tmp_path: Path, text: str) -> None:
    probe = FixedProbe()
    good = kept(tmp_path, probe)
    path = calibration_file(tmp_path, HERE)
    changes: dict[str, dict[str, object]] = {
        "negative": {"launch_us": -1.0}, "infinite": {"flops_s": {"fma": float("inf")}},
        "foreign": {"device": "0" * 64}, "format": {"format": 99}, "nominal": {"source": "nominal"},
    }  # fmt: skip
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes[text]}) if text in changes else text)
    assert load_calibration(tmp_path, HERE) is None
    assert kept(tmp_path, probe) == good and probe.asked == 2
    assert load_calibration(tmp_path, HERE) == good


def test_what_was_probed_beside_a_busy_process_is_probed_again_when_it_is_quiet(tmp_path: Path) -> None:
    probe = FixedProbe()
    disturbed, floor = kept(tmp_path, probe, stolen=0.5), nominal(HERE)
    assert disturbed.memory_bytes_s == max(20e9, floor.memory_bytes_s) and disturbed.source == "mixed"
    assert disturbed.flops_s == {"fma": max(200e9, floor.flops_s["fma"]), "library_bf16": 20e9}
    assert kept(tmp_path, probe, stolen=0.5) == disturbed and probe.asked == 1
    quiet = kept(tmp_path, probe)
    assert (quiet.source, quiet.memory_bytes_s, probe.asked) == ("probe", 20e9, 2)
    assert kept(tmp_path, probe, stolen=0.5) == quiet and probe.asked == 2


def test_a_folder_that_cannot_be_written_costs_a_probe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "calibration").write_text("a file in the way")
    assert kept(tmp_path, FixedProbe()).memory_bytes_s == 20e9
    assert "not kept" in caplog.text


def test_a_device_that_is_not_here_has_its_datasheet() -> None:
    for target in TARGETS:
        environment = target.environment()
        if is_here(environment):
            continue
        found = calibration_for(environment)
        assert found == nominal(environment) and found.source == "nominal"
        assert found.flops_s["tensor"] > found.flops_s["simt"]
    assert nominal(HERE).flops_s["fma"] < nominal(replace(HERE, units=8)).flops_s["fma"]
    assert not is_here(HERE) and is_here(cpu_environment())


def test_a_calibration_round_trips_and_refuses_nonsense() -> None:
    found = calibrate(HERE, probe=FixedProbe())
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.device == device_key(HERE)
    for name, value in (("launch_us", 0.0), ("memory_bytes_s", float("nan")), ("flops_s", {"fma": -1.0})):
        with pytest.raises(InputError, match="expected a number above 0"):
            replace(found, **{name: value})  # type: ignore[arg-type]


def test_a_gpu_is_probed_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(HostClock):
        """Every launch takes 100 µs, and is really made."""

        launches = 0

        def time(self, launches: Any) -> float:
            super().time(launches)
            Fixed.launches += len(launches)
            return 100.0

    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(module, "MATMUL_SIZES", {"tensor": 64, "simt": 32})
    monkeypatch.setattr(module, "COPY_BYTES", 1 << 16)
    environment = replace(HERE, device_kind="cuda", llc_bytes=1 << 14)
    found = calibrate(environment, probe=GpuProbe(environment, Fixed(), torch.device("cpu")))
    assert found.memory_bytes_s == pytest.approx(2 * (1 << 16) / 100e-6)
    assert found.flops_s == pytest.approx({"tensor": 2 * 64**3 / 100e-6, "simt": 2 * 32**3 / 100e-6})
    assert found.launch_us == pytest.approx(100.0)
    assert Fixed.launches == 1 + 16 + 2 + 32


def test_the_library_has_a_rate() -> None:
    assert 1e7 < library_flops_s("fp32") < 1e15


def test_costs_of_tuning_grow_with_what_causes_them() -> None:
    found = calibrate(HERE, probe=FixedProbe())
    assert expected_sample_s(40_000, found) == pytest.approx(0.04015)
    assert expected_sample_s(10_000, found) == pytest.approx(2 * 0.01015), "24 ms of launches, nearly"
    assert expected_sample_s(10, found) == pytest.approx(64 * (10 + 150) / 1e6)
    first, later = (expected_check_s(LAYER.up, 64, 1000.0, found, first=flag) for flag in (True, False))
    assert first > later > 0.002
    assert expected_pack_s(LAYER.up, found, copies=4) == pytest.approx(4 * expected_pack_s(LAYER.up, found))
    assert 0 < expected_compile_s(LAYER.up, processes=2) < expected_compile_s(LAYER.up)
    assert expected_compile_s(replace(LAYER, dtype="bf16").down) > expected_compile_s(LAYER.up), "into two dtypes"
    alike = (
        TileConfig("llvm.moe_gemm", {"mr": 4, "block_n": 64}),
        TileConfig("llvm.moe_gemm", {"mr": 4, "block_n": 256}),
    )
    assert code_of(alike[0]) == code_of(alike[1]) != code_of(alike[0].with_params(mr=2))
    assert expected_warming_s(1e5) == 0 and expected_warming_s(1e3) == pytest.approx(2e-3)

"""GPUs that are not there, told by what `torch.cuda` would say of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tilecast import environment as environment_module


@dataclass(frozen=True)
class Properties:
    """What `torch.cuda.get_device_properties` returns, as far as it is read."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    L2_cache_size: int
    gcnArchName: str


H200 = Properties("NVIDIA H200", 9, 0, 132, 50 << 20, "NVIDIA H200")
L40S = Properties("NVIDIA L40S", 8, 9, 142, 96 << 20, "NVIDIA L40S")
MI300X = Properties("AMD Instinct MI300X", 9, 4, 304, 4 << 20, "gfx942:sramecc+:xnack-")


class Gpus:
    """The part of `torch.cuda` that an environment is read from, over given devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *devices: Properties, hip: str | None = None) -> None:
        self.devices = devices
        self.current = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(self.devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.devices))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: self.devices[index])
        monkeypatch.setattr(torch.version, "hip", hip)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Environments read anew, drivers from files under the returned folder, of which there are none yet."""
    monkeypatch.setattr(environment_module, "DRIVER_FILES", (tmp_path / "nvidia", tmp_path / "amdgpu"))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 0, raising=False)
    environment_module._cuda_environment.cache_clear()
    yield tmp_path
    environment_module._cuda_environment.cache_clear()

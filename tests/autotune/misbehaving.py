"""A measurer whose configs hang, crash and raise, each in its own way, and one that tells of the process it is in."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tilecast.autotune.gate import Verdict
from tilecast.errors import DeviceError
from tilecast.problem import ExpertGemm, TileConfig

KERNEL = "test.behaviour"


def behaving(does: str, number: int = 0) -> TileConfig:
    return TileConfig(KERNEL, {"does": does, "number": number})


class Misbehaving:
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.prepared: list[str] = []
        self.note("started")

    def note(self, text: str) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(text + "\n")

    def prepare(self, gemm: ExpertGemm) -> None:
        if gemm.layer.experts == 3:
            raise DeviceError("no room for three experts")
        self.prepared.append(gemm.name)
        self.note(f"prepared {gemm.name}")

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        self.act(str(config["does"]))
        return Verdict(error_ratio=0.5)

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        if config["does"] == "threads":
            return (float(torch.get_num_threads()), float(os.getpid()))
        self.act(str(config["does"]))
        return tuple(float(tokens * 100 + round * 10 + i) for i in range(count))

    def sample_together(
        self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig], *, round: int, count: int
    ) -> list[tuple[float, ...]]:
        return [self.sample(gemm, tokens, config, round=round, count=count) for config in configs]

    def act(self, does: str) -> None:
        if does == "hang":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            self.note(f"child {child.pid}")
            time.sleep(600)
        elif does == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif does == "oom":
            os.kill(os.getpid(), signal.SIGKILL)
        elif does == "exit":
            print("the library gave up", file=sys.stderr, flush=True)
            os._exit(7)
        elif does == "memory":
            bytearray(1 << 60)
        elif does == "key":
            raise KeyError("block_m")
        elif does == "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        elif does == "log":
            logging.getLogger("tilecast.test").warning("slow clock: %d MHz", 120)

    def release(self, gemm: ExpertGemm) -> None:
        self.note(f"released {gemm.name}")

"""Code that several processes compile at once, and what becomes of it where they cannot."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.cases import operands
from tilecast.autotune.measure import MAX_REPEATS, DeviceMeasurer, Prepared
from tilecast.environment import cpu_environment
from tilecast.kernels.cpu import jit
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertLayer

LAYER = ExpertLayer(hidden=80, intermediate=48, experts=2, top_k=1, dtype="fp32")
KERNEL = MoeGemm()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one process compiles")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILECAST_CACHE_DIR", str(tmp_path))
    jit.load_variant.cache_clear()
    return tmp_path / "kernels"


class Making:
    """Loads of pretended code: each leaves a file that says which process made it."""

    def __init__(self, folder: Path, *, slow: str = "", broken: str = "") -> None:
        self.folder, self.slow, self.broken = folder, slow, broken

    def load(self, name: str) -> Callable[[], None]:
        def make() -> None:
            if name == self.broken:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == self.slow:
                time.sleep(60)
            (self.folder / name).write_text(str(os.getpid()))

        def load() -> None:
            if not (self.folder / name).exists():
                raise jit.NotCompiled(make, name)

        return load

    def makers(self) -> dict[str, int]:
        return {path.name: int(path.read_text()) for path in self.folder.iterdir()}


def test_shares_are_made_by_different_processes_and_equal_code_once(tmp_path: Path) -> None:
    making = Making(tmp_path)
    elsewhere = jit.compile_together([making.load(name) for name in "abacad"], 2)
    makers = making.makers()
    assert set(makers) == set("abcd") and len(set(makers.values())) == 2 and elsewhere == 2
    assert [name for name, pid in sorted(makers.items()) if pid == os.getpid()] == ["a", "c"]
    assert jit.compile_together([making.load(name) for name in "abcd"], 2) == 0, "nothing is left to do"


def test_what_breaks_or_hangs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "LATE_S", 0.3)
    children: list[int] = []

    def forked(makes: Sequence[Callable[[], object]]) -> int:
        children.append(fork(makes))
        return children[-1]

    fork = jit._forked
    monkeypatch.setattr(jit, "_forked", forked)
    making = Making(tmp_path, slow="b", broken="c")
    start = time.monotonic()
    jit.compile_together([making.load(name) for name in "abc"], 3)
    assert set(making.makers()) == {"a"} and time.monotonic() - start < 30
    assert len(children) == 2
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_what_a_load_raises_waits_for_the_launch(tmp_path: Path) -> None:
    def refused() -> None:
        raise ValueError("no such tile")

    making = Making(tmp_path)
    assert jit.compile_together([refused, making.load("a"), making.load("b")], 2) == 1
    assert jit._rules.compiles, "loads compile again"


def test_a_measurer_has_the_gates_launches_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(KERNEL, Prepared)
    here = cpu_environment()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    measurer = DeviceMeasurer(here, Registry((KERNEL,)))
    first = KERNEL.default(LAYER.down, 4, here)
    configs = [first, first.with_params(mr=1), first.with_params(mr=2), first.with_params(block_k=512)]
    measurer.compile(LAYER.down, configs)
    assert len(list(cache.glob("*.o"))) == 3, "of one dtype: two of the configs run the same code"

    measurer._workload.inputs(LAYER.down, 4, 0)  # Sorting is code of its own.

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(jit, "optimised", refuse)
    for config in configs:
        assert measurer.check(LAYER.down, 4, config).status == "ok"
    with pytest.raises(AssertionError, match="compiled again"):
        measurer.check(LAYER.down, 4, first.with_params(mr=3))


def test_bits_do_not_depend_on_who_compiled(cache: Path) -> None:
    given = operands(LAYER, 5)
    config = KERNEL.default(LAYER.up, 5, cpu_environment())
    alone = torch.empty(5, 48)
    KERNEL.up(config, given.hidden, KERNEL.pack(given.up, KERNEL.layout(LAYER.up, config)), given.route, alone)
    for path in cache.glob("*.o"):
        path.unlink()
    jit.load_variant.cache_clear()
    packed = KERNEL.pack(given.up, KERNEL.layout(LAYER.up, config))
    other = config.with_params(mr=1)
    jit.compile_together([lambda c=c: KERNEL.prepare(c, packed, torch.float32) for c in (other, config)], 2)  # type: ignore[misc]
    assert len(list(cache.glob("*.o"))) == 2
    together = torch.empty(5, 48)
    KERNEL.up(config, given.hidden, packed, given.route, together)
    assert torch.equal(alone, together)


class Counting:
    """A clock that counts launches, and says that each took 100 µs."""

    def __init__(self) -> None:
        self.launches: list[int] = []

    def time(self, launches: Sequence[Callable[[], None]]) -> float:
        self.launches.append(len(launches))
        return 100.0


@pytest.mark.parametrize(
    ("gate_us", "before", "repeats"),
    [(0.0, [1, 1], MAX_REPEATS), (6_000.0, [1, 1], MAX_REPEATS), (8_000.0, [], 3), (40_000.0, [], 1)],
)
def test_what_took_long_in_the_gate_is_not_launched_again_to_see_how_long_it_takes(
    gate_us: float, before: list[int], repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, here = Counting(), cpu_environment()
    measurer = DeviceMeasurer(here, Registry((KERNEL,)), clock=clock)
    config = KERNEL.default(LAYER.up, 4, here)
    assert measurer.check(LAYER.up, 4, config).status == "ok"
    assert measurer._gate.launch_us(LAYER.up, 4, config) > 0
    assert measurer._gate.launch_us(LAYER.up, 5, config) == 0
    monkeypatch.setattr(measurer._gate, "launch_us", lambda *_: gate_us)
    assert measurer.sample(LAYER.up, 4, config, round=0, count=2) == (100.0, 100.0)
    assert clock.launches == [*before, repeats, repeats]
    measurer.sample(LAYER.up, 4, config, round=1, count=1)
    assert clock.launches == [*before, repeats, repeats, repeats], "asked once"

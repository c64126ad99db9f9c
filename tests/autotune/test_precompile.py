from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cases import SMALL, operands
from tests.kernels.gpu.test_experts import VARIANTS
from tests.torch_kernel import TorchKernel
from tilecast.autotune.precompile import COMPILED_ONLY, Precompiler, _triton_target
from tilecast.environment import cpu_environment
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.grouped import Grouped
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.target import Target, parse_target
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig
from tilecast.settings import child_environment

pytest.importorskip("triton", reason="Triton is not installed")

SEVERAL = ExpertLayer(hidden=272, intermediate=264, experts=4, top_k=2)
ROOT = Path(__file__).parents[2]
HERE = parse_target("cuda:90").environment()
TILE = {"block_m": 16, "block_n": 64, "block_k": 64, "group_m": 4, "num_warps": 4, "num_stages": 3, "swap": 0}
GROUPED = TileConfig(Grouped.name, TILE)


class Building:
    """A kernel whose builds do not compile, or end the process that tries."""

    device_kind = "cuda"
    name = "test.building"

    def builds(
        self, gemm: ExpertGemm, config: TileConfig, target: Target, *, out_dtype: str | None = None
    ) -> tuple[Build, ...]:
        return (
            Build(
                module=f"tests.kernels.gpu.{config['module']}", function="broken", num_warps=4, num_stages=1,
                signature=(("source", "*fp32"),), constants=(("BLOCK", 16),),
            ),
        )  # fmt: skip


BROKEN = TileConfig(Building.name, {"module": "static_kernels"})
KILLER = TileConfig(Building.name, {"module": "static_killer"})
KNOWN = Registry((Building(), Grouped()))  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    yield tmp_path / "triton"


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled_ahead(cache: Path) -> None:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.autotune.compiled_launches", "grouped", "tma"],
        capture_output=True, text=True, timeout=200, cwd=ROOT,
        env=child_environment({"PYTHONPATH": path}, without=("TRITON_INTERPRET",)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == [None] * 4
    *launched, control = found["hits"]
    assert {name.split()[0] for name, _ in launched} == {"grouped", "tma"}
    assert [name for name, hit in launched if not hit] == []
    assert control == ["control grouped", False]


def test_what_fails_is_told_in_one_line_and_the_next_one_compiles(cache: Path) -> None:
    with Precompiler(KNOWN, HERE, workers=1) as ahead:
        ahead.submit(SMALL.up, [BROKEN, KILLER])
        refused = ahead.wait(SMALL.up, BROKEN)
        assert refused is not None and "no_such_name" in refused and "\n" not in refused
        assert ahead.wait(SMALL.up, KILLER) is None, "being killed says nothing about the build"
        assert not list(cache.rglob("*.cubin"))
        assert ahead.wait(SMALL.up, GROUPED) is None, "what was not submitted is compiled when waited for"
        assert list(cache.rglob("*.cubin"))


def test_equal_builds_compile_once_and_nobody_waits_for_a_closed_pool(cache: Path) -> None:
    ahead = Precompiler(KNOWN, HERE, workers=1)
    ahead.submit(SMALL.up, [GROUPED, GROUPED])
    assert len(ahead._jobs) == 1
    ahead.submit(SMALL.down, [GROUPED])
    # The GEMM, whose output is float32 either way, and a sum over the slots into each dtype.
    assert len(ahead._jobs) == 4
    ahead.close()
    assert ahead.wait(SMALL.down, GROUPED) is None
    ahead.close()


def test_on_a_cpu_and_for_kernels_that_compile_nothing_there_is_nothing_to_do() -> None:
    kernel = TorchKernel()
    for environment in (cpu_environment(), HERE):
        with Precompiler(Registry((kernel, Grouped())), environment) as ahead:
            ahead.submit(SMALL.up, [kernel.config()])
            assert ahead.wait(SMALL.up, kernel.config()) is None
            assert ahead._pool is None


def test_code_is_for_the_very_device() -> None:
    assert _triton_target(parse_target("cuda:100"), "sm_103") == ["cuda", 103, 32]
    assert _triton_target(parse_target("gfx942"), "gfx942") == ["hip", "gfx942", 64]


def variant(**params: int) -> TileConfig:
    return TileConfig(Grouped.name, {**TILE, **params})


def test_equal_machine_code_is_told_and_only_that(cache: Path) -> None:
    layer = ExpertLayer(hidden=512, intermediate=192, experts=4, top_k=2)
    one_step = [variant(block_k=256, num_stages=stages) for stages in (3, 4)]
    several = [variant(block_k=64, num_stages=stages) for stages in (3, 4)]
    with Precompiler(KNOWN, HERE, workers=2) as ahead:
        assert ahead.code(layer.down, one_step[0]) is None, "what is not compiled yet has no code"
        for config in (*one_step, *several):
            assert ahead.wait(layer.down, config) is None
        codes = [ahead.code(layer.down, config) for config in (*one_step, *several)]
        assert ahead.wait(layer.down, BROKEN) is not None
        assert ahead.code(layer.down, BROKEN) is None
    assert codes[0] is not None and codes[0] == codes[1], "a single step of K has nothing to pipeline"
    assert len({*codes}) == 3


@pytest.mark.parametrize("name", ["grouped", "persistent", "tma", "tma persistent", "decode", "split-K"])
def test_nothing_but_code_depends_on_what_duplicates_may_differ_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, config = VARIANTS[name]
    differing = {"group_m": 1, "num_stages": 2} if "group_m" in dict(config.params) else {"num_stages": 2}
    assert set(differing) <= set(COMPILED_ONLY)
    other = config.with_params(**differing)
    launched = [launches(kernel, c, monkeypatch) for c in (config, other)]
    assert config != other and launched[0] and launched[0] == launched[1]
    walks = dict(config.params).get("waves") == 1
    more = config.with_params(waves=2) if walks else config.with_params(block_n=config.integer("block_n") // 2)
    assert launches(kernel, more, monkeypatch) != launched[0], "other parameters do change the launch"


def launches(kernel: TritonExperts, config: TileConfig, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the grid and the arguments' shapes of every launch of up and down."""
    seen: list[object] = []

    def launch(build: Build, grid: tuple[int, ...], device: torch.device, *arguments: object) -> None:
        seen.append((build.function, grid, [described(argument) for argument in arguments]))

    tokens = 4 if kernel.name == Decode.name else 23
    given = operands(SEVERAL, tokens)
    with monkeypatch.context() as patched:
        patched.setattr(Build, "launch", launch)
        out = torch.empty(tokens * SEVERAL.top_k, SEVERAL.intermediate, dtype=given.hidden.dtype)
        kernel.up(config, given.hidden, given.up, given.route, out)
        out = torch.empty(tokens, SEVERAL.hidden, dtype=given.hidden.dtype)
        kernel.down(config, given.intermediate, given.down, given.route, given.topk_weights, out)
    return seen


def described(argument: object) -> object:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape
    shape = getattr(argument, "block_shape", None)
    return argument if shape is None else (tuple(argument.shape), tuple(argument.strides), tuple(shape))  # type: ignore[attr-defined]

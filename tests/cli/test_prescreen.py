"""`tilecast prescreen` on a small GPU kernel of its own, with the compiler replaced but for one test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SPEC, Command
from tests.torch_kernel import TorchKernel
from tilecast import kernels
from tilecast.environment import Environment
from tilecast.kernels import static
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.target import Target
from tilecast.kernels.spec import Registry
from tilecast.kernels.static import Report
from tilecast.problem import ExpertGemm, TileConfig

BLOCKS = (16, 32, 48, 64)


class SmallKernel(TorchKernel):
    """Proposes column tiles; a block of 48 is invalid. `group` changes a constant that no code depends on."""

    device_kind = "cuda"

    def __init__(self) -> None:
        super().__init__(name="triton.small")
        self.domain = {"block": BLOCKS, "group": (1, 8)}

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        return "no bias" if gemm.layer.bias else None

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        for block in BLOCKS:
            for group in (1, 8):
                yield TileConfig(self.name, {"block": block, "group": group})

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        return TileConfig(self.name, {"block": 32, "group": 1})

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        return "48 is no power of two" if config["block"] == 48 else None

    def layout(self, gemm: ExpertGemm, config: TileConfig) -> str:
        return "plain"

    def builds(
        self, gemm: ExpertGemm, config: TileConfig, target: Target, *, layout: str = "plain"
    ) -> tuple[Build, ...]:
        main = Build(
            module="tests.kernels.gpu.static_kernels", function="copy",
            signature=(("source", "*bf16"), ("target", "*bf16"), ("count", "i32")),
            constants=(("BLOCK", 16 * config.integer("block")), ("UNUSED", config.integer("group"))),
            num_warps=4, num_stages=1,
        )  # fmt: skip
        return (main,)


Compiled = list[tuple[Build, ...]]


def products(build: Build) -> dict[str, Any]:
    """Block 64 needs too much memory, 16 does not compile, the group changes no code."""
    block = int(str(dict(build.constants)["BLOCK"])) // 16
    if block == 16:
        return {"error": "PassManager::run failed"}
    return {
        "instructions": {"wgmma m64n64k16 f32.bf16.bf16": 4}, "registers": 100, "threads": 128,
        "machine_code": f"{block}", "code_bytes": 2048, "shared_bytes": 300_000 if block == 64 else 1024,
    }  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "registry", Registry((MoeGemm(), SmallKernel())))


@pytest.fixture
def compiled(small: None, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """What was given to the compiler."""
    asked: Compiled = []

    def instead(builds: Sequence[Build], target: Target, **options: Any) -> list[Report]:
        asked.append(tuple(builds))
        options["progress"](len(builds), len(builds))
        return [Report(build=build.digest, target=target.name, **products(build)) for build in builds]

    monkeypatch.setattr(static, "analyse", instead)
    return asked


def test_every_config_is_judged(cli: Command, compiled: Compiled) -> None:
    done = cli("prescreen", SPEC, "--target", "cuda:90", "--tokens", "1,16", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert document["target"] == "cuda:90"
    assert len(document["configs"]) == 2 * 2 * 8, "two GEMMs, two token counts"
    (asked,) = compiled
    assert len(asked) == len(set(asked)) == 6, "equal builds are compiled once, invalid configs never"
    of = {
        (config["config"]["params"]["block"], config["config"]["params"]["group"]): config
        for config in document["configs"]
        if config["gemm"] == "up" and config["tokens"] == 16
    }
    assert of[48, 1]["reason"] == "48 is no power of two"
    assert of[48, 1]["kernels"] == []
    assert "PassManager" in of[16, 1]["reason"]
    assert "300000" in of[64, 8]["reason"]
    assert of[32, 1]["valid"]
    assert of[32, 1]["same_code_as"] is None
    assert of[32, 8]["same_code_as"]["params"] == {"block": 32, "group": 1}
    assert document["summary"]["valid"] == 8
    assert document["summary"]["duplicates"] == 4


def test_the_table_names_reasons_and_duplicates(cli: Command, compiled: Compiled) -> None:
    done = cli("prescreen", "--layer", SPEC, "--tokens", "16")
    assert done.code == 0
    text = " ".join(done.out.split())
    assert "E4 H64 I96 top2 bf16 up, 16 tokens" in text
    assert "wgmma m64n64k16" in text
    assert "48 is no power of two" in text
    assert "same code as" in text
    assert "cuda:90: 4 of 16 configs valid, 2 of them with the same code as another; 6 kernels" in text


def test_a_limit_keeps_the_default_first(cli: Command, compiled: Compiled) -> None:
    document = json.loads(cli("prescreen", SPEC, "--tokens", "1", "--limit", "1", "--json").out)
    assert [config["config"]["params"]["block"] for config in document["configs"]] == [32, 32]


def test_a_default_that_is_another_kernels_is_left_to_that_kernel(
    cli: Command, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = TileConfig("triton.other", {"lanes": 4})
    monkeypatch.setattr(SmallKernel, "default", lambda *arguments, **like: other)
    document = json.loads(cli("prescreen", SPEC, "--tokens", "1", "--json").out)
    assert {config["config"]["kernel"] for config in document["configs"]} == {"triton.small"}


def test_a_kernel_that_refuses_says_why(cli: Command, compiled: Compiled) -> None:
    done = cli("prescreen", f"{SPEC},bias=true", "--tokens", "1")
    assert done.code == 6
    assert "E4 H64 I96 top2 bf16 bias up: not triton.small: no bias" in done.out
    assert "triton.small: no bias" in done.err.splitlines()[-1]


def test_nothing_valid_is_6(cli: Command, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: SmallKernel, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str:
        return "never"

    monkeypatch.setattr(SmallKernel, "invalid", refuse)
    done = cli("prescreen", SPEC, "--tokens", "1")
    assert done.code == 6
    assert "tilecast: no config is valid for cuda:90; most often: never" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--target", "cuda:42"), 3, "cuda:90"),
        (("--kernel", "triton.none"), 3, "triton.small"),
        (("--kernel", "llvm.moe_gemm"), 3, "triton.small"),
        (("--tokens", "x"), 2, "--tokens"),
        (("--limit", "0"), 2, "--limit"),
        (("--layer", SPEC), 2, "both"),
    ],
)
def test_what_does_not_fit_is_refused(
    cli: Command, compiled: Compiled, arguments: tuple[str, ...], code: int, word: str
) -> None:
    done = cli("prescreen", SPEC, *arguments)
    assert done.code == code
    assert done.out == ""
    assert word in done.err.splitlines()[-1]
    assert not compiled


def test_a_gemm_without_products_is_refused_and_kept_reports_are_found(
    cli: Command, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real compiler, once: `copy` multiplies nothing, so in fp32 it may run and in bf16 not."""
    monkeypatch.setenv("TILECAST_CACHE_DIR", str(tmp_path))
    arguments = ("--tokens", "1", "--limit", "1", "--workers", "1")
    done = cli("prescreen", SPEC, *arguments)
    assert done.code == 6
    assert "no tensor-core instruction" in done.err
    assert len(list(tmp_path.rglob("*.json"))) == 1
    monkeypatch.delattr(static, "Compilers")
    again = cli("prescreen", f"{SPEC},dtype=fp32", *arguments)
    assert again.code == 0, again.err
    assert "2 of 2 configs valid" in again.out

"""What the command-line tests share: running commands here or in a process, and small tables."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import programs
from tests.cache_folders import cache_folder
from tilecast.cache_store.bundle import export_table
from tilecast.cli.app import app
from tilecast.engine.runtime import forget_table
from tilecast.environment import Environment, cpu_environment
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.kernels import registry
from tilecast.kernels.spec import numerics_class
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig, buckets
from tilecast.settings import child_environment

SPEC = "E=4,H=64,I=96,k=2"
LAYER = ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2)
VARIABLES = ("IMPORT", "EXPORT", "TUNE", "MISS", "WARN_CACHE_MISS", "POLICY", "RECORD", "ROUTING")


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    def failed(self, code: int, *words: str) -> None:
        """Check that it failed as designed: one line on standard error, nothing on standard output."""
        assert self.code == code, (self.out, self.err)
        assert self.out == ""
        line, *others = self.err.splitlines()
        assert not others
        assert line.startswith("tilecast: ")
        for word in words:
            assert word in line


Command = Callable[..., Done]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TILECAST_CACHE_DIR", str(cache_folder(tmp_path_factory.getbasetemp() / "cache")))
    for name in VARIABLES:
        monkeypatch.delenv(f"TM_GEMM_{name}", raising=False)
    yield
    forget_table()


@pytest.fixture
def cli() -> Command:
    """Run a command in this process."""

    def run(*arguments: str | Path) -> Done:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tilecast")
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def process() -> Command:
    """Run a command in a process of its own."""

    def run(*arguments: str | Path, **variables: str) -> Done:
        done = programs.run(
            "tilecast", *arguments, environment=child_environment({"OMP_NUM_THREADS": "1", **variables})
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def two_ranks(*each: list[str]) -> list[tuple[int, str, str]]:
    """Run a command on each of two ranks, as a launcher would that kills nobody; return how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank, arguments in enumerate(each):
        launched = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = child_environment({**launched, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"})
        running.append(programs.start("tilecast", *arguments, environment=environment))
    ended = [program.ended(90) for program in running]
    return [(done.returncode, done.stdout, done.stderr) for done in ended]


def choice_of(gemm: ExpertGemm, config: TileConfig, environment: Environment) -> Choice:
    kernel = registry[config.kernel]
    return Choice(
        config=config, p50_us=80.0, default=config, default_us=100.0,
        numerics=numerics_class(kernel, gemm, config, environment),
    )  # fmt: skip


def table_of(
    layer: ExpertLayer = LAYER,
    tokens: tuple[int, ...] = (1, 4),
    *,
    changes: dict[str, int] | None = None,
    certificate: str = "hardware",
    **fields: object,
) -> TuningTable:
    """Return a table of default configs, with changed parameters, made here or where `fields` differ."""
    here = cpu_environment()
    there = replace(here, **fields)  # type: ignore[arg-type]
    anchors = {gemm: registry.default_kernel(gemm, here).default(gemm, tokens[0], here) for gemm in layer.gemms}
    decisions = []
    for bucket in buckets(tokens):
        up, down = (
            choice_of(
                gemm,
                registry[anchor.kernel].default(gemm, bucket.tokens, here, like=anchor).with_params(**(changes or {})),
                here,
            )
            for gemm, anchor in anchors.items()
        )
        decisions.append(
            Decision(
                environment=there.digest,
                layer=layer,
                bucket=bucket,
                policy="reproducible",
                routing="uniform",
                certificate=certificate,
                up=up,
                down=down,
            )
        )
    return TuningTable((there,), tuple(decisions))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """An exported table for the small layer, made here."""
    path = tmp_path / "table.db"
    export_table(table_of(), path)
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An exported table made on another CPU."""
    path = tmp_path / "foreign.db"
    export_table(table_of(device="another CPU"), path)
    return path


@pytest.fixture
def impossible(tmp_path: Path) -> Path:
    """An exported table whose configs need more registers than any CPU has."""
    path = tmp_path / "impossible.db"
    export_table(table_of(changes={"mr": 14, "nv": 8}), path)
    return path

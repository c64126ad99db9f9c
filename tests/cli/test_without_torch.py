"""What only looks at tables answers at once: torch is not imported, here it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import LAYER, SPEC, Done
from tilecast.cache_store.bundle import export_table
from tilecast.cache_store.store import open_store
from tilecast.environment import cpu_environment
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.kernels import registry
from tilecast.kernels.spec import numerics_class
from tilecast.problem import ExpertGemm, buckets
from tilecast.settings import child_environment

BLOCKED = """
import sys
sys.modules["torch"] = None
from tilecast.cli import main
sys.argv = ["tilecast", *sys.argv[1:]]
main()
"""


def without_torch(*arguments: str | Path) -> Done:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, arguments)],
        env=child_environment({}), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def choice(gemm: ExpertGemm, *, us: float = 100.0) -> Choice:
    environment = cpu_environment()
    kernel = registry.default_kernel(gemm, environment)
    config = kernel.default(gemm, 1, environment)
    numerics = numerics_class(kernel, gemm, config, environment)
    return Choice(config=config, p50_us=us, default=config, default_us=us, noise=0.01, numerics=numerics)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one layer's decisions and what they rest on."""
    path, environment = tmp_path_factory.mktemp("store") / "store.db", cpu_environment()
    up, down = (choice(gemm) for gemm in LAYER.gemms)
    with open_store(path) as opened:
        opened.add_environment(environment)
        opened.put_decisions(
            Decision(
                environment=environment.digest, layer=LAYER, bucket=bucket, policy="reproducible", up=up, down=down
            )
            for bucket in buckets((1, 4))
        )
        opened.add_measurements(
            Measurement(
                environment=environment.digest, gemm=gemm, tokens=tokens, config=chosen.config,
                samples_us=(100.0, 100.0, 100.0), measured_at=1.0,
            )
            for gemm, chosen in zip(LAYER.gemms, (up, down), strict=True) for tokens in (1, 4)
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def table(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "table.db"
    done = without_torch("cache", "export", store, path, "--measurements")
    assert (done.code, done.err) == (0, ""), done
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A table of the same layer with other times."""
    path, environment = tmp_path / "other.db", cpu_environment()
    up, down = (choice(gemm, us=50.0) for gemm in LAYER.gemms)
    decision = Decision(
        environment=environment.digest, layer=LAYER, bucket=buckets((8,))[0], policy="reproducible", up=up, down=down
    )
    export_table(TuningTable((environment,), (decision,)), path)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("cache", "--help"),
        ("cache", "verify", "--help"),
        ("tune", "--help"),
        ("cache", "show", "TABLE"),
        ("cache", "show", "TABLE", "--json"),
        ("cache", "explain", "TABLE", "1", "4"),
        ("cache", "explain", "TABLE", SPEC, "3", "--json", "--all"),
        ("cache", "explain", "STORE", "1", "4"),
        ("cache", "coverage", SPEC, "TABLE", "--tokens", "1,4"),
        ("cache", "diff", "TABLE", "TABLE"),
        ("cache", "export", "TABLE", "OUT", "--here"),
        ("cache", "import", "TABLE", "--store", "OUT"),
        ("cache", "import", "TABLE", "--store", "OUT", "--relax", "torch"),
        ("cache", "gc", "STORE", "--older-than", "90d", "--dry-run"),
    ],
    ids=" ".join,
)
def test_commands_that_look_at_tables_need_no_torch(
    arguments: tuple[str, ...], table: Path, store: Path, tmp_path: Path
) -> None:
    places = {"TABLE": str(table), "STORE": str(store), "OUT": str(tmp_path / "out")}
    done = without_torch(*(places.get(argument, argument) for argument in arguments))
    assert (done.code, done.err.count("Traceback")) == (0, 0), done
    assert done.out or done.err


def test_merging_and_linting_need_no_torch(table: Path, other: Path, tmp_path: Path) -> None:
    merged = without_torch("cache", "merge", table, other, "--out", tmp_path / "merged.db")
    assert merged.code == 0, merged
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "E=8,N=96,device_name=NVIDIA_H100.json").write_text('{"1": {"BLOCK_SIZE_M": 16}}')
    linted = without_torch("cache", "lint", folder)
    assert (linted.code, linted.err) == (1, ""), linted


def test_what_needs_torch_says_so_without_it(table: Path) -> None:
    assert without_torch("cache", "verify", table).code == 1


def test_a_command_starts_without_the_others() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from tilecast.cli.app import app\n"
        "assert CliRunner().invoke(app, ['cache', 'show', '--help']).exit_code == 0\n"
        "print(sorted(m for m in sys.modules if m.startswith('tilecast.cli.') and '._' not in m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['tilecast.cli.app', 'tilecast.cli.cache_show']"

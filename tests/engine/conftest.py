"""Every test of the engine starts and ends without a table in use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tilecast
from tests.cache_folders import cache_folder
from tilecast.engine import runtime


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("IMPORT", "EXPORT", "TUNE", "MISS", "WARN_CACHE_MISS", "POLICY", "RECORD", "ROUTING"):
        monkeypatch.delenv(f"TM_GEMM_{name}", raising=False)
    runtime.forget_table()
    yield
    runtime.forget_table()


@pytest.fixture
def registered() -> Iterator[None]:
    """Transformers knows Tilecast's experts, without options, and the empty table is in use."""
    tilecast.register_transformers()
    runtime.use_table(None)
    yield
    tilecast.register_transformers()


@pytest.fixture
def cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of the test's own."""
    folder = cache_folder(tmp_path / "cache")
    monkeypatch.setenv("TILECAST_CACHE_DIR", str(folder))
    return folder

"""The public names, pinned: a change here is a change that users see."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tilecast

PUBLIC = [
    "AgreementError",
    "Bucket",
    "CacheError",
    "ConfigError",
    "CoverageError",
    "Decision",
    "DeviceError",
    "Environment",
    "ExpertGemm",
    "ExpertLayer",
    "InputError",
    "Measurement",
    "ModelError",
    "MoeBlock",
    "PlacedExperts",
    "PreparedExperts",
    "SchemaError",
    "TensorParallelExperts",
    "TileConfig",
    "TilecastError",
    "TuningTable",
    "UsageError",
    "__version__",
    "all_reduce_ordered",
    "current",
    "export_table",
    "fused_experts",
    "import_table",
    "lookup",
    "misses",
    "place_experts",
    "prepare_experts",
    "prepare_model",
    "register_transformers",
    "restore_model",
    "shard_experts",
    "startup",
    "use_table",
]


def test_names_are_pinned_and_sorted() -> None:
    assert tilecast.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(tilecast, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(tilecast)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fused_expert'"):
        _ = tilecast.fused_expert


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, tilecast; sys.exit('torch' in sys.modules or 'sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

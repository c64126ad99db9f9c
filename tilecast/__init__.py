"""Tuned and reproducible expert GEMMs for Mixture-of-Experts models.

Names that need torch are imported at their first use, so that `import tilecast` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tilecast._version import VERSION as __version__
from tilecast.environment import Environment
from tilecast.errors import (
    AgreementError,
    CacheError,
    ConfigError,
    CoverageError,
    DeviceError,
    InputError,
    ModelError,
    SchemaError,
    TilecastError,
    UsageError,
)
from tilecast.evidence import Decision, Measurement, TuningTable
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, TileConfig

if TYPE_CHECKING:
    from tilecast.cache_store.bundle import export_table, import_table
    from tilecast.engine.agreement import startup
    from tilecast.engine.experts import MoeBlock, PreparedExperts, prepare_experts
    from tilecast.engine.functional import fused_experts
    from tilecast.engine.parallel import TensorParallelExperts, all_reduce_ordered, shard_experts
    from tilecast.engine.placement import PlacedExperts, place_experts
    from tilecast.engine.runtime import current, lookup, misses, use_table
    from tilecast.engine.transformers import prepare_model, register_transformers, restore_model

_LAZY = {
    "MoeBlock": "tilecast.engine.experts",
    "PlacedExperts": "tilecast.engine.placement",
    "PreparedExperts": "tilecast.engine.experts",
    "TensorParallelExperts": "tilecast.engine.parallel",
    "all_reduce_ordered": "tilecast.engine.parallel",
    "current": "tilecast.engine.runtime",
    "export_table": "tilecast.cache_store.bundle",
    "fused_experts": "tilecast.engine.functional",
    "import_table": "tilecast.cache_store.bundle",
    "lookup": "tilecast.engine.runtime",
    "misses": "tilecast.engine.runtime",
    "place_experts": "tilecast.engine.placement",
    "prepare_experts": "tilecast.engine.experts",
    "prepare_model": "tilecast.engine.transformers",
    "register_transformers": "tilecast.engine.transformers",
    "restore_model": "tilecast.engine.transformers",
    "shard_experts": "tilecast.engine.parallel",
    "startup": "tilecast.engine.agreement",
    "use_table": "tilecast.engine.runtime",
}


def __getattr__(name: str) -> object:
    """Import a public name at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, those not imported yet included."""
    return sorted({*globals(), *__all__})


__all__ = [
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

"""What `cache coverage` says of a table must be what serving does with it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tables import LAYER, default_config
from tilecast.cache_store.match import match
from tilecast.engine.table_index import alike_under
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.kernels import registry
from tilecast.problem import Bucket, ExpertGemm, TileConfig

HERE = cpu_environment()
PLACES = (HERE, replace(HERE, driver="older"), replace(HERE, driver="newer"), replace(HERE, device="another CPU"))
LAYERS = (LAYER, replace(LAYER, hidden=128))
LAYOUTS = ("plain", "panel16")


def config_of(gemm: ExpertGemm, layout: str) -> TileConfig:
    config = default_config(gemm, 1)
    stage = 1 if layout == "plain" else 0
    return config.with_params(layout=layout, stage=stage)


@st.composite
def tables(draw: st.DrawFn) -> TuningTable:
    """Draw series of buckets with gaps, each of one weight layout, of several environments."""
    found = []
    for place in PLACES:
        for layer in draw(st.lists(st.sampled_from(LAYERS), unique=True)):
            layout = draw(st.sampled_from(LAYOUTS))
            up, down = (
                Choice(config=config_of(g, layout), p50_us=1.0, default=default_config(g, 1), default_us=1.0)
                for g in layer.gemms
            )
            edges = sorted(draw(st.sets(st.integers(0, 12), min_size=2, max_size=5)))
            found += [
                Decision(
                    environment=place.digest, layer=layer, bucket=Bucket(above=low, tokens=high),
                    policy="reproducible", up=up, down=down,
                )
                for low, high in pairwise(edges)
                if draw(st.booleans())
            ]  # fmt: skip
    return TuningTable(PLACES, tuple(found))


@given(tables())
@settings(max_examples=60, deadline=None)
def test_coverage_and_serving_give_the_same_answer(table: TuningTable) -> None:
    runtime = Runtime(table, environment=HERE, registry=registry, optional=True) if usable(table) else None
    alike = alike_under(registry, HERE, "reproducible")
    for layer in LAYERS:
        for tokens in range(1, 14):
            said = match(table, HERE, layer, tokens, "reproducible", alike=alike)
            assert said.hit == (runtime is not None and runtime.covers(layer, tokens)), (layer.label, tokens)
            if said.decision is None:
                assert said.reasons
                continue
            assert runtime is not None
            entry = runtime.lookup(layer, tokens)
            assert entry.bucket == said.decision.bucket
            assert (entry.up, entry.down) == (said.decision.up.config, said.decision.down.config)


def usable(table: TuningTable) -> bool:
    return any(d.environment != PLACES[-1].digest for d in table.decisions)

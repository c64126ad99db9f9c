"""What decisions for like tasks give a tuning to start with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.autotune.fake_times import FakeTimes
from tests.autotune.shared import HERE, LAYER
from tests.autotune.test_tuner import KERNEL, REGISTRY, by_block, plan_of
from tilecast.autotune.tuner import measure_plan
from tilecast.autotune.warm import MOST, warm_hints
from tilecast.cache_store.memory import MemoryStore
from tilecast.environment import Environment
from tilecast.evidence import Choice, Decision
from tilecast.problem import Bucket, ExpertLayer, TileConfig

ELSEWHERE = replace(HERE, device="another", kernel_source="1" * 64)


def decided(layer: ExpertLayer, tokens: int, row_block: int, where: Environment = HERE) -> tuple[Environment, Decision]:
    config = KERNEL.config(row_block=row_block)
    choice = Choice(config=config, p50_us=10.0, default=config, default_us=10.0)
    return where, Decision(
        environment=where.digest, layer=layer, bucket=Bucket(above=0, tokens=tokens), policy="reproducible",
        up=choice, down=choice,
    )  # fmt: skip


def blocks(configs: tuple[TileConfig, ...]) -> list[int]:
    return [config.integer("row_block") for config in configs]


def test_the_nearest_come_first_and_few_of_them() -> None:
    half = replace(LAYER, intermediate=LAYER.intermediate // 2)
    known = [decided(half, 4, 16), decided(LAYER, 4, 64, ELSEWHERE), decided(half, 16, 0), decided(LAYER, 16, 0)]
    assert blocks(warm_hints(known, LAYER.up, 4, HERE)) == [64, 16]
    assert len(warm_hints(known, LAYER.up, 4, HERE)) == MOST
    assert warm_hints(known, LAYER.up, 4, HERE) == warm_hints(known[::-1], LAYER.up, 4, HERE)


@pytest.mark.parametrize("change", [{"dtype": "fp32"}, {"gated": False}, {"bias": True}, {"hidden": LAYER.hidden * 64}])
def test_another_kind_of_layer_says_nothing(change: dict[str, object]) -> None:
    assert warm_hints([decided(replace(LAYER, **change), 4, 16)], LAYER.up, 4, HERE) == ()  # type: ignore[arg-type]
    assert warm_hints([decided(LAYER, 4, 16, replace(HERE, device_kind="cuda"))], LAYER.up, 4, HERE) == ()


def test_hints_start_and_what_is_not_valid_here_does_not() -> None:
    foreign = TileConfig("nobody.kernel", {"block": 1})
    late = KERNEL.config(row_block=64, chunk_k=64)

    def started(*hints: TileConfig) -> set[TileConfig]:
        store = MemoryStore()
        measure_plan(
            plan_of(4),
            store,
            REGISTRY,
            measurer=FakeTimes(by_block),
            strategy="quick",
            hints=lambda gemm, tokens: hints,
        )
        return {m.config for m in store.measurements() if m.round == 0 and m.gemm.name == "up"}

    assert late in started(foreign, late) and foreign not in started(foreign, late)

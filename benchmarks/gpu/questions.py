"""Which form of a kernel is faster: the questions that only a device can answer, each a small race.

A form is a kernel with some parameters fixed; what races for it are configs of its space, or, where its space has
none such, one made by changing one of the space. A form that is wrong, or cannot run, answers by saying so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.record import Record, Setup
from benchmarks.gpu.shapes import find_shape
from tilecast.autotune.measure import DeviceMeasurer, failure
from tilecast.engine.runtime import default_registry
from tilecast.environment import Environment, environment_for
from tilecast.errors import ConfigError
from tilecast.evidence import percentile
from tilecast.kernels.spec import Kernel, Registry
from tilecast.problem import ExpertGemm, ParamValue, TileConfig

CONFIGS = 8
"""Configs that race for a form, spread over those that it has."""
QUESTION_S = 20.0
POINTER, PERSISTENT, TMA = "triton.moe_gemm", "triton.moe_persistent", "triton.moe_tma"
DECODE, SPLIT_K = "triton.moe_decode", "triton.moe_split_k"
WIDE = {"block_m": 128, "block_n": 256}


@dataclass(frozen=True, kw_only=True)
class Form:
    """A kernel with some of its parameters fixed."""

    name: str
    kernel: str
    where: dict[str, ParamValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Forms to race on one GEMM of a shape at one token count."""

    name: str
    text: str
    shape: str
    gemm: str
    tokens: int
    forms: tuple[Form, ...]


def questions(*, tiny: bool) -> tuple[Question, ...]:
    """Return what is asked of a GPU; with `tiny` one question that a CPU can answer."""
    if tiny:
        forms = tuple(Form(name=f"{nv} vectors", kernel="llvm.moe_gemm", where={"nv": nv}) for nv in (1, 2))
        missing = Form(name="no such kernel", kernel="llvm.absent")
        return (
            Question(
                name="vectors-up", text="Vectors a tile?", shape="tiny", gemm="up", tokens=8, forms=(*forms, missing)
            ),
        )
    found = []
    for gemm in ("up", "down"):
        loads = tuple(
            Form(name=name, kernel=kernel, where=WIDE)
            for name, kernel in (("pointers", POINTER), ("persistent", PERSISTENT), ("TMA", TMA))
        )
        stages = tuple(
            Form(
                name=f"{kernel.rpartition('.')[2]}, {stages} stages",
                kernel=kernel,
                where={**WIDE, "num_stages": stages},
            )
            for kernel in (POINTER, TMA)
            for stages in (3, 4)
        )
        single = tuple(
            Form(name=name, kernel=kernel, where=where)
            for name, kernel, where in (
                ("decode", DECODE, {}), ("tiles", POINTER, {"swap": 0}), ("tiles, swapped", POINTER, {"swap": 1}),
                ("split-K", SPLIT_K, {}),
            )
        )  # fmt: skip
        found += [
            Question(
                name=f"tma-{gemm}", text=f"{gemm}, 128×256: weights by pointers or by TMA?",
                shape="mixtral-8x7b-tp2", gemm=gemm, tokens=4096, forms=loads,
            ),
            Question(
                name=f"stages-{gemm}", text=f"{gemm}, 128×256: 3 or 4 stages?",
                shape="mixtral-8x7b-tp2", gemm=gemm, tokens=4096, forms=stages,
            ),
            Question(
                name=f"one-token-{gemm}", text=f"{gemm}, one token: which form?",
                shape="qwen3-30b-a3b-tp1", gemm=gemm, tokens=1, forms=single,
            ),
        ]  # fmt: skip
    return tuple(found)


def run(setup: Setup, record: Record) -> dict[str, Any]:
    """Answer every question; each is a part."""
    clock = clock_for(setup.device, tiny=setup.tiny)
    environment = environment_for(setup.device)
    answers = []
    for question in questions(tiny=setup.tiny):

        def ask(question: Question = question) -> dict[str, Any]:
            rounds = max(1, setup.rounds // 3)
            return answer(question, environment, default_registry(), clock.healthy, rounds=rounds, tiny=setup.tiny)

        answers.append(record.part(question.name, ask, needs_s=QUESTION_S, healthy=clock.healthy))
    return {
        "environment": environment.to_json(),
        "answers": [part["result"] for part in answers if part["status"] == "ok"],
        "failures": [part["error"] for part in answers if part["status"] != "ok"],
    }


def answer(
    question: Question,
    environment: Environment,
    registry: Registry,
    healthy: Callable[[], bool],
    *,
    rounds: int,
    tiny: bool = False,
) -> dict[str, Any]:
    """Race the forms' configs in interleaved rounds and return each form's best."""
    layer = find_shape(question.shape, tiny=tiny).layer
    gemm = layer.up if question.gemm == "up" else layer.down
    measurer = DeviceMeasurer(environment, registry)
    racing: dict[tuple[str, TileConfig], list[float]] = {}
    notes: dict[str, list[str]] = {form.name: [] for form in question.forms}
    measurer.prepare(gemm)
    try:
        for form in question.forms:
            configs, reason = configs_of(form, gemm, question.tokens, environment, registry, 1 if tiny else CONFIGS)
            if reason:
                notes[form.name].append(reason)
            for config in configs:
                said = _check(measurer, gemm, question.tokens, config, healthy)
                if said:
                    notes[form.name].append(f"{config.label}: {said}")
                else:
                    racing[form.name, config] = []
        for turn in range(rounds):
            for (_, config), samples in racing.items():
                samples += measurer.sample(gemm, question.tokens, config, round=turn, count=1)
    finally:
        measurer.release(gemm)
    return {
        "name": question.name,
        "text": question.text,
        "layer": layer.to_json(),
        "gemm": question.gemm,
        "tokens": question.tokens,
        "forms": [_best(form, racing, notes[form.name]) for form in question.forms],
    }


def configs_of(
    form: Form, gemm: ExpertGemm, tokens: int, environment: Environment, registry: Registry, limit: int = CONFIGS
) -> tuple[list[TileConfig], str]:
    """Return up to `limit` valid configs that race for a form, and why there are none."""
    try:
        kernel = registry[form.kernel]
    except ConfigError as error:
        return [], str(error)
    reason = kernel.rejects(gemm, environment)
    if reason is not None:
        return [], reason
    valid, why = [], f"{kernel.name} has no config with {form.where}"
    for config in _proposals(form, kernel, gemm, tokens, environment):
        invalid = registry.invalid(gemm, config, environment)
        if invalid is None:
            valid.append(config)
        else:
            why = invalid
    step = max(1, math.ceil(len(valid) / limit))
    return valid[::step], "" if valid else why


def _proposals(
    form: Form, kernel: Kernel, gemm: ExpertGemm, tokens: int, environment: Environment
) -> Iterator[TileConfig]:
    space = list(kernel.space(gemm, tokens, environment))
    fitting = [config for config in space if form.where.items() <= dict(config.params).items()]
    changed = (config.with_params(**form.where) for config in space if form.where.keys() <= dict(config.params).keys())
    yield from fitting or dict.fromkeys(changed)


def _check(
    measurer: DeviceMeasurer, gemm: ExpertGemm, tokens: int, config: TileConfig, healthy: Callable[[], bool]
) -> str:
    """Return why a config cannot race; empty if it can."""
    try:
        verdict = measurer.check(gemm, tokens, config)
    except Exception as error:  # whatever a compiler or driver raises
        if not healthy():
            raise
        status, detail = failure(error)
        return f"{status}: {detail}"
    return "" if verdict.status == "ok" else f"{verdict.status}: {verdict.detail}"


def _best(form: Form, racing: dict[tuple[str, TileConfig], list[float]], notes: list[str]) -> dict[str, Any]:
    timed = {config: samples for (name, config), samples in racing.items() if name == form.name and samples}
    best = min(timed, key=lambda config: percentile(timed[config], 50), default=None)
    samples = timed[best] if best is not None else []
    return {
        "form": form.name,
        "kernel": form.kernel,
        "where": form.where,
        "raced": len(timed),
        "config": None if best is None else best.to_json(),
        **{f"p{q}_us": percentile(samples, q) if samples else None for q in (20, 50, 80)},
        "notes": notes,
    }

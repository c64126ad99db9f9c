"""The certification questions: which configs give the same bits on this device, and does the check see others?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.record import Record, Setup
from tilecast.autotune.certificate import CERTIFICATE_INPUTS, Certificate, ClassResult
from tilecast.autotune.certify import certify, claimed_configs
from tilecast.engine.runtime import default_registry
from tilecast.environment import environment_for
from tilecast.problem import ExpertLayer

TOKENS = (1, 16, 128, 2048)
MEMBERS = 24
CERTIFY_S = 30.0


def asked_layer(dtype: str, *, tiny: bool) -> ExpertLayer:
    """Return the layer whose classes are certified: a real K, few experts, so that rows per expert vary."""
    if tiny:
        return ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2, dtype=dtype)
    return ExpertLayer(hidden=4096, intermediate=1792, experts=8, top_k=2, dtype=dtype)


def run(setup: Setup, record: Record) -> dict[str, Any]:
    """Certify both GEMMs of one dtype; each is a part."""
    clock = clock_for(setup.device, tiny=setup.tiny)
    environment, registry = environment_for(setup.device), default_registry()
    layer = asked_layer(record.unit, tiny=setup.tiny)
    parts = []
    for gemm in layer.gemms:

        def ask(gemm: Any = gemm) -> dict[str, Any]:
            configs = claimed_configs(gemm, TOKENS[:1] if setup.tiny else TOKENS, environment, registry)
            inputs, members = (16, 2) if setup.tiny else (CERTIFICATE_INPUTS, MEMBERS)
            found = certify(gemm, configs, environment, registry, inputs=inputs, members=members)
            return {"gemm": gemm.name, "answers": answers(found), "certificate": found.to_json()}

        parts.append(record.part(gemm.name, ask, needs_s=CERTIFY_S, healthy=clock.healthy))
    broken = [part["error"] for part in parts if part["status"] != "ok"]
    if len(broken) == len(parts):
        raise RuntimeError(f"nothing could be certified:\n{broken[0]}")
    return {
        "dtype": record.unit,
        "environment": environment.to_json(),
        "gemms": [part["result"] for part in parts if part["status"] == "ok"],
        "failures": broken,
    }


def answers(found: Certificate) -> list[dict[str, Any]]:
    """Return what a certificate says in one line a class, and of every pair of classes."""
    names = {result.numerics: class_name(result, found.classes) for result in found.classes}
    lines = [
        {
            "question": f"{names[result.numerics]}: one result alone, in any batch, by every member?",
            "answer": result.verdict,
            "certified": result.certified,
            "inputs": result.inputs,
            "control": result.control,
            "reason": result.reason,
            "members": len(result.members),
            "varied": varied(result),
        }
        for result in found.classes
    ]
    lines += [
        {
            "question": f"{names[pair.first]} and {names[pair.second]}: other bits?",
            "answer": "equal on all inputs" if pair.different == 0 else f"different on {pair.different}",
            "inputs": found.inputs,
        }
        for pair in found.comparisons
    ]
    return lines


def varied(result: ClassResult) -> dict[str, list[Any]]:
    """Return the values that each parameter took among the members that ran: what the verdict is neutral to."""
    ran = [member.config for member in result.members if not member.error]
    values: dict[str, set[Any]] = {"kernel": {config.kernel for config in ran}}
    for config in ran:
        for name, value in config.params:
            values.setdefault(name, set()).add(value)
    return {name: sorted(seen, key=str) for name, seen in values.items() if len(seen) > 1}


def class_name(result: ClassResult, classes: Iterable[ClassResult]) -> str:
    """Return the fields by which a class differs from the others of its certificate, or its kernel alone."""
    others = [other.fields for other in classes if other is not result]
    own = {name: value for name, value in result.fields.items() if any(other.get(name) != value for other in others)}
    return ", ".join(f"{name} {value}" for name, value in own.items()) or result.reference.kernel

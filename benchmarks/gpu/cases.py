"""Every kernel on the cases that tests hold kernels to, on the device, against the float64 oracle.

As a script (under compute-sanitizer, say) it prints a summary and exits with 1 if a kernel was wrong:

    python benchmarks/gpu/cases.py --device cuda --configs 2
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from tests.cases import CASES, Case, Operands, error, operands  # noqa: E402
from tilecast.autotune.certify import spread  # noqa: E402
from tilecast.engine.runtime import default_registry  # noqa: E402
from tilecast.environment import Environment, environment_for  # noqa: E402
from tilecast.kernels import sort_slots  # noqa: E402
from tilecast.kernels.reference import reference_down, reference_up  # noqa: E402
from tilecast.kernels.spec import PLAIN, GemmWeights, Kernel, Registry  # noqa: E402
from tilecast.problem import ExpertGemm, TileConfig  # noqa: E402

DTYPES = ("bf16", "fp16", "fp32")
SLACK = 2.0**-22


def check_cases(
    environment: Environment,
    registry: Registry,
    *,
    configs: int = 4,
    cases: Sequence[Case] = tuple(CASES),
    dtypes: Sequence[str] = DTYPES,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Run the cases; returns how many (kernel, GEMM, config, case) were right, and each that was not.

    Every config is compiled for itself, so time may run out: `unreached` counts the (case, dtype) that were left.
    """
    deadline, unreached = time.monotonic() + seconds, 0
    kind = "cuda" if environment.device_kind == "cuda" else "cpu"
    right, wrong, worst = 0, [], 0.0
    for dtype in dtypes:
        for case in cases:
            if time.monotonic() > deadline:
                unreached += 1
                continue
            given = on_device(as_dtype(case, dtype), kind)
            for kernel, gemm, config in runs(given, environment, registry, configs, case.tokens):
                try:
                    ratio = judged(kernel, gemm, config, given)
                except Exception as problem:  # whatever a kernel raises is what is asked for
                    said = f"{type(problem).__name__}: {problem}".splitlines()[0]
                else:
                    said = "" if ratio <= 1 else f"error is {ratio:.3g} times what is allowed"
                    worst = max(worst, ratio)
                if not said:
                    right += 1
                    continue
                wrong.append(
                    {"case": case.name, "dtype": dtype, "gemm": gemm.name, "config": config.to_json(), "what": said}
                )
                if kind == "cuda" and len(wrong) == 1:
                    print(f"{case.name}, {dtype}, {gemm.name}, {config.label}: {said}", flush=True)
                if kind == "cuda":
                    # A broken device would fail all that follow: then this raises, and the one that broke it is told.
                    torch.cuda.synchronize()
    return {"right": right, "wrong": wrong, "unreached": unreached, "worst_error_over_allowed": worst}


def as_dtype(case: Case, dtype: str) -> Operands:
    return operands(dataclasses.replace(case.layer, dtype=dtype), case.tokens, case.routing)


def on_device(given: Operands, kind: str) -> Operands:
    """Return the operands on a device, routed there."""
    if kind == "cpu":
        return given

    def moved(weights: GemmWeights) -> GemmWeights:
        bias = None if weights.bias is None else weights.bias.to(kind)
        return GemmWeights(gemm=weights.gemm, layout=weights.layout, data=weights.data.to(kind), bias=bias)

    return Operands(
        layer=given.layer,
        route=sort_slots(given.route.ids.to(kind), given.layer.experts),
        topk_weights=given.topk_weights.to(kind),
        up=moved(given.up),
        down=moved(given.down),
        hidden=given.hidden.to(kind),
        intermediate=given.intermediate.to(kind),
    )


def runs(
    given: Operands, environment: Environment, registry: Registry, configs: int, tokens: int
) -> Iterator[tuple[Kernel, ExpertGemm, TileConfig]]:
    """Yield every kernel of the device that takes the layer, with its default and a spread of its valid configs."""
    for gemm in given.layer.gemms:
        for kernel in registry:
            if kernel.device_kind != environment.device_kind or kernel.rejects(gemm, environment) is not None:
                continue
            space = [
                config
                for config in kernel.space(gemm, max(1, tokens), environment)
                if registry.invalid(gemm, config, environment) is None
            ]
            chosen = spread(space, configs)
            default = kernel.default(gemm, max(1, tokens), environment)
            for config in dict.fromkeys((default, *chosen)):
                yield registry[config.kernel], gemm, config


def judged(kernel: Kernel, gemm: ExpertGemm, config: TileConfig, given: Operands) -> float:
    """Return the error of one run over what is allowed. Raises AssertionError for rows that nothing may write."""
    route, layer = given.route, given.layer
    ordered = kernel.order(gemm, config) == "sorted"
    count = int(route.offsets[-1])
    present = route.slots[:count].long()
    weights = given.up if gemm.name == "up" else given.down
    layout = kernel.layout(gemm, config)
    packed = weights if layout == PLAIN else kernel.pack(weights, layout)
    if gemm.name == "up":
        out = torch.full_like(given.intermediate, torch.nan)
        kernel.up(config, given.hidden, packed, route, out)
        written = out[:count] if ordered else out[present]
        absent = out[count:] if ordered else out[_others(present, len(out))]
        assert bool(torch.isnan(absent).all()), "rows of absent slots were written"
        terms = (layer, given.hidden, weights.data, route, weights.bias)
        exact, torch_values = (reference_up(*terms, dtype)[present] for dtype in (torch.float64, out.dtype))
    else:
        rows = given.intermediate
        if ordered:
            rows = torch.full_like(rows, torch.nan)
            rows[:count] = given.intermediate[present]
        written = torch.full_like(given.hidden, torch.nan)
        kernel.down(config, rows, packed, route, given.topk_weights, written)
        terms_down = (layer, given.intermediate, weights.data, route, given.topk_weights, weights.bias)
        exact, torch_values = (reference_down(*terms_down, dtype) for dtype in (torch.float64, written.dtype))
    if not bool(torch.isfinite(written).all()):
        raise AssertionError("the result is not finite")
    return error(written, exact) / (2 * error(torch_values, exact) + SLACK)


def _others(present: torch.Tensor, rows: int) -> torch.Tensor:
    absent = torch.ones(rows, dtype=torch.bool, device=present.device)
    absent[present] = False
    return absent


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every kernel on the tests' cases.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--configs", type=int, default=4)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further case after so long")
    options = parser.parse_args()
    found = check_cases(
        environment_for(options.device),
        default_registry(),
        configs=options.configs,
        cases=CASES[: options.cases],
        dtypes=options.dtypes,
        seconds=options.seconds,
    )
    print(f"{found['right']} right, {len(found['wrong'])} wrong, {found['unreached']} cases not reached")
    for wrong in found["wrong"][:20]:
        print(f"  {wrong}")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

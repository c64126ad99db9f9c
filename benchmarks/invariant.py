"""What `invariant()` costs: prefill and decode of one model with and without it, in turns in one process.

    python -m benchmarks.invariant --dtype bf16 --out benchmarks/results/DEVICE/invariant.json

The model is random, Mixtral's or another family's classes at the sizes given. Each round times all of its cases; what
is reported is the median over rounds of each pair's ratio, so that a busy machine slows both sides alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from tilecast.engine.invariant import invariant
from tilecast.engine.invariant_attention import use_attention
from tilecast.engine.transformers import register_transformers
from tilecast.environment import cpu_environment
from tilecast.kernels.dtypes import TORCH_DTYPES


def build(family: str, dtype: torch.dtype, hidden: int, layers: int) -> Any:
    register_transformers()
    config = transformers.AutoConfig.for_model(
        family, vocab_size=8192, hidden_size=hidden, intermediate_size=2 * hidden, moe_intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256),
        head_dim=64, num_experts=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.set_experts_implementation("tilecast")
    return model


def case_ms(model: Any, attention: str, inside: bool, prompt: torch.Tensor, steps: int) -> tuple[float, float]:
    """Return the ms of one prefill, and of one token's decoding after it."""
    if attention == "tilecast":
        use_attention(model)
    else:
        model.set_attn_implementation(attention)
    with torch.no_grad(), invariant() if inside else contextlib.nullcontext():
        start = time.perf_counter()
        result = model(input_ids=prompt, use_cache=True)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(steps):
            token = result.logits[:, -1:].argmax(-1)
            result = model(input_ids=token, past_key_values=result.past_key_values, use_cache=True)
        return prefill * 1e3, (time.perf_counter() - start) * 1e3 / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="mixtral")
    parser.add_argument("--dtype", choices=sorted(TORCH_DTYPES), default="bf16")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = build(given.family, TORCH_DTYPES[given.dtype], given.hidden, given.layers)
    points = []
    for batch in given.batch:
        prompt = torch.randint(0, 8192, (batch, given.prompt), generator=torch.Generator().manual_seed(1))
        cases = {"sdpa": ("sdpa", False), "invariant": ("tilecast", True)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for number in range(given.rounds + 1):
            for name, (attention, inside) in cases.items():
                taken = case_ms(model, attention, inside, prompt, given.steps)
                if number:  # the first round compiles
                    times[name].append(taken)
        for index, phase in enumerate(("prefill", "decode")):
            pairs = zip(times["invariant"], times["sdpa"], strict=True)
            ratios = sorted(mine[index] / torchs[index] for mine, torchs in pairs)
            point = {
                "batch": batch, "phase": phase, "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "ms": {name: round(statistics.median(t[index] for t in found), 3) for name, found in times.items()},
            }  # fmt: skip
            points.append(point)
            print(f"batch {batch} {phase}: {point['ratio']} × the time without ({point['ms']} ms)", flush=True)
    if given.out:
        arguments = {name: value for name, value in vars(given).items() if name != "out"}
        document = {
            "environment": cpu_environment().to_json(), "transformers": transformers.__version__,
            "arguments": arguments, "points": points,
        }  # fmt: skip
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Tokens per second of a whole model: Tilecast's experts against each of transformers' own, in one process.

python benchmarks/generate.py                        a Mixtral-shaped random model of about 1 billion parameters
python benchmarks/generate.py --dtypes fp32 --minutes 1
TM_GEMM_IMPORT=table.db python benchmarks/generate.py     with a tuned table

The model is built once, into a folder under --cache. Implementations take turns within a round, each round in another
order, so that a slow minute of the machine meets all of them; figures are medians over rounds with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from report import ROOT, write_result

import tilecast
from tilecast.engine import runtime
from tilecast.engine.around import as_before

OURS = "tilecast"
EXPERTS_ONLY = "tilecast, experts only"
PEERS = ("eager", "grouped_mm", "batched_mm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ASKED = {"decode": 1.8, "prefill": 1.5}
"""How many times the tokens per second of transformers' best are asked for."""
MAX_GATHERED = 2 << 30
"""Bytes above which batched_mm, which copies the weights of every routed slot, is left out."""
SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 10,
    "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""Mixtral 8x7B's proportions at a quarter of its width: 0.98 billion parameters."""


def built(cache: Path, shape: dict[str, int]) -> Path:
    """Return a checkpoint of random weights in bf16, made at the first call."""
    config = transformers.MixtralConfig(**shape, tie_word_embeddings=False, eos_token_id=None)
    width = f"{shape['hidden_size']}x{shape['intermediate_size']}x{shape['num_hidden_layers']}"
    folder = cache / f"mixtral-{width}"
    if (folder / "complete").exists():
        return folder
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1) if "norm" in name else parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    (folder / "complete").touch()
    return folder


def use(model: Any, name: str) -> None:
    """Switch a model to an experts implementation without packing again: it holds both forms of its weights."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._experts_implementation = OURS if name == EXPERTS_ONLY else name


def around(model: Any, name: str) -> AbstractContextManager[None]:
    """Return a context in which Tilecast's linears and attention run for our own full form alone."""
    return nullcontext() if name == OURS else as_before(model)


def prefill(model: Any, prompt: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return the cache and the next token after a prompt [B, P]."""
    found = model(prompt, use_cache=True, logits_to_keep=1)
    return found.past_key_values, found.logits[:, -1].argmax(-1, keepdim=True)


def decode(model: Any, cache: Any, token: torch.Tensor, count: int) -> list[int]:
    """Return `count` greedy tokens of the first row."""
    tokens = []
    for _ in range(count):
        found = model(token, past_key_values=cache, use_cache=True)
        token = found.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token[0]))
    return tokens


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def measure(
    model: Any, names: tuple[str, ...], *, prompt: int, count: int, minutes: float, least: int = 2
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[int]]]:
    """Return by phase and implementation the tokens per second of each round, and the tokens that each chose."""
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    rates: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in names} for phase in ASKED}
    chosen: dict[str, list[int]] = {}
    gathered = prompt * model.config.num_experts_per_tok * expert_bytes(model)
    order, end, rounds = list(names), time.monotonic() + 60 * minutes, -1
    use(model, "grouped_mm")
    with torch.inference_mode():
        # The first round, of fewer tokens, only warms up.
        while rounds < least or time.monotonic() < end:
            random.Random(rounds).shuffle(order)
            for name in order:
                use(model, "grouped_mm" if name == "batched_mm" and gathered > MAX_GATHERED else name)
                with around(model, name):
                    seconds, (cache, token) = timed(lambda: prefill(model, ids))
                if rounds >= 0 and not (name == "batched_mm" and gathered > MAX_GATHERED):
                    rates["prefill"][name].append(prompt / seconds)
                use(model, name)
                wanted = count if rounds >= 0 else 2
                with around(model, name):
                    seconds, tokens = timed(lambda c=cache, t=token, n=wanted: decode(model, c, t, n))
                if rounds >= 0:
                    rates["decode"][name].append(wanted / seconds)
                    chosen[name] = tokens
            rounds += 1
    return rates, chosen


def expert_bytes(model: Any) -> int:
    """Return the bytes of one expert's weights in one layer."""
    config = model.config
    return 3 * int(config.hidden_size) * int(config.intermediate_size) * int(model.dtype.itemsize)


def summary(rates: dict[str, list[float]], phase: str) -> dict[str, Any]:
    """Return medians and quartiles by implementation, and ours over the best of the others."""
    found = {
        name: {
            "tokens_per_s": round(statistics.median(seen), 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(seen, n=4, method="inclusive")[::2]],
            "rounds": len(seen),
        }
        for name, seen in rates.items()
        if len(seen) > 1
    }
    theirs = [name for name in found if name not in (OURS, EXPERTS_ONLY)]
    best = max(theirs, key=lambda name: found[name]["tokens_per_s"])
    # Round by round, as both met the same machine then.
    ratios = [ours / theirs for ours, theirs in zip(rates[OURS], rates[best], strict=True)]
    return {
        "implementations": found,
        "best_of_transformers": best,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4, method="inclusive")[::2]],
        "asked": ASKED[phase],
    }


def run(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Return one dtype's figures."""
    runtime.forget_table()
    # Both forms of the weights are kept, so that implementations can take turns.
    tilecast.register_transformers(release=False)
    folder = built(options.cache, SHAPE)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], experts_implementation=OURS
    ).eval()
    rates, chosen = measure(
        model,
        (OURS, EXPERTS_ONLY, *options.peers),
        prompt=options.prompt,
        count=options.count,
        minutes=options.minutes / len(options.dtypes),
    )
    table = runtime.current("cpu").table
    return {
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "table": table.digest if table.decisions else None,
        **{phase: summary(seen, phase) for phase, seen in rates.items()},
        "same_greedy_tokens_as_eager": {name: tokens == chosen["eager"] for name, tokens in chosen.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(DTYPES), help="comma-separated")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="comma-separated")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--count", type=int, default=16, help="tokens to decode a round")
    parser.add_argument("--minutes", type=float, default=3.0, help="to measure in, over all dtypes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / "models", help="where the model is kept")
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    points = []
    for dtype in options.dtypes:
        points.append(run(options, dtype))
        print(json.dumps(points[-1], indent=1), flush=True)
    found = {
        "shape": SHAPE, "prompt": options.prompt, "decoded": options.count, "threads": options.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "points": points,
    }  # fmt: skip
    name = "generate" if set(options.dtypes) == set(DTYPES) else f"generate-{'-'.join(options.dtypes)}"
    print(write_result(name, found, options.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

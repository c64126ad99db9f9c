"""Options that several commands share, and the texts they are parsed from."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from tilecast.errors import CacheError, UsageError
from tilecast.problem import DTYPES

MAX_BUDGET_S = 7 * 24 * 3600.0
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BUDGET = re.compile(r"(\d{1,7}(?:\.\d{1,6})?)\s*(s|m|min|h|)")


def _complete_model(incomplete: str) -> list[str]:
    from tilecast.models import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


MODEL_HELP = (
    "A preset's name (mixtral-8x7b …), a config.json, a checkpoint folder, or a spec such as E=8,H=4096,I=14336,k=2; "
    "with quantised experts mixtral-8x7b:awq_g128, or w=awq_g128 in a spec."
)
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False, autocompletion=_complete_model)
]
OptionalModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False, autocompletion=_complete_model)
]
LayerOption = Annotated[
    str | None,
    typer.Option("--layer", metavar="SPEC", help="One layer as a spec: E=8,H=1024,I=3584,k=2.", show_default=False),
]
TpOption = Annotated[int, typer.Option("--tp", min=1, metavar="N", help="Tensor-parallel ranks; splits I.")]
EpOption = Annotated[int, typer.Option("--ep", min=1, metavar="N", help="Expert-parallel ranks; splits E.")]
TokensOption = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="SEQ",
        help="Token counts: 1,4,16 or items start-next-step whose step doubles at next (8-16-8,16-64-16,512).",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="DTYPE", help=f"Dtype instead of the model's: {', '.join(DTYPES)}.", show_default=False
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="POLICY",
        help="reproducible (one numerics class for all buckets) or fastest. Default: TM_GEMM_POLICY or reproducible.",
        show_default=False,
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="TIME", help="Time for measuring: 180s, 3m, 1h. Default: as long as it takes.",
        show_default=False,
    ),
]  # fmt: skip
EffortOption = Annotated[
    str,
    typer.Option(
        "--effort",
        metavar="EFFORT",
        help="How thoroughly to search: quick, standard, or exhaustive, which measures every config.",
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="T=SHARE,…",
        help="How often layers are called with T tokens, as in 1=0.9,2048=0.1. Default: what --from-record "
        "recorded, else all alike.",
        show_default=False,
    ),
]
ShareOption = Annotated[
    str,
    typer.Option(
        "--share",
        metavar="HOW",
        help="Several ranks: replicate (all measure everything) or split (they share the first rounds out).",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of what the search draws at random.")]
RoutingOption = Annotated[
    str | None,
    typer.Option(
        "--routing",
        metavar="PROFILE",
        help="How tokens spread over experts: uniform, zipf:S (zipf:1.2), or a file that TM_GEMM_RECORD wrote; "
        "with +sparsity:0.9 behind it, 90% of a relu layer's neurons are dead. "
        "Default: TM_GEMM_ROUTING or uniform.",
        show_default=False,
    ),
]
FromRecordOption = Annotated[
    Path | None,
    typer.Option(
        "--from-record",
        metavar="FILE",
        help="Tune the layers and token counts that serving missed, as TM_GEMM_RECORD wrote them down.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=4096, metavar="N", help="CPU threads. Default: torch's.", show_default=False),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="PATH",
        help="Store of measurements and decisions: a path or SQLAlchemy URL. Default: store.db in the cache folder.",
        show_default=False,
    ),
]
TableOption = Annotated[
    str | None,
    typer.Option(
        "--table", metavar="FILE", help="Table to use instead of the one TM_GEMM_IMPORT names.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]


def model_or_layer(model: str | None, layer: str | None, default: str | None = None) -> str:
    """Return the one of MODEL and --layer that is given. Raises UsageError for both, or none without a default."""
    if model is not None and layer is not None:
        raise UsageError(f"both MODEL ({model!r:.40}) and --layer ({layer!r:.40}) are given, expected one of them")
    chosen = model if model is not None else layer if layer is not None else default
    if chosen is None:
        raise UsageError("neither MODEL nor --layer is given; name a preset, a config.json, a folder or a spec")
    return chosen


def parse_budget(text: str | None) -> float | None:
    """Return seconds for `180s`, `3m`, `1h` or a bare number of seconds; None for None. Raises UsageError."""
    if text is None:
        return None
    found = _BUDGET.fullmatch(text.strip().lower())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= MAX_BUDGET_S:
        raise UsageError(f"--budget is {text!r:.40}, expected a time above 0 and up to 7 days such as 180s, 3m or 1h")
    return seconds


def tune_command(model: str, **given: str | int | None) -> str:
    """Return the command that tunes what a model was asked about with these options: `gpu_experts` is --gpu-experts."""
    options = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in given.items()
        if value is not None and not (name in ("tp", "ep") and value == 1)
    ]
    return " ".join(["tilecast tune", shlex.quote(model), *options, "--export FILE"])


def parse_policy(text: str | None, default: str) -> str:
    """Return a policy's name. Raises UsageError."""
    from tilecast.evidence import POLICIES

    policy = default if text is None else text.lower()
    if policy not in POLICIES:
        raise UsageError(f"--policy is {text!r:.40}, expected one of {', '.join(POLICIES)}")
    return policy


def parse_dtypes(text: str) -> tuple[str, ...]:
    """Return dtype names from a comma-separated list, duplicates dropped. Raises UsageError."""
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    for name in names:
        if name not in DTYPES:
            raise UsageError(f"--dtype holds {name!r:.40}, expected some of {', '.join(DTYPES)}")
    return names


def parse_token_option(text: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return ascending token counts. Raises UsageError that names the option."""
    from tilecast.settings import parse_tokens

    if text is None:
        return default
    try:
        return parse_tokens(text)
    except UsageError as error:
        raise UsageError(f"--tokens: {error}") from None


def check_writable(option: str, path: Path) -> None:
    """Raise CacheError unless a table can be put at `path`: found out before, not after, the work for it is done."""
    # Imported here, so that completion and --help do not load the store.
    from tilecast.cache_store.bundle import check_exportable

    try:
        check_exportable(path)
    except CacheError as error:
        raise CacheError(f"{option} {error}") from None


def parse_weights(text: str | None) -> dict[int, float] | None:
    """Return token counts with their shares from `1=0.9,64=0.1`; None for None. Raises UsageError."""
    if text is None:
        return None
    found: dict[int, float] = {}
    for part in text.split(","):
        tokens, equals, share = part.partition("=")
        try:
            count, value = int(tokens), float(share)
        except ValueError:
            count, value = 0, 0.0
        if not equals or count < 1 or not 0 <= value < float("inf") or count in found:
            raise UsageError(f"--weights holds {part!r:.40}, expected each token count once, as in 1=0.9,64=0.1")
        found[count] = value
    return found


def weights_text(weights: Mapping[int, float]) -> str:
    """Return shares as `--weights` takes them."""
    return ",".join(f"{tokens}={share:.4g}" for tokens, share in weights.items())

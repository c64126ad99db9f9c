"""Hypothesis strategies for the base types. Everything drawn is valid and survives its JSON form unchanged."""

from __future__ import annotations

from hypothesis import strategies as st

from tilecast.environment import Environment
from tilecast.evidence import CERTIFICATES, POLICIES, STATUSES, Choice, Decision, Measurement, TuningTable
from tilecast.problem import (
    ACTIVATIONS,
    DTYPES,
    MAX_DIMENSION,
    WEIGHT_FORMATS,
    Bucket,
    ExpertGemm,
    ExpertLayer,
    TileConfig,
    buckets,
)

SIZES = st.one_of(st.integers(1, 64), st.integers(1, MAX_DIMENSION))
NAMES = st.text("abcxyz_", min_size=1, max_size=6)
TIMES = st.floats(min_value=0, max_value=1e300, exclude_min=True, allow_nan=False, allow_infinity=False)
"""Microseconds; denormals included."""
RATIOS = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=24)
"""Any text that has a UTF-8 form, control characters and NUL included."""
LINES = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc")), max_size=24)
"""Text on one line."""
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
ROUTINGS = st.sampled_from(["uniform", "zipf", "one_expert"])


@st.composite
def layers(draw: st.DrawFn) -> ExpertLayer:
    """Draw an expert layer, with and without expert parallelism."""
    experts = draw(SIZES)
    global_experts = draw(st.one_of(st.just(0), st.integers(experts, MAX_DIMENSION)))
    activation = draw(st.sampled_from(ACTIVATIONS))
    return ExpertLayer(
        hidden=draw(SIZES),
        intermediate=draw(SIZES),
        experts=experts,
        top_k=draw(st.integers(1, global_experts or experts)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        weight_format=draw(st.sampled_from(WEIGHT_FORMATS)),
        activation=activation,
        gated=activation == "drelu" or (activation != "identity" and draw(st.booleans())),
        bias=draw(st.booleans()),
        global_experts=global_experts,
    )


def gemms() -> st.SearchStrategy[ExpertGemm]:
    """Draw one of a layer's two GEMMs."""
    return st.builds(ExpertGemm, layer=layers(), name=st.sampled_from(["up", "down"]))


def tile_configs() -> st.SearchStrategy[TileConfig]:
    """Draw a config of any kernel, unknown ones too, with integer and string parameters."""
    values = st.one_of(st.integers(-(1 << 53), 1 << 53), LINES)
    kernels = st.sampled_from(["llvm.moe_gemm", "onednn.linear", "triton.moe_gemm", "no.such_kernel"])
    return st.builds(TileConfig, kernels, st.dictionaries(NAMES, values, max_size=4))


def environments() -> st.SearchStrategy[Environment]:
    """Draw an environment."""
    versions = st.sampled_from(["2.11.0", "2.11.1", "2.13.0+cpu", "0.50.0", "absent"])
    return st.builds(
        Environment,
        device_kind=st.sampled_from(["cpu", "cuda"]),
        device=LINES,
        arch=st.sampled_from(["x86_64", "aarch64", "sm90"]),
        features=st.sampled_from(["", "avx2,fma", "avx512f"]),
        units=st.integers(1, 1024),
        llc_bytes=st.integers(0, 1 << 34),
        kernel_source=DIGESTS,
        torch=versions,
        compiler=versions,
        threads=st.integers(0, 1024),
        driver=LINES,
        system=LINES,
    )


@st.composite
def measurements(draw: st.DrawFn, environment: str | None = None) -> Measurement:
    """Draw a measurement of any status, in the environment with the given digest (default: any)."""
    status = draw(st.sampled_from(STATUSES))
    timed = status in ("ok", "unstable")
    world_size = draw(st.integers(1, 16))
    return Measurement(
        environment=environment or draw(DIGESTS),
        gemm=draw(gemms()),
        tokens=draw(SIZES),
        config=draw(tile_configs()),
        status=status,
        samples_us=tuple(draw(st.lists(TIMES, min_size=1, max_size=6))) if timed else (),
        routing=draw(ROUTINGS),
        numerics=draw(st.one_of(st.just(""), DIGESTS)),
        error_ratio=draw(st.one_of(st.none(), RATIOS)),
        rank=draw(st.integers(0, world_size - 1)),
        world_size=world_size,
        run=draw(st.integers(0, 1 << 31)),
        round=draw(st.integers(0, 1 << 31)),
        detail="" if timed else draw(LINES),
        measured_at=draw(st.floats(min_value=0, max_value=1e12)),
    )


@st.composite
def choices(draw: st.DrawFn, configs: st.SearchStrategy[TileConfig] | None = None) -> Choice:
    """Draw a choice among `configs` (default: any), with and without a runner-up."""
    configs = tile_configs() if configs is None else configs
    runner_up = draw(st.one_of(st.none(), configs))
    return Choice(
        config=draw(configs),
        p50_us=draw(TIMES),
        default=draw(configs),
        default_us=draw(TIMES),
        runner_up=runner_up,
        runner_up_us=None if runner_up is None else draw(TIMES),
        noise=draw(RATIOS),
        numerics=draw(st.one_of(st.just(""), DIGESTS)),
    )


@st.composite
def decisions(
    draw: st.DrawFn,
    *,
    environment: str | None = None,
    layer: ExpertLayer | None = None,
    bucket: Bucket | None = None,
    policy: str | None = None,
    routing: str | None = None,
    configs: st.SearchStrategy[TileConfig] | None = None,
) -> Decision:
    """Draw a decision; what is given is kept."""
    if bucket is None:
        tokens = draw(SIZES)
        bucket = Bucket(above=draw(st.integers(0, tokens - 1)), tokens=tokens)
    return Decision(
        environment=environment or draw(DIGESTS),
        layer=layer or draw(layers()),
        bucket=bucket,
        policy=policy or draw(st.sampled_from(POLICIES)),
        up=draw(choices(configs)),
        down=draw(choices(configs)),
        routing=routing or draw(ROUTINGS),
        certificate=draw(st.sampled_from(CERTIFICATES)),
    )


@st.composite
def tables(draw: st.DrawFn, *, min_decisions: int = 0) -> TuningTable:
    """Draw a table: up to two environments, each with up to two series of adjoining buckets."""
    places = draw(st.lists(environments(), min_size=1 if min_decisions else 0, max_size=2))
    # Few configs, used often, as in a real table; drawing fresh ones for each choice is slow, too.
    configs = st.sampled_from(draw(st.lists(tile_configs(), min_size=1, max_size=3)))
    found: dict[str, Decision] = {}
    for place in places:
        for layer in draw(st.lists(layers(), min_size=1 if min_decisions else 0, max_size=2)):
            policy, routing = draw(st.sampled_from(POLICIES)), draw(ROUTINGS)
            edges = draw(st.lists(st.integers(1, 9000), min_size=max(1, min_decisions), max_size=3, unique=True))
            key = {"environment": place.digest, "layer": layer, "policy": policy, "routing": routing}
            series = [draw(decisions(**key, bucket=b, configs=configs)) for b in buckets(edges)]
            # The same series may be drawn twice; its buckets would overlap, so only the first stays.
            if not any(d.sort_key[:4] == series[0].sort_key[:4] for d in found.values()):
                found.update({d.key: d for d in series})
    return TuningTable(tuple(places), tuple(found.values()))

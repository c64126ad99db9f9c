"""`tilecast cache verify`: does what a table says still hold on this device?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._exit import resumable
from tilecast.cli._options import JsonOption, ThreadsOption
from tilecast.cli._output import Output, add_row, microseconds, percent, plural, table
from tilecast.cli._run import use_threads
from tilecast.cli._stores import check_configs, origins, read_table
from tilecast.cli._tables import config_text
from tilecast.environment import Environment
from tilecast.errors import CoverageError, UsageError
from tilecast.evidence import POLICIES, Decision, TuningTable
from tilecast.problem import ExpertGemm

if TYPE_CHECKING:
    from tilecast.autotune.routing_profiles import RoutingProfile
    from tilecast.autotune.verify import Verified

COLUMNS = ("layer", "tokens", "GEMM", "stored µs", "now µs", "default now µs", "noise", "verdict", "config")


def verify(
    source: Annotated[str, typer.Argument(metavar="TABLE", help="An exported file, a store, or a SQLAlchemy URL.")],
    sample: Annotated[
        int, typer.Option("--sample", min=1, max=100_000, metavar="N", help="How many decided configs to measure.")
    ] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of which configs are drawn.")] = 0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=1000, metavar="N", help="Rounds, in each of which both run.")
    ] = 5,
    policy: Annotated[
        str | None,
        typer.Option("--policy", metavar="POLICY", help="Only decisions of this policy.", show_default=False),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            metavar="PROFILE",
            help="Only decisions of this routing profile: a name, or the file that a histogram was recorded in.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure some decided configs again beside the default, on this device, and say what has drifted.

    A config has drifted if it is slower than stored beyond the noise, if its win over the default is gone, or if it
    fails; the command then exits with 4. Whether bits are still right, check and certify say. A table holds the name
    of a recorded routing only, so what was tuned for one is measured with --routing FILE.

    Examples:

        tilecast cache verify mixtral.db --sample 20

        tilecast cache verify skewed.db --routing record.json
    """
    from tilecast import environment
    from tilecast.autotune.device_lock import device_lock
    from tilecast.autotune.routing_profiles import load_profile
    from tilecast.autotune.verify import sample_decided

    if policy is not None and policy not in POLICIES:
        raise UsageError(f"--policy is {policy!r:.40}, expected one of {', '.join(POLICIES)}")
    output = Output(json_wanted=json_)
    use_threads(threads)
    profile = None if routing is None else load_profile(routing)
    found = read_table(source)
    here = environment.here()
    decisions = _of_routing(_usable(found, here, source, policy), profile, source)
    check_configs(TuningTable(found.environments, tuple(decisions)), here, source)
    drawn = sample_decided(decisions, sample, seed)
    for origin in origins(found, here):
        if origin.soft and any(decision.environment == origin.environment.digest for decision, _ in drawn):
            output.warn(f"decided where {'; '.join(origin.soft)}: times may differ for that alone")
    output.note(f"measuring {plural(len(drawn), 'config')} of {2 * len(decisions)} that fit this machine")
    with resumable("no results"), device_lock(here):
        results = _measured(output, drawn, here, rounds, profile)
    drifted = [result for result in results if result.drifted]
    output.emit(
        {
            "command": "cache verify",
            "source": source,
            "digest": found.digest,
            "environment": {"digest": here.digest, **here.to_json()},
            "seed": seed,
            "results": [_json(result) for result in results],
            "drifted": len(drifted),
        }
    )
    _show(output, results)
    if drifted:
        raise CoverageError(
            f"{len(drifted)} of {plural(len(results), 'config')} of {source} drifted, the first at "
            f"{_name(drifted[0])}: {drifted[0].detail}; tune again here"
        )


def _usable(found: TuningTable, here: Environment, source: str, policy: str | None) -> list[Decision]:
    """Return the decisions made in an environment that fits. Raises CoverageError, field by field, if none was."""
    from tilecast.cache_store.match import blocking

    environments = {e.digest: e for e in found.environments}
    kept = [d for d in found.decisions if policy in (None, d.policy)]
    usable = [d for d in kept if here.accepts(environments[d.environment])]
    if usable:
        return usable
    if not kept:
        raise CoverageError(f"{source} has no decision to verify" + ("" if policy is None else f" of policy {policy}"))
    refused = [blocking(here, environments[digest]) for digest in dict.fromkeys(d.environment for d in kept)]
    fields = "; ".join(str(difference) for difference in min(refused, key=len))
    raise CoverageError(f"{source} was tuned in another environment, so times do not compare here: {fields}")


def _of_routing(decisions: list[Decision], profile: RoutingProfile | None, source: str) -> list[Decision]:
    """Return the decisions of a profile, or all. Raises CoverageError for none, and where routing cannot be rebuilt."""
    names = sorted({d.routing for d in decisions})
    if profile is None:
        unknown = [name for name in names if name.startswith("histogram:")]
        if unknown:
            raise CoverageError(
                f"{source} has decisions for routing {', '.join(unknown)}, of which it holds the name only; "
                f"give the file that was recorded, --routing FILE, or the name of another profile"
            )
        return decisions
    kept = [d for d in decisions if d.routing == profile.name]
    if not kept:
        raise CoverageError(f"{source} has no decision for routing {profile.name}; it has: {', '.join(names)}")
    return kept


def _measured(
    output: Output,
    drawn: list[tuple[Decision, ExpertGemm]],
    here: Environment,
    rounds: int,
    profile: RoutingProfile | None,
) -> list[Verified]:
    from tilecast.autotune.measure import DeviceMeasurer
    from tilecast.autotune.verify import verify as measure_again
    from tilecast.kernels import registry

    results: list[Verified] = []
    measurers = {
        routing: DeviceMeasurer(here, registry, routing=profile or routing)
        for routing in dict.fromkeys(decision.routing for decision, _ in drawn)
    }
    with output.progress("measuring") as reporter:
        for number, (decision, gemm) in enumerate(drawn):
            label = f"{decision.layer.label}, {gemm.name} at {decision.bucket.tokens}"
            reporter.update(done=number, total=len(drawn), text=label, remaining_s=None)
            measurer = measurers[decision.routing]
            results.append(measure_again(measurer, decision, gemm, rounds=rounds))
            following = drawn[number + 1][1] if number + 1 < len(drawn) else None
            if following != gemm:
                measurer.release(gemm)
    return results


def _name(result: Verified) -> str:
    return f"{result.decision.layer.label}, {result.gemm.name} at {result.decision.bucket.tokens}"


def _show(output: Output, results: list[Verified]) -> None:
    shown = table("Measured again", COLUMNS, left=("layer", "GEMM", "verdict", "config"))
    for result in results:
        verdict = result.verdict if result.detail == "as stored" else f"{result.verdict}: {result.detail}"
        add_row(
            shown, result.decision.layer.label, str(result.decision.bucket.tokens), result.gemm.name,
            microseconds(result.choice.p50_us), microseconds(result.p50_us), microseconds(result.default_us),
            percent(result.noise), verdict, config_text(result.choice.config),
            style="bold" if result.drifted else None,
        )  # fmt: skip
    output.show(shown)
    output.show(f"{plural(len(results), 'config')} measured, {sum(r.drifted for r in results)} drifted")


def _json(result: Verified) -> dict[str, Json]:
    return {
        "layer": result.decision.layer.label,
        "layer_digest": result.decision.layer.digest,
        "gemm": result.gemm.name,
        "tokens": result.decision.bucket.tokens,
        "policy": result.decision.policy,
        "routing": result.decision.routing,
        "config": result.choice.config.to_json(),
        "stored_us": result.choice.p50_us,
        "stored_default_us": result.choice.default_us,
        "p50_us": result.p50_us,
        "default_us": result.default_us,
        "noise": result.noise,
        "verdict": result.verdict,
        "detail": result.detail,
    }

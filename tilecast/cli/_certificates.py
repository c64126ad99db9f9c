"""Certificates on the command line: their tables, their file, and what they mean for a table's decisions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.cli._output import Output, add_row, plural, table
from tilecast.errors import CacheError, CoverageError, InputError
from tilecast.evidence import Decision, TuningTable

if TYPE_CHECKING:
    from tilecast.autotune.certificate import Certificate, ClassResult
    from tilecast.environment import Environment

FORMAT = 1
MAX_FILE_BYTES = 64 << 20
COLUMNS = ("GEMM", "class", "kernels", "members", "inputs", "verdict", "control", "SHA-256 of the outputs", "seconds")


def certificates_json(found: Iterable[Certificate]) -> dict[str, Json]:
    """Return the part of the document that `read_certificates` reads."""
    return {"format": FORMAT, "certificates": [certificate.to_json() for certificate in found]}


def read_certificates(path: Path) -> tuple[Certificate, ...]:
    """Read a document that `certify --save` wrote. Raises CacheError."""
    from tilecast.autotune.certificate import Certificate
    from tilecast.cache_store.files import reason, regular_size

    size = regular_size(path)
    if size is None:
        raise CacheError(f"{path}: does not exist; make it with `tilecast certify --save`")
    if size > MAX_FILE_BYTES:
        raise CacheError(f"{path}: has {size} bytes, more than the {MAX_FILE_BYTES} allowed; check the path")
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({reason(error)}); check its permissions") from error
    except (ValueError, RecursionError):
        raise CacheError(f"{path}: is not JSON; expected what `tilecast certify --save` wrote") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CacheError(f"{path}: is no certificate of format {FORMAT}; make it anew with `tilecast certify --save`")
    try:
        entries = document.get("certificates")
        if not isinstance(entries, list):
            raise InputError("lacks its list of certificates")
        return tuple(Certificate.from_json(entry) for entry in entries)
    except InputError as error:
        raise CacheError(f"{path}: {error}; make it anew with `tilecast certify --save`") from error


def show_certificates(output: Output, found: Sequence[Certificate]) -> None:
    """Print a table for each layer, why classes failed, and which are alike."""
    for layer in dict.fromkeys(certificate.gemm.layer for certificate in found):
        own = [certificate for certificate in found if certificate.gemm.layer == layer]
        shown = table(layer.label, COLUMNS, left=("GEMM", "class", "kernels", "verdict", "SHA-256 of the outputs"))
        for certificate in own:
            for result in certificate.classes:
                add_row(shown, certificate.gemm.name, *_cells(result))
        output.show(shown)
        for certificate in own:
            _show_remarks(output, certificate)
    # What is no certificate should not pass for one, also where only the last line is read.
    if any(result.verdict == "equal" and not result.certified for c in found for result in c.classes):
        output.warn("too few inputs: this is not a certificate")


def _cells(result: ClassResult) -> tuple[str, ...]:
    verdict = {"different": "BROKEN", "raised": "RAISED", "control failed": "UNPROVEN"}.get(result.verdict)
    kernels = dict.fromkeys(member.config.kernel for member in result.members)
    return (
        result.numerics[:8],
        " ".join(kernels) or result.reference.kernel,
        str(len(result.members)),
        f"{result.inputs:,}",
        verdict or ("certified" if result.certified else "equal, not a certificate"),
        f"{result.control:,} differ" if result.foreign is None else f"{result.foreign.different:,} differ, other class",
        result.outputs[:16] or "—",
        f"{result.seconds:.1f}",
    )


def _show_remarks(output: Output, certificate: Certificate) -> None:
    name = certificate.gemm.name
    for result in certificate.classes:
        if result.reason is not None:
            output.show(f"{name} class {result.numerics[:8]}: {result.reason}")
    for pair in certificate.alike:
        output.show(
            f"{name}: classes {pair.first[:8]} and {pair.second[:8]} are claimed to differ, and gave equal bits on all "
            f"{certificate.inputs:,} inputs"
        )
    if certificate.unpromised:
        left_out = plural(certificate.unpromised, "config")
        output.note(f"{name}: {left_out} left out, of kernels that do not claim to be free of the batch")


def against_json(found: Iterable[Certificate], before: Sequence[Certificate], here: Environment) -> dict[str, Json]:
    """Return what is different from an earlier run."""
    from tilecast.autotune.certificate import changes

    changed, compared = changes(found, before)
    return {
        "compared": compared,
        "changed": [change.to_json() for change in changed],
        "environment": [str(mismatch) for mismatch in _mismatches(before, here)],
    }


def _mismatches(before: Iterable[Certificate], here: Environment) -> Iterable[object]:
    earlier = dict.fromkeys(certificate.environment for certificate in before)
    return dict.fromkeys(mismatch for environment in earlier for mismatch in here.compare(environment))


def show_against(
    output: Output, found: Sequence[Certificate], before: Sequence[Certificate], here: Environment, source: str
) -> None:
    """Print what is different from an earlier run. Raises CoverageError if bits changed or nothing compares."""
    from tilecast.autotune.certificate import changes

    for mismatch in _mismatches(before, here):
        output.show(f"{source}: {mismatch}")
    changed, compared = changes(found, before)
    if not compared:
        raise CoverageError(
            f"{source} shares no class on the same inputs with this run, so nothing was compared; "
            f"use the same layers, --inputs and --seed"
        )
    for change in changed:
        output.show(
            f"{change.gemm.layer.label} {change.gemm.name} class {change.numerics[:8]}: "
            f"outputs {change.now[:16]}, before {change.before[:16]}"
        )
    if changed:
        raise CoverageError(
            f"{len(changed)} of {plural(compared, 'class', 'classes')} gave other bits than in {source}; "
            f"what was made with the earlier bits cannot be reproduced here"
        )
    missing = sum(len(certificate.classes) for certificate in found) - compared
    rest = f"; {plural(missing, 'class was', 'classes were')} not in it" if missing else ""
    output.show(f"{plural(compared, 'class', 'classes')} gave the same bits as in {source}{rest}")


def updated_table(table: TuningTable, found: Iterable[Certificate], here: Environment) -> tuple[TuningTable, int]:
    """Return the table with what was found as the certificate of its reproducible decisions, and how many changed.

    `hardware` where the configs of both GEMMs ran as members of certified classes, on the device and driver that the
    decision was made on; `none` where a class of one failed. Other decisions stay as they are.
    """
    outcome = {
        (certificate.gemm, member.config): result.certified
        for certificate in found
        for result in certificate.classes
        for member in result.members
    }
    usable = {e.digest for e in table.environments if here.accepts(e) and e.driver == here.driver}

    def judged(decision: Decision) -> Decision:
        if decision.environment not in usable or decision.policy != "reproducible":
            return decision
        seen = [outcome.get((gemm, decision.choice(gemm.name).config)) for gemm in decision.layer.gemms]
        if False in seen:
            return replace(decision, certificate="none")
        return replace(decision, certificate="hardware") if None not in seen else decision

    decisions = tuple(judged(decision) for decision in table.decisions)
    changed = sum(a != b for a, b in zip(decisions, table.decisions, strict=True))
    return TuningTable(table.environments, decisions), changed

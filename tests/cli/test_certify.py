"""`tilecast certify`, end to end on the CPU kernels; and on kernels that lie, where it must say so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import LAYER, Command, table_of
from tests.torch_kernel import TorchKernel
from tilecast.autotune.certificate import Certificate, ClassResult, Member
from tilecast.cache_store.bundle import export_table, import_table
from tilecast.cli._certificates import updated_table
from tilecast.environment import Environment, cpu_environment
from tilecast.evidence import TuningTable
from tilecast.kernels import registry
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.spec import Registry, numerics_class

# Thousands of tiny launches: on a busy machine each would wait for its slowest thread.
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "E=2,H=40,I=24,k=1"
LOOK = ("--probe", "--inputs", "9")


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> TorchKernel:
    """A registry with one kernel, a variant of which sums in another order than its class says."""
    kernel = TorchKernel("misclassed")
    monkeypatch.setattr("tilecast.kernels.registry", Registry((kernel,)))
    return kernel


def certificates(document: str) -> list[Certificate]:
    return [Certificate.from_json(entry) for entry in json.loads(document)["certificates"]]


def test_a_model_is_looked_at(cli: Command) -> None:
    done = cli("certify", TINY, "--tokens", "1", "--members", "2", *LOOK)
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if "llvm.moe_gemm" in line]
    assert len(rows) == 2
    assert all("equal, not a certificate" in row and " 9 " in row for row in rows)
    assert "this is not a certificate" in done.err
    assert "do not claim to be free of the batch" in done.err


def test_a_table_is_certified_updated_saved_and_compared(cli: Command, tmp_path: Path) -> None:
    path, saved = tmp_path / "table.db", tmp_path / "run.json"
    export_table(table_of(certificate="none"), path)
    done = cli("certify", path, "--update", "--save", saved, "--json")
    assert done.code == 0, done.err
    assert saved.read_text() == done.out
    found = certificates(done.out)
    assert [(c.gemm, len(c.classes)) for c in found] == [(LAYER.up, 1), (LAYER.down, 1)]
    members = {member.config for c in found for member in c.classes[0].members}
    assert {d.choice(g.name).config for d in table_of().decisions for g in LAYER.gemms} <= members
    assert all(c.classes[0].certified for c in found)
    assert json.loads(done.out)["updated"] == 2
    assert import_table(path) == table_of(certificate="hardware")

    again = cli("certify", path, "--against", saved, "--save", saved, "--update")
    assert again.code == 0, again.err
    assert "2 classes gave the same bits as in" in again.out
    assert "certificates of 0 decisions changed" in again.out
    assert [c.classes[0].outputs for c in certificates(saved.read_text())] == [c.classes[0].outputs for c in found]


def test_other_bits_than_before_are_told(cli: Command, liar: TorchKernel, tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    line = ("certify", TINY, "--tokens", "1", "--members", "1", *LOOK)
    assert cli(*line, "--save", saved).code == 0
    document = json.loads(saved.read_text())
    document["certificates"][1]["classes"][0]["outputs"] = "f" * 64
    driver = Environment.from_json(
        {k: v for k, v in document["certificates"][0]["environment"].items() if k != "digest"} | {"driver": "older"}
    )
    for certificate in document["certificates"]:
        certificate["environment"] = {"digest": driver.digest, **driver.to_json()}
    saved.write_text(json.dumps(document))
    done = cli(*line, "--against", saved)
    assert done.code == 4
    assert "driver: here '', there 'older'" in done.out
    assert "before " + "f" * 16 in done.out
    assert "1 of 4 classes gave other bits" in done.err.splitlines()[-1]
    as_json = json.loads(cli(*line, "--against", saved, "--json").out)["against"]
    assert (as_json["compared"], len(as_json["changed"])) == (4, 1)
    other_seed = cli(*line, "--against", saved, "--seed", "1")
    assert other_seed.code == 4 and "nothing was compared" in other_seed.err


def test_a_broken_class_is_told_with_member_row_and_column(cli: Command, liar: TorchKernel) -> None:
    done = cli("certify", TINY, "--tokens", "64", *LOOK)
    assert done.code == 4
    line = done.err.splitlines()[-1]
    assert "variant=misclassed differs on" in line and "row" in line and "column" in line
    assert "BROKEN" in done.out and "equal, not a certificate" in done.out


def test_a_control_that_cannot_fail_is_told(cli: Command, liar: TorchKernel) -> None:
    done = cli("certify", "E=2,H=1,I=1,k=1", "--tokens", "1", "--members", "1", *LOOK)
    assert done.code == 4
    assert "with K reversed only 0 of 9" in done.err.splitlines()[-1]
    assert "UNPROVEN" in done.out


def test_a_layer_whose_sums_are_exact_is_proven(cli: Command) -> None:
    """int8 codes and rows of 16 bits: K fits one group, so the class of floats is the control."""
    done = cli("certify", "E=2,H=128,I=128,k=1,w=int8_channel", "--tokens", "1", "--members", "1", *LOOK, "--json")
    assert done.code == 0, done.err
    results = [result for certificate in certificates(done.out) for result in certificate.classes]
    assert {result.verdict for result in results} == {"equal"}
    exact = [result for result in results if "group_sums" in result.fields]
    assert len(exact) == (2 if host_isa().byte_pairs else 0)
    for result in exact:
        assert result.control == 0 and result.foreign is not None and result.foreign.config is not None
        assert result.reference["dot"] == "int16" and result.foreign.config["dot"] == "fma"
        assert 2 * result.foreign.different > result.inputs


def test_exact_sums_without_another_class_are_not_proven(cli: Command) -> None:
    """4-bit codes with rows of fp32 have one class on every CPU: nothing shows that another would have been seen."""
    done = cli("certify", "E=2,H=64,I=64,k=1,w=awq_g64,dtype=fp32", "--tokens", "1", "--members", "1", *LOOK)
    assert done.code == 4
    assert "llvm.moe_gemm has no other class to tell it from, so equal bits prove nothing" in done.err.splitlines()[-1]
    assert done.out.count("UNPROVEN") == 2 and done.out.count("0 differ") == 2


def test_nothing_to_certify_is_told(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = TorchKernel("matmul")
    kernel.batch_invariant = lambda gemm, config: False  # type: ignore[method-assign]  # claims otherwise
    monkeypatch.setattr("tilecast.kernels.registry", Registry((kernel,)))
    done = cli("certify", TINY, "--tokens", "1", *LOOK)
    assert done.code == 4 and "no class to certify" in done.err.splitlines()[-1]


def judged(table: TuningTable, **verdicts: dict[str, int]) -> TuningTable:
    """Return the table after certificates in which every config of `up` and `down` ran, with counts as given."""
    here, found = cpu_environment(), []
    for gemm in LAYER.gemms:
        configs = dict.fromkeys(d.choice(gemm.name).config for d in table.decisions)
        first = next(iter(configs))
        counts = {"equal": 1000, "different": 0, **verdicts.get(gemm.name, {})}
        result = ClassResult(
            numerics=numerics_class(registry[first.kernel], gemm, first, here), fields={}, reference=first,
            members=tuple(Member(config=config, **counts) for config in configs),
            inputs=sum(counts.values()), control=1000, outputs="0" * 64,
        )  # fmt: skip
        found.append(Certificate(environment=here, gemm=gemm, inputs=result.inputs, seed=0, classes=(result,)))
    updated, changed = updated_table(table, found, here)
    assert changed == sum(a != b for a, b in zip(updated.decisions, table.decisions, strict=True))
    return updated


def test_decisions_get_what_was_found() -> None:
    weak, sure = table_of(certificate="none"), table_of(certificate="hardware")
    assert judged(weak) == sure
    assert judged(sure, down={"equal": 999, "different": 1}) == weak
    assert judged(sure, up={"equal": 50}) == weak, "fewer than 1,000 inputs certify nothing"
    elsewhere = table_of(certificate="none", driver="another")
    assert judged(elsewhere) == elsewhere, "made with another driver"
    fastest = replace(weak, decisions=tuple(replace(d, policy="fastest") for d in weak.decisions))
    assert judged(fastest) == fastest


BAD_LINES = [
    (2, [], "MODEL"),
    (2, [TINY, "--inputs", "50"], "--probe"),
    (2, [TINY, "--inputs", "0"], "--inputs"),
    (2, [TINY, "--members", "0"], "--members"),
    (2, [TINY, "--layer", TINY], "--layer"),
    (2, [TINY, "--update"], "--update"),
    (2, [TINY, "--tokens", "x"], "--tokens"),
    (2, ["table.db", "--tp", "2"], "a table has its own"),
    (2, ["table.db", "--update", "--probe", "--inputs", "9"], "--update"),
    (3, ["no/such.db"], "no/such.db"),
    (3, ["nobody-7b"], "nobody-7b"),
    (3, [TINY, "--against", "no/such.json"], "no/such.json"),
    (3, [TINY, "--against", "list.json"], "no certificate of format"),
    (3, [TINY, "--against", "table.db"], "not JSON"),
    (3, [TINY, "--against", "lacking.json"], "lacking.json: lacks"),
    (3, [TINY, "--against", "wrong.json"], "wrong.json: certificate"),
    (3, [TINY, "--save", "no/folder/x.json"], "no/folder"),
    (4, ["foreign.db"], "no decision for this machine"),
]


@pytest.mark.parametrize(("code", "line", "word"), BAD_LINES, ids=[" ".join(line)[:50] for _, line, _ in BAD_LINES])
def test_a_bad_line_ends_before_anything_runs(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, line: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    export_table(table_of(), tmp_path / "table.db")
    export_table(table_of(device="another CPU"), tmp_path / "foreign.db")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "lacking.json").write_text('{"format": 1}')
    (tmp_path / "wrong.json").write_text('{"format": 1, "certificates": [{}]}')
    done = cli("certify", *line)
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1].startswith("tilecast: ") and word in done.err.splitlines()[-1]


def test_a_launcher_is_refused(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = cli("certify", TINY)
    assert done.code == 2 and "torchrun" in done.err

"""`compare` over ranks: equal bits on both, and a collective that is wrong is named, not what runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_models import save_tiny
from tests.torchrun.launch import reports as reports_of

pytestmark = pytest.mark.torchrun


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compared")
    save_tiny("mixtral", folder / "mixtral", torch.float32, 0)
    return reports_of("compared", folder, 2)


def test_two_ranks_have_the_same_bits_and_no_fault(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        whole = report["whole"]
        assert whole["ranks"] == 2
        assert whole["reference"]["first_fault"] is None
        # Tilecast gathers where eager reduces: their results are no bits to compare.
        assert whole["reference"]["first_difference"].endswith(".experts")
        assert {one["check"]: one["verdict"] for one in whole["invariance"]}["ranks"] == "equal"
        kinds = {one["kind"] for one in whole["reference"]["operations"]}
        assert "collective" in kinds


def test_a_collective_that_is_wrong_on_one_rank_is_named(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        first = report["one_rank"]["first"]
        assert report["one_rank"]["verdict"] == "differs"
        assert (first["kind"], first["operation"]) == ("collective", "model.embed_tokens.collective")


def test_a_collective_that_depends_on_the_batch_is_named_and_not_what_runs_it(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["batch"]["verdict"] == "differs"
        assert report["batch"]["first"]["operation"] == "model.embed_tokens.collective"
        causes = {cause["operation"] for cause in report["batch"]["causes"]}
        # A rank's share of the embedding is the same in a batch, what comes back is not.
        assert "model.embed_tokens.collective" in causes
        assert "model.embed_tokens" not in causes

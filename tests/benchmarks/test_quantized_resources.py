"""The published table of what kernels on quantised weights compile to: from the files, about today's defaults."""

from __future__ import annotations

import pytest

from benchmarks import quantized_resources as resources
from tilecast.kernels.gpu.target import parse_target


def test_page_holds_the_table_of_the_files() -> None:
    page = resources.PAGE.read_text()
    assert resources.with_table(page, resources.table(resources.read_results())) == page


@pytest.mark.parametrize("name", resources.TARGETS)
def test_files_are_about_today_s_defaults_which_spill_nothing(name: str) -> None:
    target = parse_target(name)
    rows = resources.read_results()[f"{target.kind}-{target.arch}"]["rows"]
    expected = [{"kernel": config.kernel, **dict(config.params)} for _, _, _, config in resources.asked(target)]
    assert [row["config"] for row in rows] == expected
    for row in rows:
        assert not row["error"] and row["instructions"], row
        assert row["spill_bytes"] == row["stack_bytes"] == 0, row

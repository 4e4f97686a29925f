from __future__ import annotations

import csv
import io

import pytest

from refluence.report.csv_export import csv_text, safe_cell


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r=1", "＝1", "=cmd|' /C calc'!A0"])
def test_formulas_are_disarmed(text: str) -> None:
    assert safe_cell(text) == f"'{text}"


def test_numbers_and_plain_text_stay() -> None:
    assert [safe_cell(cell) for cell in (-1.5, 7, "cat", "")] == [-1.5, 7, "cat", ""]


def test_round_trip_with_quotes_and_line_breaks() -> None:
    text = csv_text(["row", "label"], [(1, 'a "b", c'), (2, "two\nlines"), (3, "=x")])
    assert list(csv.reader(io.StringIO(text, newline=""))) == [
        ["row", "label"],
        ["1", 'a "b", c'],
        ["2", "two\nlines"],
        ["3", "'=x"],
    ]

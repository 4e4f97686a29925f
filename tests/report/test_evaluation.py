"""The page of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from refluence.report.evaluation import Evaluated, Figure, Part, part_boards, write_evaluation
from refluence.report.facts import Fact

TABLE = pd.DataFrame(
    [
        ("ggn:cg", "method", "lds", 0.5, 0.4, 0.6, 0.95),
        ("loss", "baseline", "lds", -0.5, -0.6, -0.4, 0.95),
        ("random", "baseline", "lds", math.nan, math.nan, math.nan, 0.95),
        ("ggn:cg", "method", "cardinality", 0.3, math.nan, math.nan, 0.95),
    ],
    columns=["method", "kind", "metric", "value", "low", "high", "confidence"],
)
PNG = bytes.fromhex("89504e470d0a1a0a")


def page(path: Path, name: str = "ggn:cg", **changes: object) -> str:
    table = TABLE.replace({"method": {"ggn:cg": name}})
    given: dict[str, object] = {
        "title": "Evaluation: digits",
        "description": "",
        "findings": ["ggn:cg is best."],
        "facts": [Fact("Methods", "1", "ggn:cg")],
        "parts": [Part("lds", "LDS", "What it is.", table, Figure(PNG, "a picture"))],
        "skipped": {"loo": "not convex"},
        "notes": [],
        "manifest": {"seed": 0},
        **changes,
    }
    return write_evaluation(path / "new" / "report.html", Evaluated(**given)).read_text(encoding="utf-8")  # type: ignore[arg-type]


def test_boards_are_ordered_and_to_scale() -> None:
    lds, cardinality = part_boards(TABLE)
    assert [bar.method for bar in lds.bars] == ["ggn:cg", "loss", "random"]
    best, worst, unknown = lds.bars
    assert [best.low, best.place, best.high] == pytest.approx([100 * 10 / 12, 100 * 11 / 12, 100])
    assert [worst.low, worst.place] == pytest.approx([0, 100 / 12])
    assert lds.zero == pytest.approx(50)
    assert (unknown.value, unknown.interval) == ("—", "—")
    assert cardinality.bars[0].interval == "—"
    assert cardinality.bars[0].low == cardinality.bars[0].high == cardinality.bars[0].place


def test_the_page_holds_every_number_and_reason(tmp_path: Path) -> None:
    text = page(tmp_path)
    for expected in ("ggn:cg is best.", "0.400 to 0.600", "−0.500", "not convex", "a picture", "(baseline)"):
        assert expected in text
    assert text.count('src="data:image/png;base64,') == text.count("<img") == 1
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text


def test_names_are_escaped(tmp_path: Path, hostile: str) -> None:
    text = page(tmp_path, name=hostile, findings=[hostile], skipped={hostile: hostile}, manifest={"x": hostile})
    assert "<script" not in text
    assert text.count("<img") == 1
    assert text.count("</style>") == 1

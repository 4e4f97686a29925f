from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from refluence.report.presentation import MAX_TEXT, Presentation, column_names, guess_kind, row_of, views


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ((torch.zeros(3, 32, 32), 1), "image"),
        ((torch.zeros(28, 28),), "image"),
        ((torch.zeros(784),), "image"),
        (torch.zeros(64), "image"),
        ((torch.zeros(32, 32, 3, dtype=torch.uint8),), "image"),
        ((torch.zeros(12, dtype=torch.long),), "text"),
        (("a sentence", 0), "text"),
        ({"input_ids": torch.zeros(7, dtype=torch.long), "labels": torch.tensor(0)}, "text"),
        ({"labels": torch.tensor(0), "pixel_values": torch.zeros(3, 16, 16)}, "image"),
        ((torch.zeros(30),), "table"),
        ((torch.tensor(3),), "table"),
        ((torch.zeros(5, 3),), "table"),
        ({}, "table"),
    ],
)
def test_guess_kind(sample: Any, kind: str) -> None:
    assert guess_kind(sample) == kind


def test_what_the_user_gives_decides_the_kind() -> None:
    sample = (torch.zeros(64),)
    assert Presentation(feature_names=["a"] * 64).kind_of(sample) == "table"
    assert Presentation(text=str).kind_of(sample) == "text"
    assert Presentation(image=lambda s: np.zeros((2, 2), np.uint8)).kind_of(sample) == "image"
    assert Presentation(kind="table").kind_of(sample) == "table"
    with pytest.raises(ValueError, match="unknown kind"):
        Presentation(kind="video")


def test_row_of_keeps_the_structure() -> None:
    pair = namedtuple("pair", "x y")
    batch = {"text": ["first", "second"], "pair": pair(torch.arange(2), torch.eye(2)), "scale": 3}
    row = row_of(batch, 1)
    assert row["text"] == "second"
    assert (row["pair"][0], row["pair"][1].tolist(), row["scale"]) == (1, [0.0, 1.0], 3)


def test_texts_by_function_by_token_and_masked() -> None:
    sample = {"input_ids": torch.tensor([5, 6, 0]), "attention_mask": torch.tensor([1, 1, 0])}
    assert views([sample], Presentation())[0].text == "5 6"
    named = Presentation(text=lambda s: "/".join(str(int(t)) for t in s["input_ids"]))
    assert views([sample], named)[0].text == "5/6/0"
    assert len(views([("x" * 9999, 0)], Presentation())[0].text) == MAX_TEXT


def test_table_rows_and_names() -> None:
    samples = [(torch.linspace(0, 1, 30), torch.tensor(1.0))]
    presentation = Presentation(feature_names=np.array(["age", "height"]))
    names, total = column_names(samples, presentation)
    assert (names[:3], len(names), total) == (("age", "height", "x2"), 12, 30)
    cells = views(samples, presentation)[0].cells
    assert (len(cells), cells[:2]) == (12, ("0", "0.0345"))


def test_class_names() -> None:
    presentation = Presentation(class_names=["cat", "dog"])
    assert [presentation.class_name(i) for i in (0, 1, 2, -1)] == ["cat", "dog", "2", "-1"]


def test_no_samples() -> None:
    assert views([], Presentation()) == []

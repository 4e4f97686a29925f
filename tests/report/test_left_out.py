"""What the page says of training examples that the fit left out."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.report.content import Content, build_content
from refluence.report.facts import facts
from refluence.report.presentation import Presentation


def made(bad: list[int], suspicious: int = 50) -> tuple[rf.Influence, rf.Scores, Content]:
    """A fit on 20 rows, of which some are NaN, and its page's content."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=generator), torch.randint(2, (20,), generator=generator)
    x[bad] = torch.nan
    influence = rf.Influence(
        rf.Task(nn.Linear(3, 2)), damping=0.1, progress=False, execution=rf.Execution(skip_bad=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        influence.fit((x, y))
    test = torch.randn(4, 3, generator=generator), torch.randint(2, (4,), generator=generator)
    scores = influence.score(test)
    content = build_content(
        influence,
        scores,
        (x, y),
        test,
        presentation=Presentation(),
        top=20,
        title="Title",
        suspicious=suspicious,
        notes=(),
    )
    return influence, scores, content


def test_a_fact_says_how_many_and_which() -> None:
    influence, scores, content = made([4, 17])
    [fact] = [fact for fact in facts(influence, scores) if fact.name == "Examples left out"]
    assert fact in content.facts
    assert (fact.value, fact.tone) == ("2", "caution")
    assert "2 of 20 training examples are left out: row 4 (the loss is nan), row 17 (the loss is nan)" in fact.reading
    assert fact.reading.endswith("; their scores are 0")


def test_a_fit_of_all_examples_says_nothing() -> None:
    influence, scores, _ = made([])
    assert "Examples left out" not in [fact.name for fact in facts(influence, scores)]


@pytest.mark.parametrize("suspicious", [50, 19, 3])
def test_they_are_neither_listed_nor_shown(suspicious: int) -> None:
    _, _, content = made([0, 4, 17], suspicious)
    assert content.suspects_asked == len(content.suspects) == min(suspicious, 17)
    shown = {suspect.row for suspect in content.suspects}
    shown |= {neighbour.row for card in content.cards for _, side in card.sides for neighbour in side}
    assert {0, 4, 17}.isdisjoint(shown)

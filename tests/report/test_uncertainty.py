"""The page of a sketched run: every number has its error, and the page says what the error is and is not."""

from __future__ import annotations

import dataclasses
import html
import re
from typing import Any

import pytest
import torch

import refluence as rf
from refluence.report import Presentation
from refluence.report.content import MAX_CARDS, Content, build_content
from refluence.report.page import render
from refluence.report.uncertainty import error_facts, error_sentence


def sketched(digits: Any, corrected: bool = True, curvature: str = "fisher", size: int = 96) -> Any:
    solver = rf.solvers.Sketched(rf.sketches.SJLT(size, seed=1), corrected)
    influence = rf.Influence(digits.influence.task, curvature, solver, damping=0.01, progress=False).fit(digits.train)
    rows = digits.scores.test_ids.tolist()
    return dataclasses.replace(digits, influence=influence, scores=influence.score(digits.test).rows(rows))


def content_of(f: Any, top: int) -> Content:
    return build_content(
        f.influence,
        f.scores,
        f.train,
        f.test,
        presentation=Presentation(),
        top=top,
        title="Title",
        suspicious=5,
        notes=(),
    )


def words_of(content: Content) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", render(content)))


@pytest.fixture(scope="module")
def run(digits: Any) -> Any:
    return sketched(digits)


def test_every_neighbour_has_the_numbers_of_the_tables(run: Any) -> None:
    content = content_of(run, top=4)
    assert len(content.cards) == len(run.scores.test_ids) <= MAX_CARDS
    top, bottom = run.scores.top(4), run.scores.bottom(4)
    for card in content.cards:
        for side, frame, name in (
            (card.helpful, top, "probability_in_top"),
            (card.harmful, bottom, "probability_in_bottom"),
        ):
            expected = frame[frame["test"] == card.row]
            assert [n.row for n in side] == expected["train"].tolist()
            assert [n.change for n in side] == pytest.approx((expected["score"] / 400).tolist())
            half = (expected["high"] - expected["low"]) / 2 / 400
            assert [n.half_width for n in side] == pytest.approx(half.tolist())
            assert [n.vanishing for n in side] == (~expected["distinguishable"]).tolist()
            assert [n.chance for n in side] == pytest.approx(expected[name].tolist(), abs=1e-9)


def test_the_page_shows_them_and_says_what_they_are(run: Any) -> None:
    content = content_of(run, top=4)
    words = words_of(content)
    shown = [n for card in content.cards for n in (*card.helpful, *card.harmful)]
    for name in ("helpful", "harmful"):
        asked = sum(len(getattr(card, name)) for card in content.cards)
        assert words.count(f"chance of being among the 4 most {name}:") == asked
    assert words.count("±\xa0") == len(shown)
    assert words.count("indistinguishable from zero") == sum(n.vanishing for n in shown)
    assert "each score has a 95 % interval" in words
    assert "the error of the random projection alone" in words
    assert "nothing of whether removing an example does what its score predicts" in words
    assert "No ± is shown" not in words


def test_the_size_of_the_errors_is_a_fact_and_a_caution_where_it_is_large(run: Any, digits: Any) -> None:
    scores = run.scores
    share = float(scores.error.norm() / scores.values.norm())
    [fact] = error_facts(run.influence, scores)
    assert fact.value.startswith(f"{100 * share:.0f}")
    assert fact.tone == ("caution" if share > 0.5 else "plain")
    assert "λ =" not in fact.reading
    sure = dataclasses.replace(scores, error=scores.error * 0.2 / share)
    [small] = error_facts(run.influence, sure)
    assert (small.value, small.tone) == ("20\xa0% of their size", "plain")
    zero = 100 * float(sure.indistinguishable().double().mean())
    assert f"{zero:.0f}\xa0% of all intervals hold zero" in small.reading or zero < 10
    [large] = error_facts(run.influence, dataclasses.replace(scores, error=scores.error * 0.6 / share))
    assert large.tone == "caution"
    assert error_facts(digits.influence, digits.scores) == ()


def test_a_plain_sketch_says_which_damping_its_scores_estimate(digits: Any) -> None:
    plain = sketched(digits, corrected=False)
    kappa = plain.scores.target_damping
    assert kappa > 0.011
    [fact] = error_facts(plain.influence, plain.scores)
    assert f"estimate those at λ = {kappa:.3g}"[:26] in fact.reading
    assert "at the damping that the scores estimate" in error_sentence(plain.influence, plain.scores)


def test_what_the_errors_leave_out_is_said(digits: Any) -> None:
    both = sketched(digits, curvature="mc_fisher")
    assert "without that of the sampled labels" in error_sentence(both.influence, both.scores)
    labels = dataclasses.replace(digits.scores, error=torch.ones_like(digits.scores.values))
    assert "of the approximation alone" in error_sentence(digits.influence, labels)
    assert error_sentence(digits.influence, digits.scores).startswith("No ± is shown")

"""The banner, and the part that shows what was checked against reality."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import refluence as rf
from refluence.evaluation.verification import Verification, verify
from refluence.report import write_report
from refluence.report.formatting import signed
from refluence.report.trust import HEADLINES, trust


@pytest.fixture(scope="module")
def real(digits: Any) -> Verification:
    test = tuple(part[digits.scores.test_ids] for part in digits.test)
    return verify(digits.influence, digits.scores, test, 4, progress=False)


def made(verdict: str, rows: int = 3, **columns: Any) -> Verification:
    frame = pd.DataFrame(
        {
            "removed": np.repeat([5, 9, 40][:rows], 2),
            "test": [0, 1] * rows,
            "predicted": np.linspace(-1, 1, 2 * rows),
            "newton": np.nan,
            "measured": np.linspace(-1.1, 1.2, 2 * rows),
            "gradient_norm": 1e-9,
            "iterations": 7,
            "converged": True,
        }
    ).assign(**columns)
    return Verification(frame, 0.9, 0.95, 0.97, 0.9, verdict, "What was found.")


def written(path: Path, f: Any, **options: Any) -> str:
    return write_report(path / "r.html", f.influence, f.scores, f.train, f.test, **options).read_text(encoding="utf-8")


def words(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.S)).split())


def test_nothing_verified_is_never_green_and_says_how_to_verify(digits: Any, tmp_path: Path) -> None:
    found = trust(digits.influence, None)
    assert (found.level, found.headline) == ("mixed", "Not verified")
    assert found.checks[0].value == "not verified"
    page = words(written(tmp_path, digits))
    assert "Amber: Not verified" in page
    assert "--verify 8" in page
    assert "Checked against reality" not in page


@pytest.mark.parametrize(("verdict", "level"), [(v, level) for v, (level, _) in HEADLINES.items()])
def test_the_level_is_that_of_the_verdict(digits: Any, verdict: str, level: str) -> None:
    found = trust(digits.influence, made(verdict))
    cautions = [fact for fact in found.checks if fact.tone == "caution"]
    assert found.level == ("mixed" if level == "good" and cautions else level)
    assert found.headline.startswith(HEADLINES[verdict][1])
    assert found.sentences[0] == "What was found."


def test_an_agreement_beside_a_caution_is_not_green() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    far = rf.Influence(rf.Task(nn.Linear(3, 2)), damping=0.1, progress=False).fit((x, (x[:, 0] > 0).long()))
    found = trust(far, made("agrees"))
    assert found.level == "mixed"
    assert found.headline.endswith("with 1 caution")
    assert "not converged" in found.sentences[-1]


def test_the_banner_names_what_is_known(digits: Any) -> None:
    names = [fact.name for fact in trust(digits.influence, made("agrees")).checks]
    assert names == [
        "Slope",
        "Spearman",
        "Gradient at the model",
        "Relative residual",
        "Damping λ",
        "Effective dimension",
        "Negative eigenvalues",
    ]


def test_a_smaller_damping_is_suggested_where_predictions_are_too_small(digits: Any) -> None:
    small = dataclasses.replace(made("partly"), slope=0.3)
    assert any("smaller λ" in sentence for sentence in trust(digits.influence, small).sentences)
    assert not any("smaller λ" in sentence for sentence in trust(digits.influence, made("partly")).sentences)


def test_the_page_shows_every_number_that_was_measured(digits: Any, real: Verification, tmp_path: Path) -> None:
    page = written(tmp_path, digits, verification=real)
    section = page[page.index('id="checked"') : page.index('id="method"')]
    assert section.count("<circle") == len(real.frame) == 4 * len(digits.scores.test_ids)
    table = section[section.index('class="numbers"') :]
    for row in real.frame.to_dict("records"):
        assert f"row {row['removed']}</th>" in table
        for column in ("predicted", "measured"):
            assert signed(row[column], 3) in table
    for row in real.frame["removed"].unique():
        assert f'aria-label="Training row {row}"' in section
    assert "<title id=" in section
    assert "<desc id=" in section
    assert words(real.sentence) in words(section)


def test_refits_that_did_not_converge_are_said(digits: Any, tmp_path: Path) -> None:
    found = made("partly", converged=[True, True, False, False, True, True])
    assert "1 of 3 refits did not converge" in words(written(tmp_path, digits, verification=found))


def test_statistics_that_do_not_exist_are_a_dash(digits: Any, tmp_path: Path) -> None:
    found = dataclasses.replace(made("not converged"), slope=float("nan"))
    page = words(written(tmp_path, digits, verification=found))
    assert "Slope —" in page
    assert "did not converge" in page


def test_many_pairs_are_thinned_evenly_and_that_is_said(digits: Any, tmp_path: Path) -> None:
    few = made("agrees").frame
    frame = pd.concat([few.assign(test=few["test"] + 2 * i) for i in range(400)], ignore_index=True)
    page = written(tmp_path, digits, verification=dataclasses.replace(made("agrees"), frame=frame))
    assert page.count("<circle") == 800
    assert "800 of the 2,400 pairs that were checked are shown" in page


def test_what_a_verification_says_is_escaped(digits: Any, hostile: str, tmp_path: Path) -> None:
    found = dataclasses.replace(made("agrees"), sentence=hostile)
    page = written(tmp_path, digits, verification=found)
    assert "<script>window.pwned" not in page
    assert "<img" not in page

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from refluence.errors import DataError
from refluence.report import Presentation, write_report
from refluence.report.content import build_content
from refluence.report.page import MAX_BYTES, fit, render, script_json


class Page(HTMLParser):
    """The tags, ids and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.csv = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "csv":
            self.csv = json.loads(data)
        elif not self._inside:
            self.words += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k.rstrip("_")) == v for k, v in attributes.items()) for t, a in self.tags)


def written(path: Path, f: Any, **options: object) -> Page:
    file = write_report(path / "report.html", f.influence, f.scores, f.train, f.test, **options)  # type: ignore[arg-type]
    return Page(file.read_text(encoding="utf-8"))


def content_of(f: Any, presentation: Presentation | None = None, top: int = 3, suspicious: int = 10, **options: object):
    return build_content(
        f.influence,
        f.scores,
        f.train,
        f.test,
        presentation=presentation or Presentation(),
        top=top,
        title="Title",
        suspicious=suspicious,
        notes=(),
        **options,
    )


def test_the_page_shows_what_the_scores_say(digits: Any) -> None:
    content = content_of(digits)
    top, bottom = digits.scores.top(3), digits.scores.bottom(3)
    assert [card.row for card in content.cards] == digits.scores.test_ids.tolist()
    for card in content.cards:
        for side, frame in ((card.helpful, top), (card.harmful, bottom)):
            expected = frame[frame["test"] == card.row]
            assert [n.row for n in side] == expected["train"].tolist()
            assert [n.change for n in side] == pytest.approx(expected["predicted_loo_change"].tolist())
            assert all(n.half_width is None and not n.vanishing for n in side)
    logits = digits.influence.task.model(digits.test[0])
    assert [card.verdict.prediction for card in content.cards] == [
        str(int(logits[c.row].argmax())) for c in content.cards
    ]
    values = digits.influence.self_influence()
    assert [s.row for s in content.suspects] == values.argsort(descending=True)[:10].tolist()
    assert [s.verdict.label for s in content.suspects] == [str(int(digits.train[1][s.row])) for s in content.suspects]


def test_labels_that_are_not_the_prediction_are_marked(digits: Any) -> None:
    for card in content_of(digits).cards:
        for n in (*card.helpful, *card.harmful):
            assert n.differs == (str(int(digits.train[1][n.row])) != card.verdict.prediction)


def test_intervals_and_what_they_cover(digits: Any) -> None:
    scores = dataclasses.replace(digits.scores, error=torch.full_like(digits.scores.values, 2.0))
    content = content_of(dataclasses.replace(digits, scores=scores))
    neighbours = [n for card in content.cards for n in (*card.helpful, *card.harmful)]
    assert [n.half_width for n in neighbours] == pytest.approx([1.959964 * 2.0 / 400] * len(neighbours))
    assert {n.vanishing for n in neighbours} == {True, False}
    assert all(n.vanishing == (abs(n.change) <= 1.959964 * 2.0 / 400) for n in neighbours)
    page = Page(render(content))
    assert page.words.count("indistinguishable from zero") == sum(n.vanishing for n in neighbours)
    assert "each score has a 95 % interval" in page.words


def test_one_file_that_needs_nothing_else(digits: Any, tmp_path: Path) -> None:
    page = written(tmp_path / "new" / "folder", digits, title="My title", notes=["a note"])
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["report.html"]
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object") or attributes.get("href") == "data:,"
        assert "src" not in attributes
        assert not (attributes.get("href") or "#").startswith(("http", "//"))
        assert not any(name.startswith("on") for name in attributes)
    text = (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8")
    assert "url(http" not in text
    assert "@import" not in text
    assert all(word in page.words for word in ("My title", "a note", "all 650", "Gram", "Helpful", "Harmful"))


def test_a_picture_is_embedded_once(digits: Any) -> None:
    text = render(content_of(digits, top=8))
    uris = re.findall(r"data:image/png;base64,[^\"]+", text)
    shown = re.findall(r'class="pic [^"]* (p\d+)"', text)
    assert len(uris) == len(set(uris)) == len(set(shown)) < len(shown)


def test_ids_are_unique(digits: Any) -> None:
    ids = [a["id"] for _, a in Page(render(content_of(digits))).tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_everything_from_the_data_is_escaped(bag: Any, hostile: str, tmp_path: Path) -> None:
    f = dataclasses.replace(bag, scores=dataclasses.replace(bag.scores, manifest={hostile: [hostile]}))
    presentation = Presentation(text=lambda s: hostile, class_names=[hostile, "=cmd()" + hostile])
    page = written(tmp_path, f, presentation=presentation, title=hostile, notes=[hostile])
    assert page.count("script") == 2
    assert page.count("style") == 1
    assert page.count("img") == 0
    assert "{{7*7}}" in page.words
    rows = list(csv.reader(io.StringIO(page.csv, newline="")))
    assert {row[2] for row in rows[1:]} <= {hostile[:59].rstrip() + "…", "'" + ("=cmd()" + hostile)[:59].rstrip() + "…"}


def test_hostile_names_of_features_and_parameters(make: Any, hostile: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("<script>window", nn.Linear(3, 2))
    train = (torch.randn(20, 3), torch.randint(0, 2, (20,)))
    page = written(tmp_path, make(model, train, train, [1]), presentation=Presentation(feature_names=[hostile] * 3))
    assert page.count("script") == 2
    assert "<script>window.weight" in page.words


def test_json_in_a_script_cannot_end_it() -> None:
    text = "</script><!--&\u2028\u2029'\""
    encoded = script_json(text)
    assert not set("<>&\u2028\u2029") & set(encoded)
    assert json.loads(encoded) == text


def test_the_csv_holds_all_suspicious_rows(digits: Any, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(written(tmp_path, digits, suspicious=30).csv, newline="")))
    values = digits.influence.self_influence()
    assert [int(row["train_row"]) for row in rows] == values.argsort(descending=True)[:30].tolist()
    assert [float(row["self_influence"]) for row in rows] == pytest.approx(
        values.sort(descending=True)[0][:30].tolist()
    )


def test_regression(make: Any, tmp_path: Path) -> None:
    data = load_diabetes()
    x, y = torch.tensor(data.data * 20), torch.tensor(data.target / 100)
    model = nn.Linear(10, 1).double()
    presentation = Presentation(feature_names=data.feature_names)
    page = written(
        tmp_path, make(model, (x[:200], y[:200]), (x[200:], y[200:]), [0, 3], "mse"), presentation=presentation
    )
    assert page.count("button", data_filter="wrong") == 0
    assert all(word in page.words for word in ("Target", "Prediction", "bmi", "Unusual examples"))
    assert "Misclassified" not in page.words
    assert page.count("select", id="class") == 0


def test_texts_in_dict_batches(bag: Any, tmp_path: Path) -> None:
    page = written(tmp_path, bag, presentation=Presentation(text=lambda s: "tokens " + str(s["input_ids"].tolist())))
    assert page.count("blockquote", tabindex="0") == 3
    assert page.count("li") > 6
    assert "tokens [" in page.words


def test_a_loss_without_a_label(make: Any, tmp_path: Path) -> None:
    model = nn.Linear(5, 3)
    train = (torch.randn(25, 5),)
    f = make(model, train, train, [0, 1], lambda output, batch: output.square().mean(dim=1))
    page = written(tmp_path, f)
    assert page.count("article") == 2
    assert "Prediction" not in page.words.split("Self-influence says")[0].split("Explained predictions")[1].replace(
        "Predictions", ""
    )


def test_sequences(make: Any, tmp_path: Path) -> None:
    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(tokens))

    tokens = torch.randint(0, 8, (20, 6), generator=torch.Generator().manual_seed(0))
    data = (tokens[:, :-1], tokens[:, 1:])
    page = written(tmp_path, make(Next(), data, data, [4]))
    assert "of 5 targets right" in page.words


def test_other_measurements_are_named(make: Any, digits: Any) -> None:
    for measurement, words in (("margin", "negative margin would rise"), (_own, "measurement would rise")):
        f = make(digits.influence.task.model, digits.train, digits.test, [0], measurement=measurement)
        page = Page(render(content_of(f)))
        assert words in page.words
    assert "the task's own “_own”" in page.words


def _own(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return output.square().sum(dim=1)


def test_what_is_not_attributed_is_said(make: Any, digits: Any) -> None:
    f = make(digits.influence.task.model, digits.train, digits.test, [0], parameters="weight")
    words = Page(render(content_of(f))).words
    assert "640 of 650" in words
    assert "Caution:" in words


def test_a_page_that_is_too_large_is_cut_and_says_so(digits: Any) -> None:
    content = content_of(digits, top=8)
    whole = render(content)
    limit = len(whole) * 3 // 4
    page = fit(content, limit)
    assert len(page.encode()) <= limit
    shown = Page(page).count("article")
    assert 1 <= shown < len(content.cards)
    assert f"{shown} of the {len(content.cards)} explained test examples are shown" in Page(page).words
    assert Page(whole).count("article") == len(content.cards)


def test_even_the_largest_requests_stay_below_the_limit(digits: Any, hostile: str, tmp_path: Path) -> None:
    wide = Presentation(kind="text", text=lambda s: hostile * 400, class_names=[hostile] * 10)
    page = written(
        tmp_path, digits, presentation=wide, top=999, suspicious=9999, title=hostile * 99, notes=["<" * 9999] * 99
    )
    assert (tmp_path / "report.html").stat().st_size <= MAX_BYTES < 10_000_000
    assert "999 helpful and harmful examples were asked for; 50 of each are shown." in page.words


def test_a_limit_that_nothing_can_keep_is_an_error(digits: Any) -> None:
    with pytest.raises(DataError, match="cannot hold even the facts"):
        fit(content_of(digits), 1000)


def test_an_old_report_survives_a_failure(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, digits)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_scores_by_group_or_of_other_data_are_refused(digits: Any, tmp_path: Path) -> None:
    grouped = digits.influence.score((digits.test[0][:4], digits.test[1][:4]), groups="class")
    with pytest.raises(DataError, match="without `groups`"):
        written(tmp_path, dataclasses.replace(digits, scores=grouped))
    with pytest.raises(DataError, match="not rows of the test data"):
        written(tmp_path, dataclasses.replace(digits, test=(digits.test[0][:3], digits.test[1][:3])))
    with pytest.raises(DataError, match="top must be at least 1"):
        written(tmp_path, digits, top=0)


def test_normalised_scores_are_not_called_changes(digits: Any, tmp_path: Path) -> None:
    four = (digits.test[0][:4], digits.test[1][:4])
    scores = digits.influence.score(four, normalize="l-relatif")
    page = written(tmp_path, dataclasses.replace(digits, scores=scores, test=four))
    assert "normalised (l-relatif)" in page.words


def test_no_suspicious_examples(digits: Any, tmp_path: Path) -> None:
    assert written(tmp_path, digits, suspicious=0).count("article") == len(digits.scores.test_ids)

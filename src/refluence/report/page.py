"""The page: content to one self-contained HTML file below a size limit, written atomically."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from refluence.errors import DataError
from refluence.files import write_text
from refluence.influence import Influence
from refluence.report import formatting
from refluence.report.content import Content, build_content
from refluence.report.csv_export import csv_text
from refluence.report.pictures import Picture
from refluence.report.presentation import Presentation, View
from refluence.scores import Scores

if TYPE_CHECKING:
    from refluence.evaluation.verification import Verification

MAX_BYTES = 9_900_000
_JSON_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_report(
    path: str | os.PathLike[str],
    influence: Influence,
    scores: Scores,
    train: Any,
    test: Any,
    *,
    presentation: Presentation | None = None,
    top: int = 8,
    title: str = "Which training examples made the model do that?",
    suspicious: int = 50,
    notes: Sequence[str] = (),
    verification: Verification | None = None,
) -> Path:
    """Write the report as one HTML file that needs no network and is smaller than 10 MB.

    Args:
        path: the file; its folder is made. It is replaced at once, never left half written.
        influence: a fitted `Influence`.
        scores: what `influence.score(test)` gave.
        train, test: the data that the influence was fitted to and that the scores are for.
        presentation: how rows of the data are shown; default: told from the data.
        top: helpful and harmful examples for each explained test example, at most 50.
        title: the page's heading.
        suspicious: how many of the highest self-influence are listed, at most 1,000.
        notes: sentences of your own, shown below the facts.
        verification: what `rf.evaluation.verify` found; the banner says so where nothing was verified.

    Returns:
        The path of the file. What had to be left out for its size is said on the page.

    Raises:
        DataError: `top` or `suspicious` out of range, scores of other data, or data that cannot be shown as asked.
    """
    content = build_content(
        influence,
        scores,
        train,
        test,
        presentation=presentation or Presentation(),
        top=top,
        title=title,
        suspicious=suspicious,
        notes=notes,
        verification=verification,
    )
    path = Path(path)
    write_text(path, fit(content, MAX_BYTES))
    return path


def fit(content: Content, limit: int) -> str:
    """The page in at most `limit` bytes: cards are left out from the end, then suspicious examples.

    Raises:
        DataError: a limit that not even an empty page keeps.
    """
    while True:
        page = render(content)
        size = len(page.encode())
        if size <= limit:
            return page
        keep = max(limit / size, 0.02) * 0.95
        if len(content.cards) > 1:
            content = replace(content, cards=content.cards[: max(int(keep * len(content.cards)), 1)])
        elif content.suspects:
            content = replace(content, suspects=content.suspects[: int(keep * len(content.suspects))])
        elif content.cards:
            content = replace(content, cards=())
        else:
            raise DataError(f"a report of {limit:,} bytes cannot hold even the facts: give a larger limit")


def render(content: Content) -> str:
    """The page of this content, whatever its size."""
    pictures = _numbered(content)
    script = asset("report.js")
    page = environment().get_template("report.html.j2")
    return page.render(
        content=content,
        omissions=[*content.omissions, *_left_out(content)],
        pictures=list(pictures.values()),
        picture_class=lambda picture: pictures[picture.uri].name,
        style=Markup(asset("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        csv_json=Markup(script_json(_suspects_csv(content))),
    )


def script_json(text: str) -> str:
    """A text as JSON that cannot end or open anything where it stands in a `<script>`."""
    encoded = json.dumps(text)
    for character, escape in _JSON_ESCAPES.items():
        encoded = encoded.replace(character, escape)
    return encoded


@dataclass(frozen=True)
class _NumberedPicture:
    """A picture with the CSS class that shows it; each is embedded once however often it is shown."""

    name: str
    uri: Markup


def _numbered(content: Content) -> dict[str, _NumberedPicture]:
    numbered: dict[str, _NumberedPicture] = {}
    for picture in _pictures(content):
        if picture.uri not in numbered:
            # base64 of our own encoder: nothing of the data reaches the style sheet as text
            numbered[picture.uri] = _NumberedPicture(f"p{len(numbered)}", Markup(picture.uri))
    return numbered


def _pictures(content: Content) -> Iterator[Picture]:
    def shown() -> Iterator[View]:
        for card in content.cards:
            yield card.view
            yield from (neighbour.view for _, side in card.sides for neighbour in side)
        yield from (suspect.view for suspect in content.suspects)
        if content.checked is not None:
            yield from (removal.view for removal in content.checked.removals)

    yield from (view.picture for view in shown() if view.picture is not None)


def _left_out(content: Content) -> Iterator[str]:
    if len(content.cards) < content.explained:
        yield (
            f"{len(content.cards):,} of the {content.explained:,} explained test examples are shown, the first ones: "
            "the page is kept small, below 10 MB. Score a selection of test rows to see others."
        )
    if len(content.suspects) < content.suspects_asked:
        yield f"{len(content.suspects):,} of {content.suspects_asked:,} suspicious examples are listed."
    if content.checked is not None and len(content.checked.pairs) < content.checked.count:
        yield (
            f"{len(content.checked.pairs):,} of the {content.checked.count:,} pairs that were checked are shown, "
            "evenly chosen; the statistics are of all."
        )
    if content.checked is not None and len(content.checked.removals) < content.checked.removed:
        yield f"{len(content.checked.removals):,} of the {content.checked.removed:,} removed examples are listed."
    if len(content.coverage) < content.coverage_count:
        yield f"{len(content.coverage):,} of {content.coverage_count:,} parameters are in the table of coverage."


def _suspects_csv(content: Content) -> str:
    return csv_text(
        ["rank", "train_row", "label", "prediction", "differs", "loss", "self_influence"],
        (
            (
                suspect.rank,
                suspect.row,
                suspect.verdict.label,
                suspect.verdict.prediction,
                "" if suspect.verdict.correct is None else ("no" if suspect.verdict.correct else "yes"),
                suspect.verdict.loss,
                suspect.self_influence,
            )
            for suspect in content.suspects
        ),
    )


@cache
def environment() -> Environment:
    """The templates, with everything escaped that is not Markup."""
    made = Environment(
        loader=PackageLoader("refluence.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": formatting.number,
        "signed": formatting.signed,
        "percent": formatting.percent,
        "shorten": formatting.shorten,
    }
    return made


@cache
def asset(name: str) -> str:
    """A style sheet or script of the pages."""
    return (resources.files("refluence.report") / "templates" / name).read_text(encoding="utf-8")

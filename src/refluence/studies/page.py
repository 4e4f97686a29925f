"""A study's page: figures, findings and a table in one HTML file that needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

DPI = 130


@dataclass(frozen=True)
class Fact:
    """A number of the page's head, with what it means."""

    name: str
    value: str
    reading: str


@dataclass(frozen=True)
class Picture:
    """A figure, what it shows to those who do not see it, and the line below it."""

    figure: Figure
    alternative: str
    caption: str


@dataclass(frozen=True)
class StudyPage:
    """The content of the page.

    Args:
        findings: (title, paragraph) each.
        table: its index names the rows; numbers are shown as they are given, as text.
        findings_title: above the findings.
        row_name: above the names of the rows.
        kind: what the page is of.
    """

    title: str
    lead: str
    facts: Sequence[Fact]
    pictures: Sequence[Picture]
    findings: Sequence[tuple[str, str]]
    table: pd.DataFrame
    table_caption: str
    source: str
    findings_title: str = "What each method got"
    row_name: str = "Method"
    kind: str = "study"


def render(page: StudyPage) -> str:
    """The page as HTML."""
    shown = [(_data_uri(picture.figure), picture) for picture in page.pictures]
    return _environment().get_template("study.html.j2").render(page=page, pictures=shown, style=Markup(_style()))


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _data_uri(figure: Figure) -> Markup:
    # base64 of our own encoder: nothing of the data reaches the page as text
    return Markup("data:image/png;base64," + base64.b64encode(png(figure)).decode())


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("refluence.studies"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _style() -> str:
    report = (resources.files("refluence.report") / "templates" / "report.css").read_text(encoding="utf-8")
    return report + (resources.files("refluence.studies") / "templates" / "study.css").read_text(encoding="utf-8")

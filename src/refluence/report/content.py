"""What the page shows, built from an influence and its scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from refluence.batches import Batches
from refluence.errors import DataError
from refluence.influence import Influence
from refluence.report.concentration import Concentration, concentration
from refluence.report.facts import CoverageRow, Fact, Measured, coverage_rows, facts, measured
from refluence.report.formatting import shorten
from refluence.report.predictions import Example, Verdict, examine
from refluence.report.presentation import Kind, Presentation, View, column_names, views
from refluence.report.trust import Trust, trust
from refluence.report.uncertainty import chances_of, error_facts, error_sentence
from refluence.report.verification import Checked, checked, removed_rows
from refluence.scores import Scores

if TYPE_CHECKING:
    from refluence.evaluation.verification import Verification

Z95 = 1.959963984540054
MAX_CARDS = 500
MAX_TOP = 50
MAX_SUSPICIOUS = 1000
MAX_NOTES = 20
MAX_NOTE = 1000
MAX_DETAILS = 12_000
CURVE_POINTS = 160


@dataclass(frozen=True)
class Neighbour:
    """A training example that helped or harmed: `change` of the measurement if it were removed, and its interval.

    `chance` is the probability that it is among the strongest of its side, as many as the page shows.
    """

    row: int
    view: View
    verdict: Verdict
    differs: bool
    change: float
    half_width: float | None
    chance: float | None
    strength: float

    @property
    def vanishing(self) -> bool:
        """True where the interval covers zero."""
        return self.half_width is not None and abs(self.change) <= self.half_width


@dataclass(frozen=True)
class Card:
    """One explained test example."""

    row: int
    view: View
    verdict: Verdict
    helpful: tuple[Neighbour, ...]
    harmful: tuple[Neighbour, ...]
    concentration: Concentration

    @property
    def sides(self) -> tuple[tuple[str, tuple[Neighbour, ...]], ...]:
        """Both lists with their names, as the page shows them."""
        return (("helpful", self.helpful), ("harmful", self.harmful))


@dataclass(frozen=True)
class Suspect:
    """A training example with a high self-influence."""

    rank: int
    row: int
    view: View
    verdict: Verdict
    self_influence: float
    strength: float


@dataclass(frozen=True)
class Content:
    """All that the page shows."""

    title: str
    kind: Kind
    measured: Measured
    trust: Trust
    facts: tuple[Fact, ...]
    cards: tuple[Card, ...]
    explained: int
    suspects: tuple[Suspect, ...]
    suspects_asked: int
    self_influence_curve: tuple[tuple[float, float], ...]
    checked: Checked | None
    n_train: int
    places: int
    error_sentence: str
    columns: tuple[str, ...]
    column_count: int
    coverage: tuple[CoverageRow, ...]
    coverage_count: int
    coverage_summary: str
    plan: str
    manifest: str
    notes: tuple[str, ...]
    omissions: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        """True where predictions are right or wrong."""
        return any(card.verdict.correct is not None for card in self.cards)

    @property
    def has_wrong(self) -> bool:
        """True where a prediction on a shown test example is wrong."""
        return any(card.verdict.correct is False for card in self.cards)

    @property
    def suspects_judged(self) -> bool:
        """True where the suspicious examples have labels that predictions can differ from."""
        return any(suspect.verdict.correct is not None for suspect in self.suspects)

    @property
    def disagreements(self) -> int:
        """How many suspicious examples have a label that the model does not predict."""
        return sum(suspect.verdict.correct is False for suspect in self.suspects)

    @property
    def suspect_classes(self) -> tuple[str, ...]:
        """The labels of the suspicious examples, for the filter."""
        return tuple(sorted({s.verdict.label for s in self.suspects if s.verdict.correct is not None}, key=_natural))


def build_content(
    influence: Influence,
    scores: Scores,
    train: Any,
    test: Any,
    *,
    presentation: Presentation,
    top: int,
    title: str,
    suspicious: int,
    notes: Sequence[str],
    verification: Verification | None = None,
) -> Content:
    """The content of the page.

    Raises:
        DataError: `top` below 1, `suspicious` below 0, or scores that are not of this training and test data.
    """
    if top < 1 or suspicious < 0:
        raise DataError(f"top must be at least 1 and suspicious at least 0; they are {top} and {suspicious}")
    if scores.values.shape[1] != influence.n_train:
        raise DataError(
            f"the scores have {scores.values.shape[1]} columns for {influence.n_train} training examples: a report "
            "needs a score for each training example, so score without `groups`"
        )
    task, omissions = influence.task, []
    if scores.manifest.get("normalize"):
        omissions.append(
            f"The scores are normalised ({scores.manifest['normalize']}): they rank the examples, but are not changes "
            f"of the {measured(task).noun}."
        )
    if top > MAX_TOP:
        omissions.append(f"{top} helpful and harmful examples were asked for; {MAX_TOP} of each are shown.")
        top = MAX_TOP
    if suspicious > MAX_SUSPICIOUS:
        omissions.append(f"{suspicious:,} suspicious examples were asked for; {MAX_SUSPICIOUS:,} are shown.")
    values = scores.values[:MAX_CARDS].detach().double().cpu().numpy()
    errors = None if scores.error is None else scores.error[:MAX_CARDS].detach().double().cpu().numpy()
    changes = scores.predicted_loo_change[:MAX_CARDS].detach().double().cpu().numpy()
    places = min(top, values.shape[1])
    chances = chances_of(values, errors, places)
    train_rows = _rows(scores.train_ids, Batches(train, name="train").n, "train")
    test_rows = _rows(scores.test_ids, Batches(test, name="test").n, "test")[:MAX_CARDS]
    strongest = [_strongest(row, top) for row in values]
    self_influence = influence.self_influence().detach().double().cpu().numpy()
    skipped = influence.skipped
    ordered = [row for row in np.argsort(-self_influence, kind="stable").tolist() if row not in skipped]
    ranking = ordered[: min(suspicious, MAX_SUSPICIOUS)]

    removed = {row for rows in removed_rows(verification) for row in rows[:1]}
    shown_train = {int(train_rows[j]) for sides in strongest for side in sides for j in side} | set(ranking) | removed
    train_examples = examine(task, train, shown_train, presentation, "train")
    test_examples = examine(task, test, test_rows.tolist(), presentation, "test")
    everything = [*train_examples.values(), *test_examples.values()]
    all_views = views([example.sample for example in everything], presentation)
    train_views = dict(zip(train_examples, all_views, strict=False))
    test_views = dict(zip(test_examples, all_views[len(train_examples) :], strict=True))
    columns, column_count = column_names([example.sample for example in everything], presentation)

    def neighbours(i: int, side: int, verdict: Verdict) -> tuple[Neighbour, ...]:
        largest = float(np.abs(values[i]).max()) or 1.0
        return tuple(
            Neighbour(
                row=(row := int(train_rows[j])),
                view=train_views[row],
                verdict=train_examples[row].verdict,
                differs=_differs(train_examples[row].verdict, verdict),
                change=float(changes[i, j]),
                half_width=None if errors is None else Z95 * float(errors[i, j]) / int(scores.n_train),
                chance=None if chances is None else float(chances[side][i, j]),
                strength=abs(float(values[i, j])) / largest,
            )
            for j in strongest[i][side]
        )

    cards = []
    for i, row in enumerate(test_rows.tolist()):
        verdict = test_examples[row].verdict
        helpful, harmful = (neighbours(i, side, verdict) for side in (0, 1))
        cards.append(Card(row, test_views[row], verdict, helpful, harmful, concentration(values[i], top)))
    coverage, coverage_count = coverage_rows(influence)
    return Content(
        title=shorten(str(title), 200),
        kind=all_views[0].kind,
        measured=measured(task),
        trust=trust(influence, verification),
        facts=(*facts(influence, scores), *error_facts(influence, scores)),
        cards=tuple(cards),
        explained=len(scores.test_ids),
        suspects=_suspects(ranking, self_influence, train_examples, train_views),
        suspects_asked=min(suspicious, len(ordered)),
        self_influence_curve=_curve(self_influence),
        checked=None if verification is None else checked(verification, train_examples, train_views),
        n_train=len(self_influence),
        places=places,
        error_sentence=error_sentence(influence, scores),
        columns=columns if all_views[0].kind == "table" else (),
        column_count=column_count,
        coverage=coverage,
        coverage_count=coverage_count,
        coverage_summary=shorten(str(influence.coverage.summary), 500),
        plan=shorten(str(influence.plan.summary()), MAX_DETAILS),
        manifest=shorten(json.dumps(scores.manifest, indent=2, default=str, ensure_ascii=False), MAX_DETAILS),
        notes=tuple(shorten(str(note), MAX_NOTE) for note in list(notes)[:MAX_NOTES]),
        omissions=tuple(omissions),
    )


def _rows(ids: Any, n: int, name: str) -> NDArray[np.int64]:
    """The rows of the data that the ids name."""
    rows = np.asarray(ids)
    if rows.size and np.issubdtype(rows.dtype, np.integer) and rows.min() >= 0 and rows.max() < n:
        return rows.astype(np.int64)
    if rows.size == n:
        return np.arange(n)
    raise DataError(
        f"the scores are for {rows.size} {name} examples whose ids are not rows of the {name} data given ({n} rows): "
        f"give the {name} data that the scores were computed on"
    )


def _strongest(scores: NDArray[np.float64], top: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The `top` most helpful and most harmful columns; only scores of the right sign count."""
    order = np.argsort(-scores, kind="stable")
    helpful, harmful = order[:top], order[::-1][:top]
    return helpful[scores[helpful] > 0], harmful[scores[harmful] < 0]


def _differs(train: Verdict, test: Verdict) -> bool:
    return test.correct is not None and train.correct is not None and train.label != test.prediction


def _suspects(
    ranking: Iterable[int], values: NDArray[np.float64], examples: dict[int, Example], shown: dict[int, View]
) -> tuple[Suspect, ...]:
    largest = float(np.max(values, initial=0.0)) or 1.0
    return tuple(
        Suspect(
            rank, row, shown[row], examples[row].verdict, float(values[row]), max(float(values[row]), 0.0) / largest
        )
        for rank, row in enumerate(ranking, start=1)
    )


def _curve(values: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Sorted self-influence as points (share of the examples, share of the largest value)."""
    ordered = np.sort(values)[::-1]
    ranks = np.unique(np.round((len(ordered) - 1) * np.linspace(0, 1, CURVE_POINTS) ** 2).astype(int))
    largest = float(ordered[0]) or 1.0
    return tuple((float(rank / max(len(ordered) - 1, 1)), float(ordered[rank] / largest)) for rank in ranks)


def _natural(text: str) -> tuple[int, float, str]:
    return (0, float(text), "") if text.isdecimal() and text.isascii() else (1, 0.0, text)

"""The banner: what is known of how far the scores can be trusted. It certifies what was measured, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from refluence.influence import Influence
from refluence.report.facts import Fact, Tone, grounds
from refluence.report.formatting import count, shorten, statistic

if TYPE_CHECKING:
    from refluence.evaluation.verification import Verification

Level = Literal["good", "mixed", "bad"]

HEADLINES: dict[str, tuple[Level, str]] = {
    "agrees": ("good", "Checked: the predictions agree with reality"),
    "partly": ("mixed", "Checked: the predictions agree with reality in part"),
    "disagrees": ("bad", "Checked: the predictions disagree with reality"),
    "not converged": ("mixed", "Checked, but the refits did not converge"),
}
SHRUNK = 0.7
"""A slope below which predictions are too small."""
UNVERIFIED = "Not verified"
HOW_TO_VERIFY = (
    "No training example was really removed, so nothing here says how far the predictions hold. Run with --verify 8 "
    "(in Python: rf.evaluation.verify, given to write_report) to remove eight, refit, and compare."
)


@dataclass(frozen=True)
class Trust:
    """What the banner says: a level that `word` names too, a headline, sentences, and the checks behind them."""

    level: Level
    headline: str
    sentences: tuple[str, ...]
    checks: tuple[Fact, ...]

    @property
    def word(self) -> str:
        """The level in a word, for those who do not see its colour."""
        return {"good": "Green", "mixed": "Amber", "bad": "Red"}[self.level]

    @property
    def sign(self) -> str:
        """The level as a sign."""
        return {"good": "✓", "mixed": "!", "bad": "✗"}[self.level]


def trust(influence: Influence, verification: Verification | None) -> Trust:
    """The banner of a fit, and of the checks where there were any.

    Green needs examples that were really removed and agree with the prediction, and no caution beside it.
    """
    beside = grounds(influence)
    cautions = [fact for fact in beside if fact.tone == "caution"]
    warned = f"Beside it: {'; '.join(_caution(fact) for fact in cautions)}." if cautions else ""
    if verification is None:
        unknown = Fact("Against reality", "not verified", "no example was really removed", "caution")
        return Trust("mixed", UNVERIFIED, (HOW_TO_VERIFY, *_some(warned)), (unknown, *beside))
    level, headline = HEADLINES[verification.verdict]
    if level == "good" and cautions:
        level, headline = "mixed", f"{headline}, with {count(len(cautions), 'caution')}"
    sentences = (shorten(str(verification.sentence), 600), *_some(_hint(influence, verification)), *_some(warned))
    return Trust(level, headline, sentences, (*_measured(verification), *beside))


def _hint(influence: Influence, verification: Verification) -> str:
    """What may help where the predictions are too small."""
    damped = max(influence.shifts.values()) > influence.task.l2
    if verification.verdict != "partly" or not damped or not verification.slope < SHRUNK:
        return ""
    return "Damping makes predictions smaller; a smaller λ may agree better."


def _measured(verification: Verification) -> tuple[Fact, ...]:
    removed = verification.frame["removed"].map(str).nunique()
    tests = verification.frame["test"].nunique()
    by = f"{count(removed, 'example')} really removed, {count(tests, 'test row')}"
    tone: Tone = "good" if verification.verdict == "agrees" else "plain"
    return (
        Fact("Slope", statistic(verification.slope), f"predicted over measured, at best 1: {by}", tone),
        Fact(
            "Spearman", statistic(verification.spearman), "rank correlation of predicted and measured, at best 1", tone
        ),
    )


def _caution(fact: Fact) -> str:
    return f"{fact.name[0].lower()}{fact.name[1:]} {fact.value} ({fact.reading})"


def _some(text: str) -> tuple[str, ...]:
    return (text,) if text else ()

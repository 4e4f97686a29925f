"""What the error bars of the page are, in plain words: how far an approximation may be off, and nothing more."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from refluence.influence import Influence
from refluence.report.facts import Fact, Tone
from refluence.report.formatting import number, percent
from refluence.scores import Scores
from refluence.solvers import Sketched
from refluence.top_probability import probability_in_top

LARGE = 0.5
"""A share of the scores' own size above which their errors are a caution."""
NO_CAUSE = "They say nothing of whether removing an example does what its score predicts."
EACH = "Each pair has an interval of its own: about 5 of 100 miss."
PLACES = (
    "“Top k” is the chance that the example really is among the k strongest, as if the errors of different examples "
    "were independent."
)


def error_facts(influence: Influence, scores: Scores) -> tuple[Fact, ...]:
    """How large the errors are, where there are any."""
    if scores.error is None:
        return ()
    size, error = float(scores.values.double().norm()), float(scores.error.double().norm())
    share = error / size if size > 0 else float("inf")
    zero = float(scores.indistinguishable().double().mean())
    reading = (
        f"root mean square, {_source(influence)}; {percent(zero)} of all intervals hold zero"
        f"{_target(influence, scores)}"
    )
    return (Fact("Error of the scores", f"{percent(share)} of their size", reading, _tone(share)),)


def error_sentence(influence: Influence, scores: Scores) -> str:
    """What the intervals and chances on the page mean."""
    if scores.error is None:
        return "No ± is shown where the scores carry no approximation error."
    about = "the exact score of this curvature and damping"
    if scores.target_damping != influence.damping:
        about = "the exact score of this curvature at the damping that the scores estimate"
    return f"The ± are 95 % intervals about {about}: the error {_source(influence)} alone. {NO_CAUSE} {EACH} {PLACES}"


def _source(influence: Influence) -> str:
    if not isinstance(influence.plan.chosen.solver, Sketched):
        return "of the sampled labels" if influence.curvature == "mc_fisher" else "of the approximation"
    also = ", without that of the sampled labels" if influence.curvature == "mc_fisher" else ""
    return f"of the random projection{also}"


def _target(influence: Influence, scores: Scores) -> str:
    """A projection that is not corrected has more damping than was asked for."""
    if scores.target_damping == influence.damping or not isinstance(scores.target_damping, float):
        return ""
    return f"; the projection adds damping, so that the scores estimate those at λ = {number(scores.target_damping)}"


def _tone(share: float) -> Tone:
    return "caution" if share > LARGE else "plain"


def chances_of(
    values: NDArray[np.float64], errors: NDArray[np.float64] | None, places: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The chances of being among the `places` most helpful, and among the most harmful; None without errors."""
    if errors is None:
        return None
    spread = torch.from_numpy(errors)
    helpful, harmful = (probability_in_top(torch.from_numpy(x), spread, places).numpy() for x in (values, -values))
    return helpful, harmful

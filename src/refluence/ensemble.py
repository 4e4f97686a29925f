"""Ensembles: scores over several trained models or checkpoints, with the spread over models in their error bars."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from refluence.averaging import Errors, Spread, standard_error
from refluence.batches import Data
from refluence.columns import checked_weights, hash_numbers
from refluence.damping import DampingChoice
from refluence.errors import DataError, NotFittedError, RefluenceError
from refluence.influence import Influence
from refluence.progress import track
from refluence.scores import Scores
from refluence.solvers import Sketched
from refluence.task import Task, binary_logit, classification_margin

State = Mapping[str, Tensor]
Model = nn.Module | State
Member = Influence | Callable[[], Influence]

FORMS = ("mean", "tracin", "trak")
MARGINS = {"cross_entropy": classification_margin, "binary_cross_entropy": binary_logit}
OWN = ("damping", "damping_choice", "effective_dimension", "model_fingerprint", "seed", "solver")
"""What the members of an ensemble may differ in, and the manifest gives for each."""


class Ensemble:
    """Scores over c models of the same training data: the mean of their influence, or TracIn's or TRAK's form.

        "mean":    τ_ij = (1/c) Σ_c τ_c,ij
        "tracin":  τ_ij = Σ_c η_c τ_c,ij, the η_c step sizes: with solver Identity, Pruthi et al. 2020, eq. 3 (TracInCP)
        "trak":    τ_ij = (1/c Σ_c (1 − p_c,j)) · (1/c Σ_c n φ_c,iᵀ(Φ_cᵀΦ_c + nλ)⁻¹φ_c,j), φ the gradients of the margin
                   log p/(1 − p) in model c, λ with the task's l2: Park et al. 2023, eq. 13–17

    The error of a score is the standard error of the mean over models, in quadrature with the models' own errors over
    √c: what other models of the same training would give, where the models differ by their seeds. Checkpoints of one
    run are no sample, and their spread is how much the scores changed along the run.

    Args:
        members: influences of different models on the same training data, or functions that give one, which are called
            at each use, one after the other, so that one fit is in memory at a time.
        form: "mean", "tracin" or "trak".
        weights: η_c of "tracin", one for each member.

    Raises:
        RefluenceError: no members, an unknown form, weights with another form, or of another number.
    """

    def __init__(
        self, members: Sequence[Member], form: str = "mean", weights: Sequence[float] | Tensor | None = None
    ) -> None:
        self._members = list(members)
        if not self._members:
            raise RefluenceError("an ensemble needs at least one influence")
        for i, member in enumerate(self._members):
            if isinstance(member, nn.Module) or not (callable(member) or isinstance(member, Influence)):
                raise RefluenceError(
                    f"member {i} is {type(member).__name__}: give rf.Influence objects, or functions that return one"
                )
        if form not in FORMS:
            raise RefluenceError(f"form must be one of {FORMS}, not {form!r}")
        if (weights is not None) != (form == "tracin"):
            raise RefluenceError(
                'form "tracin" is a sum over checkpoints weighted by their step sizes: give `weights`'
                if weights is None
                else f'`weights` are the step sizes of form "tracin"; form {form!r} has none'
            )
        self.form = form
        self.weights = None if weights is None else checked_weights(weights, len(self._members), negative=True)
        self._train: tuple[Data, Any] | None = None
        self._damping: DampingChoice | None = None

    @classmethod
    def of(
        cls,
        task: Task,
        models: Iterable[Model | Callable[[], Model]],
        *,
        form: str = "mean",
        weights: Sequence[float] | Tensor | None = None,
        keep: bool = True,
        **influence: Any,
    ) -> Ensemble:
        """An ensemble of models of one architecture; call `fit` next.

        Member c has the seed `seed + c`, and so has the sketch of a `Sketched` solver, as TRAK's projections are
        independent. For form "trak" the loss and the measurement are the margin of the task's loss.

        Args:
            task: what is differentiated; its model is the architecture of the state dicts.
            models: modules, state dicts, or functions that give one when it is needed.
            form, weights: as for `Ensemble`.
            keep: False: each model is fitted again at each use and dropped after it.
            influence: arguments of `rf.Influence`.

        Raises:
            RefluenceError: form "trak" for a loss that has no margin.
        """
        if form == "trak":
            task = _margin_task(task)
            influence.setdefault("curvature", "fisher")
        members: list[Member] = []
        for c, model in enumerate(models):
            make = partial(_member, task, model, c, influence)
            members.append(make() if keep else make)
        return cls(members, form, weights)

    def fit(self, train: Data, *, weights: Sequence[float] | Tensor | None = None) -> Ensemble:
        """Fit every member on the training data, those that functions give when they are used; returns itself.

        Raises:
            As `Influence.fit`.
        """
        self._train = (train, weights)
        for member in track(self._members, "fitting models", enabled=self._progress):
            if isinstance(member, Influence):
                member.fit(train, weights=weights)
        return self

    @property
    def _progress(self) -> bool:
        return any(isinstance(member, Influence) and member.settings.progress for member in self._members)

    def __len__(self) -> int:
        """The number of models, c."""
        return len(self._members)

    @property
    def members(self) -> Iterator[Influence]:
        """The fitted influences one after the other, checked to belong together.

        Raises:
            DataError: members of different training data, loss, measurement or parameters, with the first difference.
            NotFittedError: a member that is not fitted.
        """
        first: dict[str, Any] | None = None
        for i, member in enumerate(self._members):
            influence = self._fitted(member)
            own = _belongs(influence)
            first = first or own
            for name, value in own.items():
                if value != first[name]:
                    raise DataError(
                        f"member {i} of the ensemble has {name} {value!r} and member 0 has {first[name]!r}: fit all "
                        "members on the same training data with the same task but for the model"
                    )
            if self.form == "trak" and influence.task.loss not in MARGINS.values():
                raise RefluenceError(
                    f'form "trak" needs the gradients of the margin, and the loss of member {i} is '
                    f'{own["loss"]!r}: make the members with rf.Ensemble.of(task, models, form="trak")'
                )
            yield influence

    def _fitted(self, member: Member) -> Influence:
        if isinstance(member, Influence):
            influence = member
        else:
            influence = member()
            if not isinstance(influence, Influence):
                raise RefluenceError(f"a member's function returned {type(influence).__name__}, not an rf.Influence")
            if influence._fit is None and self._train is not None:
                influence.fit(self._train[0], weights=self._train[1])
        if influence._fit is None:
            raise NotFittedError("a member of the ensemble is not fitted: call fit(train) first")
        return influence if self._damping is None else influence.at(self._damping)

    @property
    def n_train(self) -> int:
        """The number of training examples."""
        return next(self.members).n_train

    def at(self, damping: DampingChoice) -> Ensemble:
        """The same ensemble at another damping, for each member by its own spectrum where the choice is relative."""
        other = copy.copy(self)
        other._damping = damping
        return other

    def score(
        self,
        test: Data,
        *,
        weights: Sequence[float] | Tensor | None = None,
        groups: str | Iterable[Any] | None = None,
        normalize: str | None = None,
    ) -> Scores:
        """The ensemble's score of every test with every train example, and its error; arguments of `Influence.score`.

        Raises:
            DataError: as `Influence.score`, and for `groups` or `normalize` with form "trak", a product of two means.
        """
        if self.form == "trak" and (groups is not None or normalize is not None):
            raise DataError('form "trak" is a product of two means over models: it has no `groups` and no `normalize`')
        labels = groups if groups is None or isinstance(groups, str) else list(groups)
        spread, own_errors, records = Spread(), Errors(), []
        base: Scores | None = None
        targets: set[str] = set()
        members = track(self.members, "scoring models", total=len(self), enabled=self._progress)
        for c, influence in enumerate(members):
            scores = influence.score(test, weights=weights, groups=labels, normalize=normalize)
            eta = 1.0 if self.weights is None else float(self.weights[c])
            share = _wrongness(influence) if self.form == "trak" else None
            spread.add(eta * scores.values.double().cpu(), share)
            own_errors.add(None if scores.error is None else eta * scores.error.double().cpu())
            records.append({name: scores.manifest[name] for name in OWN})
            targets.add(repr(scores.target_damping))
            base = base or scores
        assert base is not None
        # A weighted sum is c times the mean of its terms.
        scale = len(self) if self.form == "tracin" else 1
        return Scores(
            scale * spread.value,
            base.n_train,
            base.train_ids,
            base.test_ids,
            error=standard_error(spread, own_errors, scale),
            target_damping=base.target_damping if len(targets) == 1 else None,
            manifest=self._manifest(base.manifest, records),
        )

    def self_influence(self) -> Float64[Tensor, " n"]:
        """The ensemble's score of every train example with itself."""
        spread = Spread()
        for c, influence in enumerate(self.members):
            eta = 1.0 if self.weights is None else float(self.weights[c])
            share = _wrongness(influence) if self.form == "trak" else None
            spread.add(eta * influence.self_influence().double()[None], share)
        return (len(self) if self.form == "tracin" else 1) * spread.value[0]

    def manifest(self) -> dict[str, Any]:
        """What a reader of the scores needs to know and to repeat them: JSON-able."""
        manifests = [influence.manifest() for influence in self.members]
        return self._manifest(manifests[0], [{name: one[name] for name in OWN} for one in manifests])

    def _manifest(self, base: Mapping[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **{name: value for name, value in base.items() if name not in OWN},
            "ensemble": {
                "form": self.form,
                "weights": None if self.weights is None else self.weights.tolist(),
                "members": records,
            },
        }

    def __repr__(self) -> str:
        return f"Ensemble({len(self)} models, form={self.form!r})"


def _belongs(influence: Influence) -> dict[str, Any]:
    """What all members must share."""
    manifest, weights = influence.manifest(), influence._fitted().curvature.weights
    task = manifest["task"]
    return {
        "n_train": manifest["n_train"],
        "training data": manifest["train_fingerprint"],
        **{name: task[name] for name in ("loss", "measurement", "parameters", "l2")},
        "fit weights": None if weights is None else hash_numbers(weights),
    }


def _wrongness(influence: Influence) -> Float64[Tensor, " n"]:
    """1 − p of the label of every train example, which is sigmoid of the negated margin: TRAK's Q."""
    fit = influence._fitted()
    found = []
    for _, batch in fit.capture.running(fit.rows.batches):
        with fit.capture.ready(), torch.no_grad():
            found.append(fit.capture.loss(fit.model, batch).double().sigmoid())
    return torch.cat(found).cpu()


def _margin_task(task: Task) -> Task:
    if task.loss not in MARGINS:
        raise RefluenceError(
            f'form "trak" explains the margin of a classifier, loss {sorted(MARGINS)}, not {task.describe()["loss"]!r}'
        )
    margin = MARGINS[str(task.loss)]
    return replace(task, loss=margin, measurement=margin)


def _member(task: Task, model: Model | Callable[[], Model], c: int, arguments: Mapping[str, Any]) -> Influence:
    """An unfitted influence of one model."""
    if not isinstance(model, nn.Module) and callable(model):
        model = model()
    if not isinstance(model, nn.Module):
        state, model = model, copy.deepcopy(task.model)
        model.load_state_dict(state)
    settings = {**arguments, "seed": arguments.get("seed", 0) + c}
    if (execution := settings.get("execution")) is not None:
        settings["execution"] = execution.below(f"model-{c}")
    if isinstance(solver := settings.get("solver"), Sketched):
        settings["solver"] = replace(solver, sketch=solver.sketch.reseeded(solver.sketch.seed + c))
    return Influence(replace(task, model=model), **settings)

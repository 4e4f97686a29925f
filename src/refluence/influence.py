"""Influence: fit on the training data once, then score test data, as often and at as many dampings as wanted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from refluence import fitting
from refluence._version import __version__
from refluence.accuracy import Accuracy
from refluence.batches import Batches, Data
from refluence.columns import check_normalisation, hash_numbers
from refluence.damping import DampingChoice, check_damping, choice_record, common, resolve
from refluence.errors import NotFittedError, RefluenceError
from refluence.execution import Execution
from refluence.fitting import Fit
from refluence.gradients.coverage import Coverage
from refluence.gradients.groups import Blocks, parameter_groups
from refluence.gradients.mixed import differentiable_input
from refluence.gradients.norms import gradient_norms
from refluence.gradients.rows import GradientRows
from refluence.perturbation import input_derivatives, train_rows
from refluence.planning import ASSUMED_TESTS, Plan
from refluence.scores import Scores
from refluence.scoring import added_scores, columns_of, scores_by_block, scores_in_folder, tiles_of
from refluence.settings import Settings, model_fingerprint
from refluence.skipping import sentence
from refluence.solvers import Identity, Solver
from refluence.stored_scores import StoredScores
from refluence.task import Task

if TYPE_CHECKING:
    from refluence.certificates import Certificate

SHARE_FOR_TESTS = 0.25


class Influence:
    """Which training examples helped and hurt: τ_λ(g_test, g_train) = g_testᵀ (C + (l2+λ)I)⁻¹ g_train.

    Args:
        task: what is differentiated.
        curvature: C: "fisher", the empirical Fisher (1/n) Σ g gᵀ; "ggn", the generalised Gauss–Newton
            (1/n) Σ Jᵀ(∂²ℓ)J; "hessian"; "true_fisher" and "mc_fisher", the Fisher over the model's own labels, exact or
            from `samples` labels drawn for each example.
        solver: "auto", or an object from `rf.solvers`.
        damping: λ: a number, `rf.RelativeDamping(c)`, `rf.EffectiveDimension(k)`, "auto", the λ with
            d_λ = min(n/16, d/16, 2048), or a dict of these by block.
        blocks: "full", "module", "parameter", or {block name: [parameter names]}; C is block-diagonal over them.
        accuracy: `rf.Accuracy(0.1)`: with solver "auto" or a sketch, the sketch grows until the scores are as
            accurate, or an exact solver is taken where that is no dearer.
        device: where to compute; None: where the model is. The user's model is copied, never moved.
        dtype: None: gradients in the model's dtype, curvature and solves in float64; else the whole attribution on a
            copy of the model in that dtype.
        batch_size: examples a forward pass; None: chosen from a probe. A `DataLoader` keeps its own.
        progress: whether long passes show a bar.
        seed: of sampled labels and of the automatic sketch (no random choice in the exact solvers).
        execution: memory that may be used, and where train gradients are held and stored.
        samples: labels an example of "mc_fisher"; two or more give every score of solver Gram a standard error.

    Raises:
        RefluenceError: an unknown curvature, solver, damping or block.
    """

    def __init__(
        self,
        task: Task,
        curvature: str = "fisher",
        solver: Solver | str = "auto",
        damping: DampingChoice = "auto",
        blocks: Blocks = "full",
        accuracy: Accuracy | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        seed: int = 0,
        execution: Execution | None = None,
        samples: int = 2,
    ) -> None:
        if not isinstance(task, Task):
            raise RefluenceError(f"`task` must be an rf.Task, not {type(task).__name__}")
        groups = parameter_groups(task.model, task.parameter_names(), blocks)
        self._damping_choice = check_damping(damping, list(groups))
        self.settings = Settings(
            task,
            curvature,
            solver,
            self._damping_choice,
            groups,
            device,
            dtype,
            batch_size,
            progress,
            int(seed),
            samples,
            execution or Execution(),
            accuracy,
        )
        self._fit: Fit | None = None
        self._resolved: dict[str, float] | None = None
        self._norms: tuple[float, float] | None = None

    # ------------------------------------------------------------------ fit

    def fit(self, train: Data, *, weights: Sequence[float] | Tensor | None = None) -> Influence:
        """Prepare the solver on the training data; returns itself.

        Args:
            train: a `Dataset`, tuple or mapping of tensors, or unshuffled `DataLoader`.
            weights: w ≥ 0 of each example in the training objective (1/n) Σ w_i loss_i; None: all 1. The train side of
                every score is then w_j g_j.

        Raises:
            DataError: shuffled, empty, changing or wrongly shaped data; wrong weights.
            BadExampleError: an example that cannot be read or whose loss or gradient is not finite, with its row;
                `rf.Execution(skip_bad=True)` leaves such examples out.
            PlanError: the solver does not fit the memory, or cannot do the curvature.
            SolverError: the solver met negative curvature or diverged.
        """
        self._take(fitting.fit(self.settings, train, weights))
        if self.skipped:
            warnings.warn(sentence(self.skipped, self.n_train), stacklevel=2)
        return self

    def _take(self, fit: Fit, resolved: dict[str, float] | None = None) -> None:
        self._fit, self._resolved, self._norms = fit, resolved, None
        _ = self.shifts

    def plan_for(self, train: Data, n_test: int = ASSUMED_TESTS) -> Plan:
        """What `fit` and a score of `n_test` examples would take, without doing it."""
        return fitting.plan_for(self.settings, train, n_test)

    def _fitted(self) -> Fit:
        if self._fit is None:
            raise NotFittedError("call fit(train) first")
        return self._fit

    def save(self, path: str | Path) -> Path:
        """Write the fit to a folder: the solver's matrices, the training data, and how it was made.

        The model is not written. Raises:
            DataError: the folder exists and is no fit, or training batches of different shapes.
        """
        from refluence.persistence import save

        return save(self, Path(path))

    @staticmethod
    def load(path: str | Path, task: Task) -> Influence:
        """A fit that `save` wrote, with the task it was made of; scores are the same numbers.

        Raises:
            DataError: no fit there, or one of another format.
            RefluenceError: a task that differs, with the first difference.
        """
        from refluence.persistence import load

        return load(Path(path), task)

    # ------------------------------------------------------------------ what was fitted

    @property
    def task(self) -> Task:
        """What is differentiated."""
        return self.settings.task

    @property
    def curvature(self) -> str:
        """The name of C."""
        return self.settings.curvature

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Block → its parameters."""
        return self.settings.groups

    @property
    def n_train(self) -> int:
        """The number of training examples."""
        return self._fitted().rows.n

    @property
    def skipped(self) -> dict[int, str]:
        """Row → what is wrong with it, of the training examples that the fit left out; their scores are 0."""
        return dict(self._fitted().skipped)

    @property
    def n_parameters(self) -> int:
        """The number of attributed parameters, d."""
        return sum(self._fitted().curvature.dimensions.values())

    @property
    def shifts(self) -> dict[str, float]:
        """Block → l2 + λ."""
        return {block: damping + self.task.l2 for block, damping in self._dampings().items()}

    def _dampings(self) -> dict[str, float]:
        fit = self._fitted()
        if self._resolved is None:
            if isinstance(fit.plan.chosen.solver, Identity) and not isinstance(self._damping_choice, float):
                self._resolved = dict.fromkeys(self.groups, 0.0)
            else:
                self._resolved = resolve(self._damping_choice, fit.state, self.task.l2)
        return self._resolved

    @property
    def damping(self) -> float | dict[str, float]:
        """λ in use, l2 not included; block → λ where the blocks differ."""
        return common(self._dampings())

    @property
    def effective_dimension(self) -> float:
        """d_λ = tr C(C+(l2+λ)I)⁻¹, summed over blocks; an estimate where the solver has no spectrum of its own."""
        return self._fitted().state.effective_dimension(self.shifts)

    @property
    def coverage(self) -> Coverage:
        """Which parameters are attributed and how."""
        return self._fitted().capture.coverage

    @property
    def plan(self) -> Plan:
        """What was chosen and why, with memory and time."""
        return self._fitted().plan

    @property
    def exact(self) -> bool:
        """Whether the scores are those of the curvature itself, with no approximation."""
        return self._fitted().state.exact

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What the solver reports of its preparation and its last solve: residuals, iterations, negative eigenvalues,
        layers without a Kronecker form."""
        return dict(self._fitted().state.diagnostics)

    @property
    def gradient_norm(self) -> float:
        """‖(1/n) Σ w_i g_i + l2·θ‖: how far the model is from a stationary point of its training objective."""
        return self._gradient_norms()[0]

    @property
    def gradient_rms(self) -> float:
        """√((1/n) Σ w_i‖g_i‖²): the root mean square norm of an example's gradient, the scale of `gradient_norm`."""
        return self._gradient_norms()[1]

    def _gradient_norms(self) -> tuple[float, float]:
        if self._norms is None:
            fit = self._fitted()
            self._norms = gradient_norms(fit.rows, fit.curvature.weights, self.task.l2)
        return self._norms

    def at(self, damping: DampingChoice) -> Influence:
        """The same fit at another damping, without a second pass over the data where the solver allows."""
        self._fitted()
        other = copy.copy(self)
        other._damping_choice = check_damping(damping, list(self.groups))
        other._resolved = None
        _ = other.shifts
        return other

    # ------------------------------------------------------------------ scores

    @overload
    def score(
        self,
        test: Data,
        *,
        weights: Sequence[float] | Tensor | None = None,
        groups: str | Iterable[Any] | None = None,
        normalize: str | None = None,
        errors: bool = True,
        by_block: Literal[False] = False,
        out: None = None,
    ) -> Scores: ...

    @overload
    def score(
        self,
        test: Data,
        *,
        weights: Sequence[float] | Tensor | None = None,
        groups: str | Iterable[Any] | None = None,
        normalize: str | None = None,
        errors: bool = True,
        by_block: Literal[False] = False,
        out: str | Path,
    ) -> StoredScores: ...

    @overload
    def score(
        self,
        test: Data,
        *,
        weights: Sequence[float] | Tensor | None = None,
        groups: str | Iterable[Any] | None = None,
        normalize: str | None = None,
        errors: bool = True,
        by_block: Literal[True],
        out: None = None,
    ) -> dict[str, Scores]: ...

    def score(
        self,
        test: Data,
        *,
        weights: Sequence[float] | Tensor | None = None,
        groups: str | Iterable[Any] | None = None,
        normalize: str | None = None,
        errors: bool = True,
        by_block: bool = False,
        out: str | Path | None = None,
    ) -> Scores | StoredScores | dict[str, Scores]:
        """τ_λ of every test example with every train example; positive = helpful.

        Args:
            test: like `train`.
            weights: a factor for each train example's column, such as how much it would be up-weighted.
            groups: sum the columns by group: one label for each train example, or "class" for its target.
            normalize: "theta-relatif" divides column j by ‖(C+λ)⁻¹g_j‖, "l-relatif" by √τ(g_j, g_j) (Barshan,
                Brunet & Dziugaite 2020), which keeps globally influential examples from ranking first everywhere.
            errors: False: without standard errors, which spares their time: of a sketch about that of the fit again.
            by_block: a dict of the scores that come from each block of parameters; they add up to the scores.
            out: a folder to which they are written some tests at a time, so that they are never in memory all at once;
                what is given back reads them from there.

        Raises:
            DataError: wrong test data, weights or groups, or an `out` that holds something else.
        """
        check_normalisation(normalize)
        if out is not None and by_block:
            raise RefluenceError("by_block=True gives a dict of scores in memory: score without `out`")
        tests = self._test_rows(test)
        for part in (tests,) if out is None or self.settings.accuracy is None else tiles_of(tests, self.n_train):
            fit = self._accurate(part)
        columns = columns_of(fit, self.shifts, weights, groups, normalize)
        targets = self._targets()
        manifest = {
            **self.manifest(),
            "target_damping": common(targets),
            "normalize": normalize,
            "score_weights": None if weights is None else hash_numbers(weights),
            "groups": groups if groups is None or isinstance(groups, str) else "given labels",
            "test_fingerprint": tests.batches.checksum,
        }

        if out is not None:
            return scores_in_folder(fit, tests, self.shifts, columns, errors, manifest, Path(out))
        if by_block:
            return scores_by_block(fit, tests, self.shifts, columns, errors, manifest, targets)
        return added_scores(fit, tests, self.shifts, columns, errors, manifest)

    def _accurate(self, tests: GradientRows) -> Fit:
        """The fit, with a larger sketch where these tests need one for the accuracy asked for."""
        fit = self._fitted()
        if self.settings.accuracy is not None:
            state, plan = fitting.accurate(self.settings, fit.state, fit.plan, dict(self._dampings()), tests)
            self._fit = fit = replace(fit, state=state, plan=plan)
        return fit

    def certify(
        self,
        test: Data,
        confidence: float = 0.95,
        *,
        sample: int | None = None,
        deterministic: bool | None = None,
        seed: int = 0,
    ) -> Certificate:
        """How far the scores of these tests are from the exact ones of the same curvature and damping.

        See `refluence.certificates.certify`.
        """
        from refluence.certificates import certify

        return certify(self, test, confidence, sample=sample, deterministic=deterministic, seed=seed)

    def _targets(self) -> dict[str, float]:
        """Block → the damping whose exact scores these scores estimate, l2 not included."""
        dampings, shifts = self._dampings(), self.shifts
        found = self._fitted().state.targets(shifts)
        # The damping itself, not (λ + l2) − l2, where it is what they estimate.
        return {b: dampings[b] if found[b] == shifts[b] else found[b] - self.task.l2 for b in dampings}

    def _test_rows(self, test: Data) -> GradientRows:
        fit = self._fitted()
        if model_fingerprint(fit.model) != fit.fingerprint:
            raise RefluenceError(
                "the model's parameters or buffers changed since fit, so train and test gradients would not belong "
                "together: fit again, or fit on a copy of the model"
            )
        device = fit.rows.device
        batch_size = self.settings.batch_size or fit.rows.batches.batch_size
        batches = Batches(test, batch_size, device, self.settings.dtype, "test")
        memory = int(SHARE_FOR_TESTS * self.settings.execution.budget(device))
        return GradientRows(fit.capture, batches, fit.capture.measurement, memory, self.settings.progress)

    def self_influence(self) -> Float[Tensor, " n"]:
        """τ_λ(g_j, g_j) of every train example (times its weight): n times the ridge leverage score of its gradient."""
        return self._fitted().state.self_influence(self.shifts).cpu()

    def inverse_hvp(self, test: Data) -> Float[Tensor, "k d"]:
        """Rows (C + (l2+λ)I)⁻¹ g_test, in the order of the attributed parameters, in float64.

        Of a sketch P it is Pᵀ(PCPᵀ+μ)⁻¹P g_test, whose inner products with gradients are the sketched scores.
        """
        fit = self._fitted()
        return self._in_order(fit.state.inverse_hvp(self._test_rows(test), self.shifts)).cpu()

    def _in_order(self, solved: Mapping[str, Float[Tensor, "k e"]]) -> Float[Tensor, "k d"]:
        """Rows by block as rows in the order of the attributed parameters."""
        shapes = self._fitted().capture.shapes
        pieces: dict[str, Tensor] = {}
        for group, names in self.groups.items():
            sizes = [shapes[name].numel() for name in names]
            pieces |= dict(zip(names, solved[group].split(sizes, dim=1), strict=True))
        return torch.cat([pieces[name] for name in self.task.parameter_names()], dim=1)

    def perturbation(
        self,
        test: Data,
        *,
        rows: Sequence[int] | None = None,
        inputs: Callable[[Any], Tensor] = differentiable_input,
    ) -> Float[Tensor, "k n ..."]:
        """∂τ_ij/∂x_j, how the score changes with the input of train example j, C held fixed: (n_test, n_train, *x).

        Koh & Liang 2017, eq. 5: moving x_j by δ changes the measurement of test i by about −δᵀ(∂τ_ij/∂x_j)/n.

        Args:
            test: like `train`.
            rows: of the train examples; None: all. The result has n_test·n_train·|x| numbers: take some rows at a time,
                or `perturbations`, where that is too much.
            inputs: which tensor of a batch is x; the default finds the one floating-point input.

        Raises:
            TaskError: integer inputs, which have no derivative, or several candidates.
            DataError: rows that do not exist.
        """
        parts = [values.cpu() for _, values in self.perturbations(test, rows=rows, inputs=inputs)]
        return torch.cat(parts, dim=1)

    def perturbations(
        self,
        test: Data,
        *,
        rows: Sequence[int] | None = None,
        inputs: Callable[[Any], Tensor] = differentiable_input,
    ) -> Iterator[tuple[list[int], Float[Tensor, "k b ..."]]]:
        """`perturbation` batch by batch: (train rows, (n_test, b, *x))."""
        fit = self._fitted()
        chosen = train_rows(rows, self.n_train)
        inputs(fit.rows.batches.select(chosen[:1]))
        directions = self._in_order(fit.state.inverse_hvp(self._test_rows(test), self.shifts))
        yield from input_derivatives(fit, self.task.parameter_names(), directions, chosen, inputs)

    # ------------------------------------------------------------------ records

    def manifest(self) -> dict[str, Any]:
        """What a reader of the scores needs to know and to repeat them: JSON-able."""
        fit = self._fitted()
        return {
            "refluence": __version__,
            "torch": torch.__version__,
            "task": self.task.describe(),
            "curvature": self.curvature,
            "samples": self.settings.samples if self.curvature == "mc_fisher" else None,
            "solver": fit.plan.solver,
            "exact": self.exact,
            "blocks": {group: list(names) for group, names in self.groups.items()},
            "damping": self.damping,
            "damping_choice": choice_record(self._damping_choice),
            "effective_dimension": fit.state.known_dimension(self.shifts),
            "n_train": self.n_train,
            "n_parameters": self.n_parameters,
            "dtype": str(fit.rows.dtype).removeprefix("torch."),
            "device": fit.rows.device.type,
            "seed": self.settings.seed,
            "coverage": fit.capture.coverage.summary,
            "fit_weights": None if fit.curvature.weights is None else hash_numbers(fit.curvature.weights),
            "skipped_rows": {str(row): reason for row, reason in fit.skipped.items()},
            "train_fingerprint": fit.rows.batches.checksum,
            "model_fingerprint": fit.fingerprint,
        }

    def __repr__(self) -> str:
        if self._fit is None:
            return f"Influence(curvature={self.curvature!r}, solver={self.settings.solver!r}, not fitted)"
        return f"Influence(n={self.n_train}, d={self.n_parameters}, solver={self.plan.solver}, damping={self.damping})"

"""Influence: fit on the training data once, then score test data, as often and at as many dampings as wanted."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from refluence._version import __version__
from refluence.batches import Batches, Data
from refluence.curvature import EmpiricalFisher
from refluence.damping import Damping, check_damping, resolve
from refluence.errors import DataError, NotFittedError, RefluenceError
from refluence.execution import Execution
from refluence.gradients.capture import Capture
from refluence.gradients.coverage import Coverage
from refluence.gradients.groups import Blocks, parameter_groups
from refluence.gradients.rows import GradientRows
from refluence.planning import ASSUMED_TESTS, Plan, Workload, make_plan
from refluence.scores import Scores
from refluence.solvers import Identity, Solver, State
from refluence.task import Task, batch_targets

PROBE_ROWS = 32
FACTOR_BYTES_PER_BATCH = 64 << 20
LARGEST_BATCH = 1024
SHARE_FOR_TESTS = 0.25
KEPT_SLACK = 1.05
"""Room for rows that are larger than the probe's, as longer sequences are."""
NORMALISATIONS = ("theta-relatif", "l-relatif")


@dataclass(eq=False)
class _Fit:
    """What `fit` made; shared by `Influence.at`."""

    model: nn.Module
    capture: Capture
    rows: GradientRows
    curvature: EmpiricalFisher
    state: State
    plan: Plan
    fingerprint: str


class Influence:
    """Which training examples helped and hurt: τ_λ(g_test, g_train) = g_testᵀ (C + (l2+λ)I)⁻¹ g_train.

    Args:
        task: what is differentiated.
        curvature: C; "fisher" is the empirical Fisher (1/n) Σ g gᵀ.
        solver: "auto", or an object from `rf.solvers`.
        damping: λ: a number, `rf.RelativeDamping(c)`, `rf.EffectiveDimension(k)`, or "auto", the λ with
            d_λ = min(n/16, d/16, 2048).
        blocks: "full", "module", "parameter", or {block name: [parameter names]}; C is block-diagonal over them.
        device: where to compute; None: where the model is. The user's model is copied, never moved.
        dtype: None: gradients in the model's dtype, curvature and solves in float64; else the whole attribution on a
            copy of the model in that dtype.
        batch_size: examples a forward pass; None: chosen from a probe. A `DataLoader` keeps its own.
        progress: whether long passes show a bar.
        seed: of every random choice (none in the exact solvers).
        execution: memory that may be used.

    Raises:
        RefluenceError: an unknown curvature, solver, damping or block.
    """

    def __init__(
        self,
        task: Task,
        curvature: str = "fisher",
        solver: Solver | str = "auto",
        damping: Damping = "auto",
        blocks: Blocks = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        seed: int = 0,
        execution: Execution | None = None,
    ) -> None:
        if not isinstance(task, Task):
            raise RefluenceError(f"`task` must be an rf.Task, not {type(task).__name__}")
        if curvature != "fisher":
            raise RefluenceError(f'curvature {curvature!r} is not available in version {__version__}: use "fisher"')
        self.task = task
        self.curvature = curvature
        self.solver = solver
        self.blocks = blocks
        self.groups = parameter_groups(task.model, task.parameter_names(), blocks)
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.progress, self.seed = progress, int(seed)
        self.execution = execution or Execution()
        self._damping_choice: Damping = check_damping(damping)
        self._fit: _Fit | None = None
        self._resolved: dict[str, float] | None = None
        self._gradient_norm: float | None = None

    # ------------------------------------------------------------------ fit

    def fit(self, train: Data, *, weights: Sequence[float] | Tensor | None = None) -> Influence:
        """Prepare the solver on the training data; returns itself.

        Args:
            train: a `Dataset`, tuple or mapping of tensors, or unshuffled `DataLoader`.
            weights: w ≥ 0 of each example in the training objective (1/n) Σ w_i loss_i; None: all 1. The train side of
                every score is then w_j g_j.

        Raises:
            DataError: shuffled, empty, changing or wrongly shaped data; wrong weights.
            PlanError: the solver does not fit the memory.
        """
        capture, batches, plan = self._prepare(train, ASSUMED_TESTS)
        plan.check()
        checked = None if weights is None else _checked_weights(weights, batches.n)
        rows = GradientRows(capture, batches, capture.loss, int(plan.chosen.kept * KEPT_SLACK), self.progress)
        curvature = EmpiricalFisher(rows, checked)
        state = plan.chosen.solver.prepare(curvature)
        self._fit = _Fit(capture.model, capture, rows, curvature, state, plan, model_fingerprint(capture.model))
        self._resolved, self._gradient_norm = None, None
        _ = self.shifts
        return self

    def plan_for(self, train: Data, n_test: int = ASSUMED_TESTS) -> Plan:
        """What `fit` and a score of `n_test` examples would take, without doing it."""
        return self._prepare(train, n_test)[2]

    def _prepare(self, train: Data, n_test: int) -> tuple[Capture, Batches, Plan]:
        model = self._model()
        reference = next(model.parameters())
        probe = Batches(train, self.batch_size or PROBE_ROWS, reference.device, self.dtype, "train")
        capture = Capture(self.task, model, self.groups, probe)
        count = min(PROBE_ROWS, probe.n)
        sample = Batches(probe.select(range(count)), count, reference.device, self.dtype, "train")
        seconds = float("inf")
        for _ in range(2):
            begin = time.perf_counter()
            [(_, blocks)] = list(capture.gradients(sample, capture.loss))
            seconds = min(seconds, time.perf_counter() - begin)
        per_row = sum(block.nbytes for block in blocks.values()) / count
        fitting = int(FACTOR_BYTES_PER_BATCH / max(1.0, per_row))
        batch_size = self.batch_size or max(8, min(LARGEST_BATCH, 1 << max(0, fitting.bit_length() - 1)))
        batches = Batches(train, batch_size, reference.device, self.dtype, "train")
        workload = Workload(
            n=batches.n,
            tests=n_test,
            dimensions={
                group: sum(capture.shapes[name].numel() for name in names) for group, names in self.groups.items()
            },
            bytes_per_row=per_row,
            inner_product_work=sum(block.inner_product_work() for block in blocks.values()),
            gradient_seconds=seconds / count,
            itemsize=reference.element_size(),
            batch_size=batches.batch_size,
            device=reference.device,
            damping=self._damping_choice,
        )
        plan = make_plan(workload, self.solver, self.execution.budget(reference.device))
        return capture, batches, plan

    def _model(self) -> nn.Module:
        """The task's model, or a copy of it where device or dtype ask for another."""
        parameters = list(self.task.model.parameters())
        device = torch.device(self.device) if self.device is not None else parameters[0].device
        moved = any(p.device != torch.empty(0, device=device).device for p in parameters)
        if moved or (self.dtype is not None and any(p.dtype != self.dtype for p in parameters)):
            return copy.deepcopy(self.task.model).to(device=device, dtype=self.dtype)
        return self.task.model

    def _fitted(self) -> _Fit:
        if self._fit is None:
            raise NotFittedError("call fit(train) first")
        return self._fit

    # ------------------------------------------------------------------ what was fitted

    @property
    def n_train(self) -> int:
        """The number of training examples."""
        return self._fitted().rows.n

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
        dampings = self._dampings()
        return next(iter(dampings.values())) if len(set(dampings.values())) == 1 else dict(dampings)

    @property
    def effective_dimension(self) -> float:
        """d_λ = tr C(C+(l2+λ)I)⁻¹, summed over blocks."""
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
    def gradient_norm(self) -> float:
        """‖(1/n) Σ w_i g_i + l2·θ‖: how far the model is from a stationary point of its training objective."""
        if self._gradient_norm is None:
            fit = self._fitted()
            total: dict[str, Tensor] = {}
            for start, blocks in fit.rows:
                for group, block in blocks.items():
                    weights = torch.ones(block.n, 1, dtype=torch.float64, device=block.device)
                    if fit.curvature.weights is not None:
                        weights[:, 0] = fit.curvature.weights[start : start + block.n]
                    part = block.rmatvec(weights)[:, 0] / self.n_train
                    total[group] = total[group] + part if group in total else part
            parameters = fit.capture.parameters
            squared = 0.0
            for group, names in self.groups.items():
                theta = torch.cat([parameters[name].detach().double().flatten() for name in names])
                squared += float((total[group] + self.task.l2 * theta).square().sum())
            self._gradient_norm = squared**0.5
        return self._gradient_norm

    @property
    def gradient_rms(self) -> float:
        """√tr C: the root mean square norm of a training example's gradient, the scale of `gradient_norm`."""
        return sum(self._fitted().state.traces.values()) ** 0.5

    def at(self, damping: Damping) -> Influence:
        """The same fit at another damping, without a second pass over the data."""
        self._fitted()
        other = copy.copy(self)
        other._damping_choice = check_damping(damping)
        other._resolved = None
        _ = other.shifts
        return other

    # ------------------------------------------------------------------ scores

    def score(
        self,
        test: Data,
        *,
        weights: Sequence[float] | Tensor | None = None,
        groups: str | Iterable[Any] | None = None,
        normalize: str | None = None,
    ) -> Scores:
        """τ_λ of every test example with every train example; positive = helpful.

        Args:
            test: like `train`.
            weights: a factor for each train example's column, such as how much it would be up-weighted.
            groups: sum the columns by group: one label for each train example, or "class" for its target.
            normalize: "theta-relatif" divides column j by ‖(C+λ)⁻¹g_j‖, "l-relatif" by √τ(g_j, g_j) (Barshan,
                Brunet & Dziugaite 2020), which keeps globally influential examples from ranking first everywhere.

        Raises:
            DataError: wrong test data, weights or groups.
        """
        fit = self._fitted()
        rows = self._test_rows(test)
        values: Tensor | None = None
        for _, part in fit.state.scores(rows, self.shifts):
            values = part.contiguous() if values is None else values.add_(part)
        assert values is not None
        if normalize is not None:
            values = values / self._norms(normalize)
        if weights is not None:
            values = values * _checked_weights(weights, self.n_train, negative=True).to(values)
        train_ids = np.arange(self.n_train)
        if groups is not None:
            values, train_ids = self._grouped(values, groups)
        manifest = {
            **self.manifest(),
            "normalize": normalize,
            "score_weights": None if weights is None else _hash_numbers(weights),
            "groups": groups if groups is None or isinstance(groups, str) else "given labels",
            "test_fingerprint": rows.batches.checksum,
        }
        if not bool(torch.isfinite(values).all()):
            raise RefluenceError("the scores hold NaN or Inf: use a larger damping")
        target: Any = self.damping
        return Scores(values.cpu(), self.n_train, train_ids, target_damping=target, manifest=manifest)

    def _test_rows(self, test: Data) -> GradientRows:
        fit = self._fitted()
        if model_fingerprint(fit.model) != fit.fingerprint:
            raise RefluenceError(
                "the model's parameters or buffers changed since fit, so train and test gradients would not belong "
                "together: fit again, or fit on a copy of the model"
            )
        device = fit.rows.device
        batches = Batches(test, self.batch_size or fit.rows.batches.batch_size, device, self.dtype, "test")
        memory = int(SHARE_FOR_TESTS * self.execution.budget(device))
        return GradientRows(fit.capture, batches, fit.capture.measurement, memory, self.progress)

    def _norms(self, normalize: str) -> Float[Tensor, " n"]:
        if normalize not in NORMALISATIONS:
            raise DataError(f"normalize must be one of {NORMALISATIONS} or None, not {normalize!r}")
        fit = self._fitted()
        if normalize == "theta-relatif":
            squared = fit.state.inverse_norms(self.shifts)
        else:
            squared = self.self_influence()
            if fit.curvature.weights is not None:
                squared = squared * fit.curvature.weights.to(squared)
        norms = squared.clamp(min=0).sqrt()
        return torch.where(norms > 0, norms, torch.inf)

    def _grouped(self, values: Tensor, groups: str | Iterable[Any]) -> tuple[Tensor, Any]:
        labels = self._classes() if isinstance(groups, str) else groups
        if isinstance(groups, str) and groups != "class":
            raise DataError(f'groups must be one label for each train example, or "class", not {groups!r}')
        if isinstance(labels, Tensor):
            labels = labels.cpu().numpy()
        codes, names = pd.factorize(pd.Series(list(labels)), sort=True)
        if len(codes) != self.n_train:
            raise DataError(f"groups has {len(codes)} labels for {self.n_train} train examples")
        if (codes < 0).any():
            raise DataError("groups has missing labels: give every train example one")
        summed = torch.zeros(values.shape[0], len(names), dtype=values.dtype, device=values.device)
        summed.index_add_(1, torch.as_tensor(codes, device=values.device), values)
        return summed, np.asarray(names)

    def _classes(self) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed from the user's random state
            targets = [batch_targets(batch) for _, batch in self._fitted().rows.batches]
        labels = torch.cat([torch.as_tensor(part) for part in targets])
        if labels.ndim != 1:
            raise DataError(f'groups="class" needs one target for each example; the targets have shape {labels.shape}')
        return labels

    def self_influence(self) -> Float[Tensor, " n"]:
        """τ_λ(g_j, g_j) of every train example (times its weight): n times the ridge leverage score of its gradient."""
        return self._fitted().state.self_influence(self.shifts).cpu()

    def inverse_hvp(self, test: Data) -> Float[Tensor, "k d"]:
        """Rows (C + (l2+λ)I)⁻¹ g_test, in the order of the attributed parameters, in float64.

        Raises:
            PlanError: the solver does not keep the gradients' coordinates.
        """
        fit = self._fitted()
        solved = fit.state.inverse_hvp(self._test_rows(test), self.shifts)
        pieces: dict[str, Tensor] = {}
        for group, names in self.groups.items():
            sizes = [fit.capture.shapes[name].numel() for name in names]
            pieces |= dict(zip(names, solved[group].split(sizes, dim=1), strict=True))
        return torch.cat([pieces[name] for name in self.task.parameter_names()], dim=1).cpu()

    # ------------------------------------------------------------------ records

    def manifest(self) -> dict[str, Any]:
        """What a reader of the scores needs to know and to repeat them: JSON-able."""
        fit = self._fitted()
        return {
            "refluence": __version__,
            "torch": torch.__version__,
            "task": self.task.describe(),
            "curvature": self.curvature,
            "solver": fit.plan.solver,
            "exact": self.exact,
            "blocks": {group: list(names) for group, names in self.groups.items()},
            "damping": self.damping,
            "damping_choice": _choice(self._damping_choice),
            "effective_dimension": self.effective_dimension,
            "n_train": self.n_train,
            "n_parameters": self.n_parameters,
            "dtype": str(fit.rows.dtype).removeprefix("torch."),
            "device": fit.rows.device.type,
            "seed": self.seed,
            "coverage": fit.capture.coverage.summary,
            "fit_weights": None if fit.curvature.weights is None else _hash_numbers(fit.curvature.weights),
            "train_fingerprint": fit.rows.batches.checksum,
            "model_fingerprint": fit.fingerprint,
        }

    def __repr__(self) -> str:
        if self._fit is None:
            return f"Influence(curvature={self.curvature!r}, solver={self.solver!r}, not fitted)"
        return f"Influence(n={self.n_train}, d={self.n_parameters}, solver={self.plan.solver}, damping={self.damping})"


def _choice(damping: Damping) -> Any:
    return damping if isinstance(damping, (float, str)) else {type(damping).__name__: asdict(damping)}


def _checked_weights(weights: Sequence[float] | Tensor, n: int, negative: bool = False) -> Float[Tensor, " n"]:
    values = torch.as_tensor(weights, dtype=torch.float64).detach()
    if values.shape != (n,):
        raise DataError(f"weights must be one number for each of {n} train examples, not shape {tuple(values.shape)}")
    wrong = ~torch.isfinite(values) if negative else ~torch.isfinite(values) | (values < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"weights must be finite{'' if negative else ' and ≥ 0'}; weights[{row}] is {values[row].item()}"
        )
    return values


def _hash_numbers(values: Sequence[float] | Tensor) -> str:
    return hashlib.sha256(torch.as_tensor(values, dtype=torch.float64).cpu().numpy().tobytes()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the architecture as printed and of every parameter and buffer."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Exact leave-one-out of models with a convex objective.

Axis letters: m removals, d parameters, n train and k test examples.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from refluence.batches import Batches, Data, tensors_of
from refluence.errors import DataError, SolverError
from refluence.evaluation.ground_truth import GroundTruth
from refluence.evaluation.linear_sums import sums_of
from refluence.evaluation.measuring import measure
from refluence.evaluation.newton import inverse_products
from refluence.evaluation.optimum import model_at, optimum, split_parameters
from refluence.evaluation.refitting import Refit, Step, join, refits
from refluence.evaluation.subsets import leave_out
from refluence.evaluation.sums import Sums, flat_parameters
from refluence.execution import Execution
from refluence.influence import Influence
from refluence.task import Task
from refluence.training.files import read_tensors, write_tensors

_FORMAT = "refluence refits 1"
_BASELINE: tuple[int, ...] = ()


def minimise(
    task: Task, train: Data, *, tolerance: float = 1e-8, execution: Execution | None = None, progress: bool = True
) -> nn.Module:
    """A float64 copy of the model at the minimum of mean loss + (l2/2)‖θ‖² over its attributed parameters.

    L-BFGS first, then Newton's method with a factorised Hessian until ‖∇‖ ≤ `tolerance`. Parameters that are not
    attributed stay as they are.

    Args:
        task: with a convex objective, such as softmax, logistic or linear regression or a head on frozen features.
        tolerance: largest norm of the gradient.
        execution: memory that may be used.

    Raises:
        SolverError: an objective that is not convex, has no minimum (separable classes with l2 = 0), or whose gradient
            does not fall to the tolerance.
    """
    execution = execution or Execution()
    sums = sums_of(task, train, execution)
    start = flat_parameters(task.model, task.parameter_names())
    return model_at(task, optimum(task, train, sums, start, tolerance, execution, progress).parameters)


def leave_one_out(
    task: Task,
    train: Data,
    test: Data,
    rows: Sequence[int | Sequence[int]] | None = None,
    *,
    start: Float64[Tensor, "..."] | None = None,
    influence: Influence | None = None,
    tolerance: float = 1e-8,
    maxiter: int = 100,
    path: str | Path | None = None,
    execution: Execution | None = None,
    progress: bool = True,
) -> GroundTruth:
    """What leaving each of `rows` out does to the test measurements of a convex model, exactly, in float64.

    The model is refitted on all data, its Hessian factorised there once, and all removals are refitted together from
    there by `refit_without` until ‖∇‖ ≤ `tolerance`. `changes` is against the refit on all data.

    Args:
        rows: train rows; a sequence of rows in place of one leaves them out together. None: every row alone.
        start: parameters to start the removals from, (d,) or one (m, d) for each, such as the model's plus
            `newton_steps`; None: the minimum on all data.
        influence: one fitted on these data at about the minimum, such as with curvature="ggn" and solver Dense, whose
            inverse is then used in place of a factorisation; the refit on all data starts from the model's parameters.
        tolerance: largest ‖∇‖ of each removal's objective; its parameters are then within tolerance/l2.
        maxiter: largest number of steps of a removal.
        path: a folder in which finished removals are kept: the same call, also with more rows, goes on after a kill.
        execution: memory that may be used.

    Returns:
        A `GroundTruth` whose subset i leaves `rows[i]` out, with `gradient_norms`, `iterations` and `converged` of
        every removal in its manifest.

    Raises:
        SolverError: as `minimise`; no convergence of the refit on all data.
        DataError: rows that do not exist; a folder of another task, data or tolerance.
    """
    execution = execution or Execution()
    n = Batches(train, name="train").n
    groups = list(range(n)) if rows is None else list(rows)
    masks = leave_out(n, groups)
    removals = [tuple((~mask).nonzero()[:, 0].tolist()) for mask in masks]
    own = flat_parameters(task.model, task.parameter_names())
    store = _Store.open(path, lambda: _fingerprint(task, train, tolerance))
    left = [i for i, removal in enumerate(removals) if removal not in store.found]
    if start is not None and start.shape not in ((len(own),), (len(removals), len(own))):
        raise DataError(
            f"start has shape {tuple(start.shape)}; it must be ({len(own)},), or ({len(removals)}, {len(own)}) for "
            "these rows"
        )
    if left or _BASELINE not in store.found:
        sums = sums_of(task, train, execution)
        step = _baseline(task, train, sums, own, influence, tolerance, maxiter, store, execution, progress)
        first = store.found[_BASELINE].parameters[0] if start is None else start
        first = first if first.ndim == 1 else first[left]
        some = [removals[i] for i in left]
        for which, found in refits(sums, some, step, first, task.l2, tolerance, maxiter, execution, progress):
            store.add([some[i] for i in which], found)
    refit = join([store.found[removal] for removal in removals], len(own))
    _warn_unconverged(groups, refit, tolerance)
    tests = Batches(test, dtype=torch.float64, name="test")
    test_batch = tests.select(range(tests.n))
    measured = measure(task, split_parameters(task, refit.parameters), test_batch)
    baseline = store.found[_BASELINE]
    manifest = {
        "task": task.describe(),
        "method": "exact refits without each removal, float64",
        "tolerance": tolerance,
        "baseline_gradient_norm": float(baseline.gradient_norms[0]),
        "gradient_norms": refit.gradient_norms.tolist(),
        "iterations": refit.iterations.tolist(),
        "converged": refit.converged.tolist(),
        "torch": torch.__version__,
    }
    return GroundTruth(
        masks,
        {name: values[:, None] for name, values in measured.items()},
        measure(task, split_parameters(task, baseline.parameters), test_batch),
        manifest,
    )


def _baseline(
    task: Task,
    train: Data,
    sums: Sums,
    own: Float64[Tensor, " d"],
    influence: Influence | None,
    tolerance: float,
    maxiter: int,
    store: _Store,
    execution: Execution,
    progress: bool,
) -> Step:
    """The inverse Hessian at the minimum on all data, which is put into the store."""
    known = store.found.get(_BASELINE)
    if influence is None:
        begin = own if known is None else known.parameters[0]
        best = optimum(task, train, sums, begin, tolerance, execution, progress)
        norms = torch.tensor([best.gradient_norm], dtype=torch.float64)
        if known is None:
            count = torch.tensor([best.iterations])
            store.add([_BASELINE], Refit(best.parameters[None], norms, count, norms <= tolerance))
        return best.step
    if (influence.n_train, influence.n_parameters) != (sums.n, sums.d):
        raise DataError(
            f"the influence was fitted on {influence.n_train} examples and {influence.n_parameters} parameters, but "
            f"the task has {sums.n} and {sums.d}: give one fitted on the same training data"
        )
    step: Step = partial(inverse_products, influence)
    if known is None:
        [(_, found)] = list(refits(sums, [_BASELINE], step, own, task.l2, tolerance, maxiter, execution, False))
        if not bool(found.converged[0]):
            raise SolverError(
                f"the refit on all data stays at ‖∇‖ = {float(found.gradient_norms[0]):.3g} after {maxiter} steps with "
                "the inverse of `influence`: leave `influence` out, or fit it at the minimum (`minimise`)"
            )
        store.add([_BASELINE], found)
    return step


def _warn_unconverged(groups: Sequence[Any], refit: Refit, tolerance: float) -> None:
    wrong = (~refit.converged).nonzero()[:, 0].tolist()
    if wrong:
        worst = max(wrong, key=lambda i: float(refit.gradient_norms[i]))
        warnings.warn(
            f"{len(wrong)} of {len(groups)} removals did not reach ‖∇‖ ≤ {tolerance:.3g}; the worst is "
            f"{groups[worst]} with {float(refit.gradient_norms[worst]):.3g}: use a larger maxiter or tolerance",
            stacklevel=3,
        )


@dataclass(eq=False)
class _Store:
    """Refits by their removed rows, in memory and where asked for in a folder."""

    folder: Path | None
    fingerprint: str
    found: dict[tuple[int, ...], Refit]

    @classmethod
    def open(cls, path: str | Path | None, fingerprint: Any) -> _Store:
        """What the folder holds.

        Raises:
            DataError: a folder of other refits.
        """
        if path is None:
            return cls(None, "", {})
        store = cls(Path(path), fingerprint(), {})
        for file in sorted(store.folder.glob("refits-*.safetensors")) if store.folder is not None else []:
            read = read_tensors(file)
            if read is None:
                continue
            tensors, metadata = read
            if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != store.fingerprint:
                raise DataError(
                    f"{path} holds refits of another model, data, loss, l2 or tolerance: give another folder, or "
                    "delete it"
                )
            store._take([tuple(rows) for rows in json.loads(metadata["removals"])], Refit(**tensors))
        return store

    def add(self, removals: Sequence[tuple[int, ...]], refit: Refit) -> None:
        """Keep finished removals."""
        self._take(removals, refit)
        if self.folder is None:
            return
        name = hashlib.sha256(json.dumps(removals).encode()).hexdigest()[:16]
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint, "removals": json.dumps(removals)}
        write_tensors(self.folder / f"refits-{name}.safetensors", vars(refit), metadata)

    def _take(self, removals: Sequence[tuple[int, ...]], refit: Refit) -> None:
        for i, removal in enumerate(removals):
            own = slice(i, i + 1)
            self.found[removal] = Refit(
                refit.parameters[own], refit.gradient_norms[own], refit.iterations[own], refit.converged[own]
            )


def _fingerprint(task: Task, train: Data, tolerance: float) -> str:
    """A hash of what the refits depend on: where the attributed parameters started is no part of it."""
    digest = hashlib.sha256(json.dumps(task.describe(), sort_keys=True).encode())
    digest.update(f"{task.model!r} {tolerance!r}".encode())
    for _, batch in Batches(train, name="train"):
        for tensor in tensors_of(batch):
            _hash(digest, f"{tensor.dtype} {tuple(tensor.shape[1:])}", tensor)
    attributed = set(task.parameter_names())
    for name, tensor in [*task.model.named_parameters(), *task.model.named_buffers()]:
        if name not in attributed:
            _hash(digest, name, tensor)
    return digest.hexdigest()


def _hash(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(name.encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

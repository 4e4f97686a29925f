"""A task's curvature by name, on its training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from refluence.curvature.base import Curvature
from refluence.curvature.functional import FunctionalCurvature
from refluence.curvature.outer import OuterCurvature
from refluence.curvature.outputs import loss_hessian_roots, sampled_gradients, true_fisher_roots, true_fisher_shares
from refluence.curvature.products import gauss_newton_products, hessian_products
from refluence.gradients.rows import GradientRows

CURVATURES = ("fisher", "ggn", "hessian", "true_fisher", "mc_fisher")
CHUNK = 32
"""Vectors that one functional product takes together."""

Roots = Callable[[Any, Any, int], Tensor]


def make_curvature(
    name: str, rows: GradientRows, weights: Tensor | None, q: int | None, memory: int, seed: int
) -> Curvature:
    """The curvature of the training data that `rows` differentiates.

    Args:
        name: one of `CURVATURES`.
        q: rows for each example: the samples of "mc_fisher", the outputs for "ggn" and "true_fisher"; None where these
            are too many to be held, for products by passes over the data.
        memory: bytes that may be kept of these rows.
        seed: of the sampled labels.
    """
    if name == "fisher":
        return OuterCurvature(name, rows, rows, weights)
    if q is None:
        return _functional(name, rows, weights)
    task = rows.capture.task
    roots: dict[str, Roots] = {
        "mc_fisher": lambda output, batch, start: sampled_gradients(task, output, batch, start, q, seed),
        "ggn": lambda output, batch, start: loss_hessian_roots(task, output, batch, start),
        "true_fisher": lambda output, batch, start: true_fisher_roots(task, output, batch),
    }
    return OuterCurvature(name, rows, feature_rows(rows, roots[name], q, memory), weights)


def _functional(name: str, rows: GradientRows, weights: Tensor | None) -> FunctionalCurvature:
    task, model, loss = rows.capture.task, rows.capture.model, rows.capture.loss

    def of_hessian(names: tuple[str, ...], batch: Any, w: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
        return hessian_products(model, loss, names, batch, w, v, CHUNK)

    def of_ggn(names: tuple[str, ...], batch: Any, w: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
        return gauss_newton_products(model, task, names, batch, w, v, CHUNK)

    def of_true_fisher(names: tuple[str, ...], batch: Any, w: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            shares = true_fisher_shares(task, task.output(model, batch), batch)
        return gauss_newton_products(model, task, names, batch, w * shares.to(w), v, CHUNK)

    products = {"hessian": of_hessian, "ggn": of_ggn, "true_fisher": of_true_fisher}[name]
    convex = name == "true_fisher" or (name == "ggn" and not callable(task.loss))
    return FunctionalCurvature(name, rows, products, weights, positive=convex)


def feature_rows(rows: GradientRows, roots: Roots, q: int, memory: int) -> GradientRows:
    """The gradients Jᵀs of every example along q directions s of the model's output."""
    task, model = rows.capture.task, rows.capture.model

    def paired(start: int, batch: Any) -> tuple[Any, Tensor]:
        with torch.no_grad():
            output = task.output(model, batch)
        return batch, roots(output, batch, start).to(output.dtype)

    def along(model: nn.Module, pair: Any) -> Tensor:
        batch, directions = pair
        return (task.output(model, batch).unsqueeze(1) * directions).reshape(*directions.shape[:2], -1).sum(dim=2)

    return GradientRows(rows.capture, rows.batches.mapped(paired), along, memory, rows.progress, q)

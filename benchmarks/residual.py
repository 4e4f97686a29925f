"""How well somebody's solution solves (C + λI) s = g, by products that use nothing but torch, in float64."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from benchmarks.gradients import per_example_gradients
from benchmarks.inputs import Inputs

CHECKED = 5  # solutions whose residual is measured
ROWS = 500


def relative_residual(
    given: Inputs, solutions: Tensor, tests: tuple[Tensor, Tensor], curvature: str, damping: float
) -> float:
    """‖(C + λI)S − G‖ / ‖G‖ in the Frobenius norm, for solutions S and gradients G of (k, d).

    Of all together: the gradient of a test that the model is sure of is little but rounding in float32.
    """
    model = copy.deepcopy(given.model).double()
    right = per_example_gradients(model, tests[0].double(), tests[1])
    vectors = solutions.double()
    product = damping * vectors
    n = len(given.train[0])
    for images, labels in zip(*(rows.split(ROWS) for rows in given.train), strict=True):
        product += PRODUCTS[curvature](model, images.double(), labels, vectors) / n
    return float((product - right).norm() / right.norm())


def _split(model: nn.Module, vectors: Tensor) -> dict[str, Tensor]:
    """(k, d) as name → (k, *shape)."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    parts = vectors.split([parameter.numel() for parameter in parameters], dim=1)
    return {
        name: part.reshape(-1, *parameter.shape) for name, parameter, part in zip(names, parameters, parts, strict=True)
    }


def _joined(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(start_dim=1) for part in parts.values()], dim=1)


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def hessian_product(model: nn.Module, images: Tensor, labels: Tensor, vectors: Tensor) -> Tensor:
    """Σ_i ∇²ℓ_i v for each row v."""
    values = _values(model)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (images,)), labels, reduction="sum")

    return _joined(vmap(lambda v: jvp(grad(loss), (values,), (v,))[1])(_split(model, vectors)))


def ggn_product(model: nn.Module, images: Tensor, labels: Tensor, vectors: Tensor) -> Tensor:
    """Σ_i J_iᵀ (diag p − ppᵀ) J_i v for each row v; the labels do not enter."""
    values = _values(model)

    def output(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (images,))

    p = output(values).softmax(dim=1)
    _, pull = vjp(output, values)

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        change = jvp(output, (values,), (v,))[1]
        (back,) = pull(p * (change - (p * change).sum(dim=1, keepdim=True)))
        return back

    return _joined(vmap(product)(_split(model, vectors)))


def fisher_product(model: nn.Module, images: Tensor, labels: Tensor, vectors: Tensor) -> Tensor:
    """Σ_i g_i g_iᵀ v for each row v."""
    gradients = per_example_gradients(model, images, labels)
    return (vectors @ gradients.T) @ gradients


PRODUCTS = {"hessian": hessian_product, "ggn": ggn_product, "fisher": fisher_product}

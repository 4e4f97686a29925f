"""Every curvature as a dense float64 matrix, by plain autograd of one example after the other: no part of the library.

Parameters are the columns, flattened in the order of `names`. Axis letters: n examples, d parameters, o outputs.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.reference import length, loop_gradients, one_row

Loss = Callable[[Tensor, Any], Tensor]


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    """Mean over the positions of an example whose label is not −100."""
    labels = batch[1].reshape(len(output), -1)
    values = F.cross_entropy(output.reshape(-1, output.shape[-1]), labels.flatten(), reduction="none")
    return values.reshape(labels.shape).sum(dim=1) / (labels != -100).sum(dim=1).clamp(min=1)


def mse(output: Tensor, batch: Any) -> Tensor:
    """Mean over outputs."""
    return (output - batch[1].reshape(output.shape)).square().reshape(len(output), -1).mean(dim=1)


def binary_cross_entropy(output: Tensor, batch: Any) -> Tensor:
    """Mean over outputs, of logits."""
    labels = batch[1].reshape(output.shape).to(output)
    values = F.binary_cross_entropy_with_logits(output, labels, reduction="none")
    return values.reshape(len(output), -1).mean(dim=1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse, "binary_cross_entropy": binary_cross_entropy}


@dataclass
class DenseReference:
    """Derivatives of a model on one batch.

    Args:
        loss: a name of `LOSSES`, or f(output, batch) -> (n,).
        weights: of the examples in the objective; None: all 1.
        labels: (n, S, ...) for `mc_fisher`, S labels of each example.
    """

    model: nn.Module
    names: Sequence[str]
    loss: str | Loss
    batch: Any
    weights: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).eval()
        own = dict(self.model.named_parameters())
        for name, parameter in own.items():
            parameter.requires_grad_(name in set(self.names))
        self.leaves = [own[name] for name in self.names]
        self.n = length(self.batch)
        self.w = torch.ones(self.n, dtype=torch.float64) if self.weights is None else self.weights

    def losses(self, output: Tensor, batch: Any) -> Tensor:
        """(n,)."""
        return (self.loss if callable(self.loss) else LOSSES[self.loss])(output, batch)

    @cached_property
    def gradients(self) -> Tensor:
        """(n, d)."""
        return loop_gradients(self.model, lambda m, part: self.losses(m(part[0]), part), self.names, self.batch)

    def _flat(self, found: Sequence[Tensor | None]) -> Tensor:
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.leaves, found, strict=True)]
        return torch.cat([part.flatten() for part in parts])

    @cached_property
    def outputs(self) -> list[Tensor]:
        """One row of output for each example, without graph."""
        with torch.no_grad():
            return [self.model(one_row(self.batch, i)[0]) for i in range(self.n)]

    @cached_property
    def jacobians(self) -> Tensor:
        """(n, o, d)."""
        found = []
        for i in range(self.n):
            output = self.model(one_row(self.batch, i)[0]).flatten()
            rows = [torch.autograd.grad(x, self.leaves, retain_graph=True, allow_unused=True) for x in output]
            found.append(torch.stack([self._flat(row) for row in rows]))
        return torch.stack(found)

    @cached_property
    def output_hessians(self) -> Tensor:
        """∇²_out ℓ_i, (n, o, o)."""
        found = []
        for i, output in enumerate(self.outputs):
            part, o = one_row(self.batch, i), output.numel()
            found.append(
                torch.autograd.functional.hessian(lambda x, part=part: self.losses(x, part).sum(), output).reshape(o, o)
            )
        return torch.stack(found)

    def slopes(self, i: int, labels: Tensor) -> Tensor:
        """∂ℓ_i/∂out at every one of the labels (r, ...): (r, o)."""
        output = self.outputs[i].expand(len(labels), *self.outputs[i].shape[1:]).clone().requires_grad_()
        return torch.autograd.grad(self.losses(output, (None, labels)).sum(), output)[0].flatten(1)

    def expected_outer(self, i: int) -> Tensor:
        """E[(∂ℓ/∂out)(∂ℓ/∂out)ᵀ] over the labels that the model gives, all of them summed: (o, o)."""
        labels, chances = self._distribution(i)
        slopes = self.slopes(i, labels)
        return (slopes * chances[:, None]).T @ slopes

    def _distribution(self, i: int) -> tuple[Tensor, Tensor]:
        output, shape = self.outputs[i][0], one_row(self.batch, i)[1].shape[1:]
        if self.loss == "cross_entropy":
            logs = output.reshape(-1, output.shape[-1]).log_softmax(dim=-1)
            every = torch.tensor(list(itertools.product(range(logs.shape[1]), repeat=logs.shape[0])))
            chances = logs[torch.arange(len(logs)), every].sum(dim=1).exp()
            counted = one_row(self.batch, i)[1].reshape(1, -1) != -100
            return torch.where(counted, every, -100).reshape(-1, *shape), chances
        if self.loss == "binary_cross_entropy":
            p = output.sigmoid().flatten()
            every = torch.tensor(list(itertools.product((0, 1), repeat=len(p))))
            return every.reshape(-1, *shape), torch.where(every == 1, p, 1 - p).prod(dim=1)
        if self.loss == "mse":
            # exp(−ℓ) is a Gaussian of variance o/2; outputs are independent, and cubature of degree three is exact.
            o = output.numel()
            offsets = math.sqrt(o) * torch.cat([torch.eye(o), -torch.eye(o)]).double() * math.sqrt(o / 2)
            labels = (output.flatten() + offsets).reshape(-1, *output.shape)
            return labels, torch.full((2 * o,), 1 / (2 * o), dtype=torch.float64)
        raise ValueError(f"{self.loss} defines no distribution")

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(labels, Jacobian) of every example."""
        return zip(self.labels, self.jacobians, strict=True)

    def middle(self, name: str) -> Tensor:
        """M_i of C = (1/n) Σ w_i J_iᵀ M_i J_i, (n, o, o)."""
        if name == "fisher":
            slopes = torch.cat([self.slopes(i, one_row(self.batch, i)[1]) for i in range(self.n)])
            return slopes[:, :, None] * slopes[:, None, :]
        if name == "ggn":
            return self.output_hessians
        if name == "true_fisher":
            return torch.stack([self.expected_outer(i) for i in range(self.n)])
        if name == "mc_fisher":
            slopes = [self.slopes(i, labels) for i, labels in enumerate(self.labels)]
            return torch.stack([s.T @ s / len(s) for s in slopes])
        raise ValueError(name)

    def curvature(self, name: str) -> Tensor:
        """C of the whole model, (d, d)."""
        if name == "fisher":
            return (self.gradients * self.w[:, None]).T @ self.gradients / self.n
        if name == "hessian":
            return self._hessian()
        return torch.einsum("n,nod,nop,npe->de", self.w, self.jacobians, self.middle(name), self.jacobians) / self.n

    def _hessian(self) -> Tensor:
        # Attention's fused kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            objective = (self.w * self.losses(self.model(self.batch[0]), self.batch)).sum() / self.n
            slopes = self._flat(torch.autograd.grad(objective, self.leaves, create_graph=True, allow_unused=True))
            rows = [
                self._flat(torch.autograd.grad(slope, self.leaves, retain_graph=True, allow_unused=True))
                if slope.requires_grad
                else torch.zeros_like(slopes)
                for slope in slopes
            ]
        return torch.stack(rows)


def block_diagonal(C: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
    """The diagonal blocks of these columns."""
    return [C[block][:, block] for block in columns]


def low_rank_inverse(C: Tensor, shift: float, rank: int) -> Tensor:
    """U diag(1/(s+μ)) Uᵀ + (I − UUᵀ)/μ of the eigenpairs of largest |s|."""
    values, vectors = torch.linalg.eigh(C)
    order = values.abs().argsort(descending=True)[:rank]
    U, s = vectors[:, order], values[order]
    return (U / (s + shift)) @ U.T + (torch.eye(len(C)).double() - U @ U.T) / shift


def neumann_inverse(C: Tensor, shift: float, scale: float, depth: int) -> Tensor:
    """(1/scale) Σ_{k ≤ depth} (I − (C+μ)/scale)^k."""
    values, vectors = torch.linalg.eigh(C)
    shrink = 1 - (values + shift) / scale
    return (vectors * sum(shrink**k for k in range(depth + 1)) / scale) @ vectors.T


def harmonic_inverse(rows: Tensor, factors: Tensor, shift: float) -> Tensor:
    """The mean of (ω f fᵀ + μI)⁻¹ over rows f, each inverted by itself."""
    eye = torch.eye(rows.shape[1], dtype=rows.dtype)
    return torch.linalg.inv(factors[:, None, None] * rows[:, :, None] * rows[:, None, :] + shift * eye).mean(dim=0)


class LeastSquares:
    """y ≈ Wx + b with the mean square over the outputs: everything in closed form, in the order (W, b).

    ℓ = ‖r‖²/o with r = Wx + b − y.
    """

    def __init__(self, n: int = 31, inputs: int = 20, outputs: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"W": (outputs, inputs), "b": (outputs,), "x": (n, inputs), "y": (n, outputs)}
        made = {k: torch.randn(*s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
        self.W, self.b, self.x, self.y = made["W"] / 4, made["b"], made["x"], made["y"]
        self.o = outputs

    def model(self) -> nn.Module:
        """The same as a layer."""
        layer = nn.Linear(self.W.shape[1], self.W.shape[0]).double()
        layer.weight.data, layer.bias.data = self.W.clone(), self.b.clone()
        return layer

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """(2/o) r ⊗ (x, 1)."""
        r = x @ self.W.T + self.b - y
        return 2 / self.o * torch.cat([(r[:, :, None] * x[:, None, :]).flatten(1), r], dim=1)

    def hessian(self, x: Tensor) -> Tensor:
        """(2/o) I ⊗ mean of (x, 1)(x, 1)ᵀ."""
        second, first = x.T @ x / len(x), x.mean(dim=0)[:, None]
        eye = torch.eye(self.o, dtype=torch.float64)
        top = torch.cat([torch.kron(eye, second), torch.kron(eye, first)], dim=1)
        bottom = torch.cat([torch.kron(eye, first.T), eye], dim=1)
        return 2 / self.o * torch.cat([top, bottom])

    def mixed(self, x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
        """∂(gᵀv)/∂x_j for every direction v and example: (2/o)[Wᵀ(Vx + v_b) + Vᵀr], (k, n, inputs)."""
        r = x @ self.W.T + self.b - y
        V = directions[:, : self.W.numel()].reshape(-1, *self.W.shape)
        moved = torch.einsum("koi,ni->kno", V, x) + directions[:, None, self.W.numel() :]
        return 2 / self.o * (moved @ self.W + torch.einsum("koi,no->kni", V, r))


def kronecker_factors(reference: DenseReference, name: str, names: Sequence[str]) -> Tensor:
    """K-FAC's E ⊗ A of a linear layer that sees one position an example, in the order (weight, bias) of `names`.

    Its Jacobian in the weight is J_z ⊗ a, from which J_z, the Jacobian in the layer's output, is read.
    """
    inputs = layer_inputs(reference, names[0])
    parts, at = {}, 0
    for own, leaf in zip(reference.names, reference.leaves, strict=True):
        parts[own] = reference.jacobians[:, :, at : at + leaf.numel()].unflatten(2, leaf.shape)
        at += leaf.numel()
    J = torch.einsum("norc,nc->nor", parts[names[0]], inputs) / inputs.square().sum(dim=1)[:, None, None]
    if len(names) > 1:
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1).double()], dim=1)
    E = torch.einsum("n,nor,nop,nps->rs", reference.w, J, reference.middle(name), J) / reference.n
    A = (inputs * reference.w[:, None]).T @ inputs / reference.w.sum()
    order = torch.arange(len(E) * len(A)).reshape(len(E), len(A))
    if len(names) > 1:
        order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
    order = order.flatten()
    return torch.kron(E, A)[order][:, order]


def layer_inputs(reference: DenseReference, weight: str) -> Tensor:
    """(n, columns): what the linear layer that owns the weight is given."""
    seen: list[Tensor] = []
    layer = reference.model.get_submodule(weight.rpartition(".")[0])
    handle = layer.register_forward_hook(lambda module, given, output: seen.append(given[0].detach()))
    reference.model(reference.batch[0])
    handle.remove()
    return seen[0]

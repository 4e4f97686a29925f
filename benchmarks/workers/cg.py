"""Conjugate gradients on (F + λI) x = g_test with products by the empirical Fisher, all right-hand sides together.

Written to be a good representative of its kind: the gradients enter through the cached inputs and output gradients
of the layers, so a product is two matrix products a layer; every right-hand side has its own step lengths and leaves
the batch when it has converged; the iteration runs in float32 and is restarted from a float64 residual until that
true residual is below the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method

ROWS = 1000  # rows of the data a product takes at a time: bounds its intermediate at ROWS × k × d_out


@dataclass(frozen=True)
class Gradients:
    """Per-example gradients Σ_layers e aᵀ, never formed: pairs a (n, d_in + 1), e (n, d_out)."""

    layers: list[tuple[Tensor, Tensor]]

    @property
    def n(self) -> int:
        return self.layers[0][0].shape[0]

    def to(self, dtype: torch.dtype) -> Gradients:
        return Gradients([(a.to(dtype), e.to(dtype)) for a, e in self.layers])

    def rows(self, start: int, stop: int) -> Gradients:
        return Gradients([(a[start:stop], e[start:stop]) for a, e in self.layers])

    def dense(self) -> Tensor:
        return torch.cat([torch.einsum("no,ni->noi", e, a).flatten(start_dim=1) for a, e in self.layers], dim=1)

    def times(self, v: Tensor) -> Tensor:
        """(n, k): G Vᵀ for V (k, d)."""
        total = torch.zeros(())
        for (a, e), block in zip(self.layers, self._blocks(v), strict=True):
            k = block.shape[0]
            projected = (a @ block.reshape(k * e.shape[1], a.shape[1]).T).view(-1, k, e.shape[1])
            total = total + torch.einsum("nko,no->nk", projected, e)
        return total

    def transposed_times(self, u: Tensor) -> Tensor:
        """(k, d): uᵀ G for u (n, k)."""
        products = []
        for a, e in self.layers:
            weighted = (u[:, :, None] * e[:, None, :]).flatten(start_dim=1)
            products.append((weighted.T @ a).view(u.shape[1], -1))
        return torch.cat(products, dim=1)

    def fisher(self, v: Tensor) -> Tensor:
        """(k, d): V F with F = GᵀG / n."""
        total = torch.zeros_like(v)
        for start in range(0, self.n, ROWS):
            part = self.rows(start, start + ROWS)
            total += part.transposed_times(part.times(v))
        return total / self.n

    def _blocks(self, v: Tensor) -> list[Tensor]:
        return list(v.split([a.shape[1] * e.shape[1] for a, e in self.layers], dim=1))


def capture(model: nn.Module, images: Tensor, labels: Tensor) -> Gradients:
    """The inputs (with a one for the bias) and output gradients of every linear layer, in one forward and backward."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for layer in layers]
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    for handle in handles:
        handle.remove()
    output_gradients = torch.autograd.grad(loss, [output for _, output in seen])
    return Gradients(
        [
            (torch.cat([a.detach(), a.new_ones(len(a), 1)], dim=1), e)
            for (a, _), e in zip(seen, output_gradients, strict=True)
        ]
    )


def conjugate_gradients(
    gradients: Gradients, damping: float, b: Tensor, tolerances: Tensor, maximum: int
) -> tuple[Tensor, int]:
    """X (k, d) with ‖b − (F + λI)x‖ ≤ tolerance a row, by the recurrence's own residual; and the iterations made."""
    x = torch.zeros_like(b)
    active = torch.arange(len(b))
    r, p = b.clone(), b.clone()
    squared = (r * r).sum(dim=1)
    for iteration in range(1, maximum + 1):
        product = gradients.fisher(p).add_(p, alpha=damping)
        step = squared / (p * product).sum(dim=1)
        x[active] += step[:, None] * p
        r -= step[:, None] * product
        previous, squared = squared, (r * r).sum(dim=1)
        open_rows = squared.sqrt() > tolerances[active]
        if not open_rows.any():
            return x, iteration
        p = r + (squared / previous)[:, None] * p
        if not open_rows.all():
            active, r, p, squared = active[open_rows], r[open_rows], p[open_rows], squared[open_rows]
    return x, maximum


def solve(
    gradients: Gradients, damping: float, b: Tensor, tolerance: float, maximum: int
) -> tuple[Tensor, int, int, float]:
    """X (k, d), iterations, restarts and the largest relative residual ‖b − (F + λI)x‖ / ‖b‖, measured in float64."""
    single, double = gradients.to(torch.float32), gradients.to(torch.float64)
    # rows of length one: the squares of a confident test's tiny gradient would leave the range of float32
    lengths = b.double().norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    b = b.double() / lengths
    target = tolerance * b.norm(dim=1)
    x, r = torch.zeros_like(b), b.clone()
    iterations = restarts = 0
    while True:
        rows = r.norm(dim=1) > target
        if not rows.any() or iterations >= maximum:
            return x * lengths, iterations, restarts - 1, float(r.norm(dim=1).max())
        # 0.7: the true residual is a little larger than the recurrence's, and a restart loses the search directions
        step, made = conjugate_gradients(
            single, damping, r[rows].float(), 0.7 * target[rows].float(), maximum - iterations
        )
        x[rows] += step.double()
        r[rows] = b[rows] - double.fisher(x[rows]) - damping * x[rows]
        iterations, restarts = iterations + made, restarts + 1


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    k, damping = options["tests"], options["damping"]
    with measurement.stage("gradients"):
        gradients = capture(given.model, *given.train)
        b = capture(given.model, given.test[0][:k], given.test[1][:k]).dense()
    with measurement.stage("solve"):
        x, iterations, restarts, residual = solve(gradients, damping, b, options["tolerance"], options["maximum"])
    with measurement.stage("scores"):
        values = gradients.to(torch.float64).times(x).T
    measurement.facts |= {
        "tests": k,
        "iterations": iterations,
        "restarts": restarts,
        "relative_residual": residual,
        # 4·n·d a right-hand side and iteration, had none of them converged early
        "gflop_at_most": 4 * gradients.n * b.shape[1] * k * iterations / 1e9,
    }
    return values


if __name__ == "__main__":
    run_method(method)

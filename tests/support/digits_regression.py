"""Softmax regression on digits, refitted to its optimum in float64 in milliseconds: ground truth for evaluations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refluence as rf
from refluence.evaluation import GroundTruth
from refluence.zoo import load_dataset

L2 = 1e-2


class DigitsRegression:
    """`n` train and `k` test digits at 4×4 pixels; the objective is mean cross-entropy + (L2/2)‖θ‖²."""

    def __init__(self, n: int = 120, k: int = 24) -> None:
        data = load_dataset("digits", n_train=n, n_test=k)
        self.train, self.test = ((F.avg_pool2d(x, 2).flatten(1).double(), y) for x, y in (data.train, data.test))
        self.n, self.k = n, k
        self.theta = self.fitted(torch.ones(n, dtype=torch.bool))

    def fitted(self, mask: Tensor) -> Tensor:
        """Weights (10, 17) at the optimum on the rows of a mask, by Newton steps."""
        x, y = self.train[0][mask], self.train[1][mask]
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        theta = torch.zeros(10, x.shape[1], dtype=x.dtype)
        d = theta.numel()
        for _ in range(30):
            p = (x @ theta.T).softmax(dim=1)
            gradient = (p - F.one_hot(y, 10)).T @ x / len(x) + L2 * theta
            if gradient.norm() < 1e-10:
                return theta
            second = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            hessian = torch.einsum("nab,ni,nj->aibj", second, x, x).reshape(d, d) / len(x)
            step = torch.linalg.solve(hessian + L2 * torch.eye(d, dtype=x.dtype), gradient.flatten())
            theta = theta - step.reshape(theta.shape)
        raise AssertionError(f"not at the optimum: ‖g‖ = {gradient.norm():.1e}")

    def retrain(self, masks: Tensor) -> GroundTruth:
        """Loss and error of the optimum of every mask on the test rows."""
        return GroundTruth(masks, self._measured([self.fitted(mask) for mask in masks]), self.baseline())

    def baseline(self) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self._measured([self.theta]).items()}

    def _measured(self, thetas: list[Tensor]) -> dict[str, Tensor]:
        x, y = self.test
        logits = torch.stack([F.linear(x, theta[:, :-1], theta[:, -1]) for theta in thetas])
        losses = torch.stack([F.cross_entropy(each, y, reduction="none") for each in logits])
        error = (logits.argmax(dim=2) != y).double()
        return {"loss": losses[:, None], "error": error[:, None]}

    def task(self, **options: object) -> rf.Task:
        model = nn.Sequential(nn.Linear(16, 10)).double()
        with torch.no_grad():
            model[0].weight.copy_(self.theta[:, :-1])
            model[0].bias.copy_(self.theta[:, -1])
        return rf.Task(model, l2=L2, **options)

    def influence(self, damping: float = 0.0) -> rf.Influence:
        """Exact influence: the Hessian, with no damping but l2."""
        return rf.Influence(
            self.task(), curvature="hessian", solver=rf.solvers.Dense(), damping=damping, progress=False
        ).fit(self.train)


def halves(n: int, count: int) -> Tensor:
    masks = torch.zeros(count, n, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for mask in masks:
        mask[torch.randperm(n, generator=generator)[: n // 2]] = True
    return masks

"""K-FAC and EK-FAC by their formulas: explicit factors of single examples, explicit Kronecker products, in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refluence as rf
from refluence.batches import Batches
from refluence.curvature.build import make_curvature
from refluence.curvature.outputs import sampled_gradients
from refluence.gradients.capture import Capture
from refluence.gradients.groups import parameter_groups
from refluence.gradients.rows import GradientRows
from support.models import Case, N, labels, rows
from support.reference import length, one_row
from support.solving import Solving, dense

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
SEED = 3
DAMPINGS = (0.1, 1e-2, 1e-3)


class Problem(Solving):
    """A model of `support.models`, or any other, with its own data as train and test examples.

    Args:
        q: of "mc_fisher".
    """

    def __init__(self, case, name="fisher", blocks="full", weighted=False, batch_size=2, q=2, dtype=torch.float64):
        self.model, self.batch = case.build()
        self.model.to(dtype)
        self.batch = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.batch)
        self.name, self.q = name, q
        self.task = rf.Task(self.model, loss=case.loss, forward=case.forward, parameters=case.parameters)
        n = length(self.batch)
        self.w = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 0.3, 0.7][:n] if weighted else [1.0] * n).double()
        names = list(self.task.parameter_names())
        self.groups = parameter_groups(self.model, names, blocks)
        batches = Batches(self.batch, batch_size, dtype=dtype)
        self.capture = Capture(self.task, self.model, self.groups, batches)
        rows = GradientRows(self.capture, batches, self.capture.loss, 1 << 30, progress=False)
        with torch.no_grad():
            outputs = self.task.output(self.model, self.batch)[0].numel()
        count = {"fisher": 1, "mc_fisher": q}.get(name, outputs)
        self.curvature = make_curvature(name, rows, self.w if weighted else None, count, 1 << 30, SEED)
        self.tests = GradientRows(self.capture, batches, self.capture.measurement, 1 << 30, progress=False)
        self.G, self.V = dense(rows), dense(self.tests)

    def directions(self, model, i):
        """q directions in the output of example i, (q, *out); any root of the Hessian will do."""
        row = one_row(self.batch, i)
        output = self.task.output(model, row).detach()
        if self.name == "fisher":
            return torch.func.grad(lambda out: self.task.losses(out, row).sum())(output)
        if self.name == "mc_fisher":
            return sampled_gradients(self.task, output, row, i, self.q, SEED)[0][:, None]
        o = output.numel()
        H = torch.func.hessian(lambda out: self.task.losses(out.reshape(output.shape), row).sum())(output.flatten())
        if self.name == "true_fisher":
            # Of a mean of T independent labels, each with its own share of 1/T².
            H = H / self.batch[1][i].numel()
        values, vectors = torch.linalg.eigh(H.reshape(o, o))
        return (vectors * values.clamp(min=0).sqrt()).T.reshape(o, *output.shape)

    @functools.cached_property
    def factors(self):
        """Weight name → for each example and direction [(rows (t, R), columns (t, C))] of every use of the weight."""
        model = copy.deepcopy(self.model).double().eval()
        own = {id(p): name for name, p in model.named_parameters()}
        found: dict[str, list] = {}
        seen: list = []

        def hook(module, inputs, output):
            output.requires_grad_()
            seen.append((module, inputs[0].detach(), output))

        for module in model.modules():
            if isinstance(module, MATRICES) and getattr(module, "groups", 1) == 1:
                module.register_forward_hook(hook)
        for i in range(length(self.batch)):
            directions = self.directions(model, i)
            seen.clear()
            output = self.task.output(model, one_row(self.batch, i))
            recorded = list(seen)
            per_use: dict[str, list] = {}
            for s in directions if self.name != "fisher" else [directions]:
                errors = torch.autograd.grad((output * s).sum(), [y for _, _, y in recorded], retain_graph=True)
                uses: dict[str, list] = {}
                for (module, fed, _), error in zip(recorded, errors, strict=True):
                    uses.setdefault(own[id(module.weight)], []).append(pair(module, fed, error))
                for name, use in uses.items():
                    per_use.setdefault(name, []).append(use)
            for name, each in per_use.items():
                found.setdefault(name, []).append(each)
        return found

    def kfac(self, name, bias, sharing="expand"):
        """(E, A, moment(Q_E, Q_A) → Λ) of a weight, with its bias or not."""
        examples = self.factors[name]
        n = len(examples)
        E = A = 0.0
        count = 0.0
        onehot = any(r.shape[1] == self.model.get_parameter(name).shape[0] and is_unit(r) for r, _ in examples[0][0])
        for w, example in zip(self.w.tolist(), examples, strict=True):
            for uses in example:
                uses = [(r, torch.cat([c, torch.ones(len(c), 1)], 1) if bias else c) for r, c in uses]
                if sharing == "reduce" and not onehot:
                    r, c = torch.cat([r for r, _ in uses]), torch.cat([c for _, c in uses])
                    uses = [(r.sum(0, keepdim=True), c.mean(0, keepdim=True))]
                for r, c in uses:
                    E, A, count = E + w * r.T @ r, A + w * c.T @ c, count + w * len(r)
        E, A = E / n, A / count

        def moment(QE, QA):
            total = torch.zeros(len(E), len(A)).double()
            for w, example in zip(self.w.tolist(), examples, strict=True):
                for uses in example:
                    f = sum(r.T @ (torch.cat([c, torch.ones(len(c), 1)], 1) if bias else c) for r, c in uses)
                    total += w * (QE.T @ f @ QA) ** 2 / n
            return total

        return E, A, moment

    def expected_matrices(self, state, sharing="expand"):
        """Block → the approximate C; bases and eigenvalues of EK-FAC are checked where they are not unique."""
        exact = self.exact
        out = {}
        for group, C in exact.items():
            names = self.groups[group]
            at, spans = 0, {}
            for name in names:
                size = self.model.get_parameter(name).numel()
                spans[name] = torch.arange(at, at + size)
                at += size
            matrix = torch.zeros_like(C)
            for layer, basis in zip(state.layers, state.bases, strict=True):
                if layer.group != group:
                    continue
                owner = layer.owner
                index = torch.cat([spans[name] for name in owner.names])
                own = C[index][:, index]
                if basis.kind == "diagonal":
                    own = own.diagonal().diag()
                elif basis.kind == "zero":
                    own = torch.zeros_like(own)
                elif basis.kind == "kronecker":
                    own = self.kronecker(owner, basis, state.updated, sharing)
                matrix[index[:, None], index] = own
            out[group] = matrix
        return out

    def kronecker(self, owner, basis, updated, sharing):
        """One layer's approximate block, the bias after the weight."""
        bias = owner.bias is not None
        E, A, moment = self.kfac(owner.weight, bias, sharing)
        if updated:
            QE = torch.eye(len(E)).double() if basis.rows is None else basis.rows.double()
            QA = torch.eye(len(A)).double() if basis.columns is None else basis.columns.double()
            for Q, M in ((QE, E), (QA, A)):
                turned = Q.T @ M @ Q
                torch.testing.assert_close(
                    turned, turned.diagonal().diag(), rtol=0, atol=1e-9 * float(M.norm()) + 1e-25
                )
                torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q)).double(), rtol=0, atol=1e-9)
            Q = torch.kron(QE.contiguous(), QA.contiguous())
            matrix = (Q * moment(QE, QA).flatten()) @ Q.T
        else:
            matrix = torch.kron(E, A)
        if not bias:
            return matrix
        C = len(A)
        order = torch.arange(len(E) * C).reshape(len(E), C)
        order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
        return matrix[order][:, order]

    @functools.cached_property
    def exact(self):
        """Block → C by dense gradients of the rows."""
        features = dense(self.curvature.features)
        out = {}
        for group, f in features.items():
            sizes = [next(iter(blocks.values())).n for _, blocks in self.curvature.features]
            start, weights = 0, []
            for size in sizes:
                b = size // self.curvature.q
                weights.append(self.w[start : start + b].repeat(self.curvature.q))
                start += b
            out[group] = (f * torch.cat(weights)[:, None]).T @ f / length(self.batch)
        return out

    def inverses(self, matrices, shifts):
        """Block → (C + μ)⁻¹."""
        return {b: torch.linalg.inv(C + shifts[b] * torch.eye(len(C)).double()) for b, C in matrices.items()}


def is_unit(rows: Tensor) -> bool:
    return bool(((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all())


def pair(module, fed, error):
    """(rows (t, R), columns (t, C)) of one use of a module's weight by one example."""
    if isinstance(module, nn.Embedding):
        return F.one_hot(fed.flatten(), module.num_embeddings).double(), error.reshape(-1, module.embedding_dim)
    if isinstance(module, nn.Linear):
        return error.reshape(-1, module.out_features), fed.reshape(-1, module.in_features)
    if isinstance(module, nn.Conv1d):
        fed = fed[:, :, None]
        options = {name: (d, getattr(module, name)[0]) for name, d in (("padding", 0), ("stride", 1), ("dilation", 1))}
        kernel = (1, module.kernel_size[0])
    else:
        options = {name: getattr(module, name) for name in ("padding", "stride", "dilation")}
        kernel = module.kernel_size
    patches = F.unfold(fed, kernel, **options)[0].T
    return error.reshape(error.shape[1], -1).T, patches


# ---------------------------------------------------------------- models whose layers the reference sees


def made(make, **options):
    return Case("own", make, **options)


class Attention(nn.Module):
    """Projections called as modules, so that the reference sees them."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 4), nn.LayerNorm(4)
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        y = self.norm(self.tokens(x))
        weights = (self.query(y) @ self.key(y).mT).softmax(dim=-1)
        return self.out((weights @ self.value(y)).tanh())


class TiedTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.tokens(x).tanh())


class Pooled(nn.Module):
    """A deep linear network that averages its positions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x)).mean(dim=1)


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, (1, 2), bias=False, dilation=1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return model, (rows(2, 5, 7), labels())


OWN = {
    "attention": made(lambda: (Attention(), (torch.randint(11, (N, 4)), labels(4)))),
    "long sequences of a small layer": made(lambda: (Attention(), (torch.randint(11, (N, 13)), labels(13)))),
    "tied tokens": made(lambda: (TiedTokens(), (torch.randint(6, (N, 3)), torch.randint(6, (N, 3))))),
    "convolutions": made(convolutional),
}


def check(problem, solver, dampings=DAMPINGS, rtol=1e-7):
    """Every form of the solver's inverse is that of its dense matrices; returns the state and these."""
    state = solver.prepare(problem.curvature)
    matrices = problem.expected_matrices(state, solver.sharing)
    for damping in dampings:
        shifts = problem.shifts(damping)
        problem.check(state, problem.inverses(matrices, shifts), shifts, rtol)
        expected = sum(
            float(torch.linalg.solve(C + shifts[b] * torch.eye(len(C)), C).trace()) for b, C in matrices.items()
        )
        assert state.effective_dimension(shifts) == pytest.approx(expected, rel=1e-7)
    return state, matrices

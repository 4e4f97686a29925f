"""What each process of a torch.distributed group does in tests: `python grouped.py FOLDER` under torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import refluence as rf

N, K, D_IN, CLASSES = 203, 6, 7, 4
SOLVERS = {
    "sketched": ("fisher", rf.solvers.Sketched(rf.sketches.SJLT(96))),
    "replicated": ("fisher", rf.solvers.Sketched(rf.sketches.Gaussian(48), replicates=2)),
    "wide sketch": ("fisher", rf.solvers.Sketched(rf.sketches.SJLT(512))),
    "sketched ggn": ("ggn", rf.solvers.Sketched(rf.sketches.Gaussian(64))),
    "gram": ("fisher", rf.solvers.Gram()),
    "gram of samples": ("mc_fisher", rf.solvers.Gram()),
    "dense": ("ggn", rf.solvers.Dense()),
    "conjugate gradient": ("hessian", rf.solvers.ConjugateGradient()),
    "ekfac": ("mc_fisher", rf.solvers.Ekfac()),
    "kfac": ("fisher", rf.solvers.Kfac()),
    "arnoldi": ("fisher", rf.solvers.Arnoldi(20)),
    "nystroem": ("ggn", rf.solvers.Nystroem(20)),
    "harmonic mean": ("fisher", rf.solvers.HarmonicMean()),
    "identity": ("fisher", rf.solvers.Identity()),
}


class Tokens(nn.Module):
    """An embedding whose rows differ from part to part, and a head that no example uses."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 5), nn.Linear(5 + D_IN, CLASSES)
        self.unused = nn.Linear(3, 2)

    def forward(self, x):
        tokens, numbers = x[:, :3].abs().mul(9).long().clamp(0, 29), x
        return self.head(torch.cat([self.embedding(tokens).mean(dim=1), numbers], dim=1))


def task():
    torch.manual_seed(0)
    model = Tokens().double()
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return rf.Task(model, forward=lambda model, batch: model(batch[0]), l2=1e-2)


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D_IN, generator=generator).double(), torch.randint(0, CLASSES, (n,), generator=generator)


def weights():
    return torch.rand(N, generator=torch.Generator().manual_seed(5)).double() + 0.5


def fitted(name, **execution):
    curvature, solver = SOLVERS[name]
    influence = rf.Influence(
        task(),
        curvature=curvature,
        solver=solver,
        damping=0.5,
        batch_size=16,
        blocks="module" if name in ("gram", "sketched ggn") else "full",
        progress=False,
        execution=rf.Execution(**execution),
    )
    return influence.fit(data(N, 1), weights=weights())


def results(influence):
    """All that a fit gives, as tensors."""
    tests = data(K, 2)
    scores = influence.score(tests)
    groups = influence.score(tests, groups="class")
    found = {
        "scores": scores.values,
        "groups": groups.values,
        "inverse_hvp": influence.inverse_hvp(tests),
        "norms": torch.tensor([influence.gradient_norm, influence.gradient_rms]),
    }
    if influence.curvature != "hessian":  # else a solve for each train row
        found["self_influence"] = influence.self_influence()
        found["effective_dimension"] = torch.tensor([influence.effective_dimension])
        found["relatif"] = influence.score(tests, normalize="theta-relatif").values
    if scores.error is not None:
        found |= {"error": scores.error, "group_error": groups.error}
    return found


def poisoned(folder):
    """The message of each process where one of them has a bad example."""
    x, y = data(N, 1)
    x[170] = float("nan")
    influence = rf.Influence(task(), solver=SOLVERS["sketched"][1], damping=0.5, batch_size=16, progress=False)
    try:
        influence.fit((x, y))
    except rf.errors.RefluenceError as error:
        (folder / f"poisoned-{dist.get_rank()}.txt").write_text(str(error))


def main(folder):
    dist.init_process_group("gloo")
    found = {}
    for name in SOLVERS:
        influence = fitted(name)
        found[name] = results(influence)
        if name == "sketched":
            found["stored scores"] = influence.score(data(K, 2), out=folder / "scores").load().values
            influence.save(folder / "fit")
            found["rows here"] = torch.tensor([influence._fitted().rows.parts.part.rows.n])
    first = fitted("sketched", store=folder / "store", shard_rows=32)
    again = fitted("sketched", store=folder / "store")
    found["stored"] = {"scores": again.score(data(K, 2)).values}
    found["store"] = [fit.diagnostics["store"] for fit in (first, again)]
    poisoned(folder)
    torch.save(found, folder / f"found-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

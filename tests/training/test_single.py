import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import DataError, TaskError
from refluence.training import Recipe, fresh_model, stream, train, train_together
from refluence.training.single import batches_of, own_randomness
from training.architectures import BRANCHING, CASES, NOISY, PartlyFrozen

MLP = CASES["mlp with dropout"]


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def reference(build, data, optimizer, epochs, batch_size, seed, schedule=None, clip=None):
    """Training as PyTorch's own loop does it."""
    x, y = data
    shuffle = torch.Generator().manual_seed(stream(seed, "shuffle"))
    torch.manual_seed(seed)
    model = build()
    stepper = optimizer(model.parameters())
    scheduler = None if schedule is None else schedule(stepper)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=shuffle).split(batch_size):
            stepper.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            stepper.step()
            if scheduler is not None:
                scheduler.step()
    return model


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        (
            Recipe(0.1, 3, 5, momentum=0.9, l2=0.02),
            {"optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.02)},
        ),
        (
            Recipe(0.1, 3, 5, momentum=0.9, schedule="cosine"),
            {
                "optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
                "schedule": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 15),
            },
        ),
        (
            Recipe(0.01, 3, 5, optimizer="adam", l2=0.1, clip=0.1),
            {"optimizer": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1), "clip": 0.1},
        ),
        (
            Recipe(0.01, 3, 5, optimizer="adamw", weight_decay=0.1, schedule="linear"),
            {
                "optimizer": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
                "schedule": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1, 0, 15),
            },
        ),
    ],
    ids=["momentum and l2", "cosine", "adam, l2, clip", "adamw, linear"],
)
def test_training_is_that_of_pytorch(recipe, arguments):
    with torch.random.fork_rng():
        expected = reference(plain, MLP.data, epochs=3, batch_size=5, seed=4, **arguments)
    model = train(rf.Task(plain()), MLP.data, recipe, build=plain, seed=4, progress=False)
    for mine, own in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-10)
    assert not model.training


@pytest.mark.parametrize("case", [MLP, NOISY, BRANCHING], ids=["dropout", "noise", "branching"])
def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state(case):
    recipe, task = Recipe(0.1, 2, 5), case.task()
    before = torch.random.get_rng_state()
    first = train(task, case.data, recipe, build=case.build, seed=5, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(10)  # what the user draws in between does not matter
    second = train(task, case.data, recipe, build=case.build, seed=5, progress=False)
    other = train(task, case.data, recipe, build=case.build, seed=6, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError):
        train(task, (case.data[0][:, :3], case.data[1]), recipe, build=case.build, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_keeps_the_share_that_it_should():
    """The mean over many masks of what passes a dropout of 0.3 is what goes in."""
    seen = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            if self.training:
                seen.append(F.dropout(torch.ones(500), 0.3))
            return self.linear(x)

    model = Watch()
    data = (torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))
    train(rf.Task(model), data, Recipe(0.1, 20, 4), progress=False)
    values = torch.stack(seen)
    assert values.shape == (40, 500)
    assert values.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert values.mean() == pytest.approx(1.0, abs=5 * (0.3 / 0.7 / values.numel()) ** 0.5)
    assert (values.mean(dim=0) < 1.43).all()  # no entry that is always kept


def test_rows_are_the_subset():
    rows = torch.tensor([3, 1, 20, 7, 8])
    recipe = Recipe(0.1, 3, 2)
    subset = tuple(column[rows] for column in MLP.data)
    of_rows = train(MLP.task(), MLP.data, recipe, build=MLP.build, rows=rows, progress=False)
    of_subset = train(MLP.task(), subset, recipe, build=MLP.build, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(of_rows.parameters(), of_subset.parameters(), strict=True))
    with pytest.raises(DataError, match="no rows"):
        train(MLP.task(), MLP.data, recipe, rows=[], progress=False)


def test_steps_stop_within_an_epoch():
    seven = train(MLP.task(), MLP.data, Recipe(0.1, 1, 4, steps=7), build=plain, progress=False)
    two_epochs = train(MLP.task(), MLP.data, Recipe(0.1, 2, 4, steps=7), build=plain, progress=False)
    six = train(MLP.task(), MLP.data, Recipe(0.1, 1, 4), build=plain, progress=False)  # 23 rows
    assert torch.equal(seven[0].weight, two_epochs[0].weight)
    assert not torch.equal(seven[0].weight, six[0].weight)


def test_a_fresh_model_draws_like_a_new_one():
    for case in CASES.values():
        torch.manual_seed(3)
        new = case.build()
        trained = copy.deepcopy(new)
        with torch.no_grad():
            for tensor in (*trained.parameters(), *trained.buffers()):
                tensor.add_(1)
        torch.manual_seed(3)
        fresh = fresh_model(trained)
        kept = {name for name, parameter in new.named_parameters() if not parameter.requires_grad}
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, trained.state_dict()[name]) == (name in kept)


def test_a_fresh_model_equals_the_one_that_the_seed_builds():
    torch.manual_seed(3)
    new = plain().float()
    torch.manual_seed(4)
    other = plain().float()
    assert not torch.equal(new[0].weight, other[0].weight)
    torch.manual_seed(3)
    fresh = fresh_model(other)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), new.parameters(), strict=True))


def test_frozen_parameters_stay_and_batch_statistics_do_not():
    frozen = PartlyFrozen()
    fresh = fresh_model(frozen)
    assert torch.equal(fresh.features.weight, frozen.features.weight)
    assert not torch.equal(fresh.linear.weight, frozen.linear.weight)
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3) + 5)
    assert torch.equal(fresh_model(norm).running_mean, torch.zeros(3))


def test_a_module_that_cannot_be_drawn_anew_is_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(TaskError, match=r"'1' \(Own\).*\(scale\).*give `build`"):
        fresh_model(nn.Sequential(nn.Linear(2, 3), Own()))


@pytest.mark.parametrize(
    ("rows", "message"),
    [(torch.arange(40) >= 20, "mask.nonzero"), ([3, -1], "row -1"), ([40], "row 40"), ([], "no rows")],
)
def test_rows_that_are_no_rows(rows, message):
    data = torch.randn(40, 3), torch.zeros(40, dtype=torch.int64)
    with pytest.raises(DataError, match=message):
        train(rf.Task(nn.Linear(3, 2)), data, Recipe(0.1, 1, 8), rows=rows, progress=False)


class SharedGradients(nn.Module):
    """The gradients of a and b are one tensor, and that of c is one number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(3)) for _ in range(3))

    def forward(self, x):
        return (self.linear(x) + (self.a + self.b)) * self.c.sum()


@pytest.mark.parametrize(
    "recipe", [Recipe(0.1, 2, 8, clip=0.05), Recipe(0.01, 2, 8, optimizer="adamw", l2=0.5)], ids=["clip", "adamw's l2"]
)
def test_gradients_that_share_memory_are_changed_once(recipe):
    def build():
        return SharedGradients().double()

    data = torch.randn(24, 4).double(), torch.randint(0, 3, (24,))
    with own_randomness(5):
        model = build()
    settings = {"weight_decay": 0.0} if recipe.optimizer == "adamw" else {}
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe.optimizer](
        model.parameters(), recipe.learning_rate, **settings
    )
    for (rows,) in batches_of([torch.arange(24)], recipe, [5]):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for parameter in model.parameters():
            parameter.grad = parameter.grad + recipe.l2 * parameter.detach()
        optimizer.step()
    expected = model.state_dict()
    alone = train(rf.Task(build()), data, recipe, build=build, seed=5, progress=False)
    [(_, together)] = train_together(
        rf.Task(build()), data, [torch.arange(24)] * 2, [5, 6], recipe, build=build, together=2, progress=False
    )
    for name, value in expected.items():
        torch.testing.assert_close(alone.state_dict()[name], value)
        torch.testing.assert_close(together[name][0], value)

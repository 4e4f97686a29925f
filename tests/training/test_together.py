import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import DataError
from refluence.training import Recipe, train, train_together
from refluence.training.together import Trainer
from training.architectures import BRANCHING, CASES, NOISY, ROWS

SGD = Recipe(0.05, 3, 4, momentum=0.9, l2=0.01)
RECIPES = {
    "plain": Recipe(0.05, 3, 4),
    "momentum, l2, cosine": Recipe(0.05, 3, 4, momentum=0.9, l2=0.05, schedule="cosine"),
    "warm-up, linear, clipped": Recipe(0.2, 3, 4, momentum=0.5, schedule="linear", final_share=0.1, warmup=4, clip=0.3),
    "adam": Recipe(0.01, 3, 4, optimizer="adam", betas=(0.8, 0.95), epsilon=1e-6, l2=0.05, clip=0.5),
    "adamw": Recipe(0.01, 3, 4, optimizer="adamw", weight_decay=0.1, l2=0.03, schedule="cosine"),
    "steps": Recipe(0.05, 99, 4, steps=7),
}
MODELS = 5


def subsets(count=MODELS, size=9):
    """Some rows: 9 leave a last batch of one, 11 of three."""
    return [torch.randperm(ROWS, generator=torch.Generator().manual_seed(s))[:size] for s in range(count)]


def trained_alone(case, rows, seed, recipe):
    model = train(case.task(), case.data, recipe, build=case.build, rows=rows, seed=seed, progress=False)
    return dict([*model.named_parameters(), *model.named_buffers()])


def trained_together(case, rows, seeds, recipe, **settings):
    states = {}
    for models, stacked in train_together(
        case.task(), case.data, rows, seeds, recipe, build=case.build, progress=False, **settings
    ):
        for k, i in enumerate(models):
            states[i] = {name: tensor[k] for name, tensor in stacked.items()}
    return [states[i] for i in range(len(rows))]


def assert_alike(states, others, tolerance=1e-9):
    assert states.keys() == others.keys()
    for name, tensor in states.items():
        torch.testing.assert_close(tensor, others[name].detach(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_the_same_together_as_alone(name):
    case, rows, seeds = CASES[name], subsets(size=11), [3, 1, 4, 1, 5]
    trainer = Trainer(case.task(), case.data, rows, seeds, SGD, build=case.build)
    assert trainer.grouping.together, trainer.grouping.reason
    together = trained_together(case, rows, seeds, SGD)
    for i in (0, 2, 4):
        assert_alike(together[i], trained_alone(case, rows[i], seeds[i], SGD))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_the_same_together_as_alone(name):
    case, rows = CASES["mlp with dropout"], subsets(size=8)
    together = trained_together(case, rows, range(MODELS), RECIPES[name])
    for i in range(MODELS):
        assert_alike(together[i], trained_alone(case, rows[i], i, RECIPES[name]))


@pytest.mark.parametrize("name", ["mlp with dropout", "convolutions and batch norms"])
def test_a_model_does_not_depend_on_its_group(name):
    case, rows = CASES[name], subsets(size=11)
    whole = trained_together(case, rows, range(MODELS), SGD)
    pairs = trained_together(case, rows[1:], range(1, MODELS), SGD, together=2)
    for i in range(1, MODELS):
        assert_alike(whole[i], pairs[i - 1])


def test_subsets_of_different_sizes():
    case = CASES["mlp with dropout"]
    rows = [torch.arange(k) for k in (1, 9, 4, 9, ROWS)]
    together = trained_together(case, rows, range(MODELS), SGD)
    for i in range(MODELS):
        assert_alike(together[i], trained_alone(case, rows[i], i, SGD))


@pytest.mark.parametrize(("case", "why"), [(NOISY, "random numbers"), (BRANCHING, "vmap cannot follow")])
def test_what_cannot_be_trained_together_is_trained_alone(case, why):
    rows = subsets(3)
    trainer = Trainer(case.task(), case.data, rows, range(3), SGD, build=case.build)
    assert not trainer.grouping.together
    assert why in trainer.grouping.reason
    states = trained_together(case, rows, range(3), SGD)
    for i in range(3):
        assert_alike(states[i], trained_alone(case, rows[i], i, SGD), tolerance=0)


def test_a_data_set_that_is_read_row_by_row():
    case = CASES["mlp with dropout"]
    samples = [(x, y) for x, y in zip(*case.data, strict=True)]
    listed = trained_together(type(case)(case.build, samples), subsets(), range(MODELS), SGD)
    for one, other in zip(listed, trained_together(case, subsets(), range(MODELS), SGD), strict=True):
        assert_alike(one, other, tolerance=0)


def test_threads_do_not_change_the_models():
    case = CASES["mlp with dropout"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = trained_together(case, subsets(size=11), range(MODELS), SGD, together=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for one, other in zip(two, trained_together(case, subsets(size=11), range(MODELS), SGD), strict=True):
        assert_alike(one, other)


@pytest.mark.parametrize("name", ["mlp with dropout", "convolutions and batch norms", "attention, tied, dict"])
def test_nothing_of_the_user_changes(name):
    case = CASES[name]
    task = case.task()
    task.model.eval()
    kept = {key: value.clone() for key, value in task.model.state_dict().items()}
    before = torch.random.get_rng_state()
    list(train_together(task, case.data, subsets(size=11), range(MODELS), SGD, progress=False))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not task.model.training
    assert all(parameter.grad is None for parameter in task.model.parameters())
    for key, value in task.model.state_dict().items():
        assert torch.equal(value, kept[key])


def test_the_iteration_can_be_left_early():
    case = CASES["mlp with dropout"]
    states = train_together(case.task(), case.data, subsets(), range(MODELS), SGD, together=1, progress=False)
    assert next(states)[0] == [0]
    states.close()
    states = train_together(case.task(), case.data, subsets(), range(MODELS), SGD, together=2, progress=False)
    assert len(next(states)[0]) == 2
    states.close()


def test_an_error_in_training_comes_out():
    case = CASES["mlp with dropout"]

    def loss(output, batch):
        return torch.linalg.cholesky(output.T @ output - 100 * torch.eye(3, dtype=output.dtype)).sum() + output[:, 0]

    with pytest.raises(RuntimeError, match="cholesky"):
        trained_together(type(case)(case.build, case.data, loss), subsets(), range(MODELS), SGD)


@pytest.mark.parametrize(
    ("rows", "seeds", "settings", "message"),
    [
        ([], [], {}, "every model needs rows and a seed"),
        ([[0]], [1, 2], {}, "1 of rows and 2 of seeds"),
        ([[0], []], [1, 2], {}, "model 1 has no rows"),
        ([[0, ROWS]], [1], {}, f"row {ROWS}"),
        ([[0]], [1], {"together": 0}, "together must be at least 1"),
    ],
)
def test_refusals(rows, seeds, settings, message):
    case = CASES["mlp with dropout"]
    with pytest.raises(DataError, match=message):
        train_together(case.task(), case.data, rows, seeds, SGD, progress=False, **settings)


def test_two_different_l2_are_refused_and_either_is_the_objective():
    case = CASES["custom loss on three columns"]
    with_l2 = rf.Task(case.build(), loss=case.loss, l2=0.01)
    with pytest.raises(DataError, match="l2"):
        train(with_l2, case.data, Recipe(0.05, 3, 4, l2=0.02), progress=False)
    of_task = train(with_l2, case.data, Recipe(0.05, 3, 4), build=case.build, progress=False)
    of_recipe = train(case.task(), case.data, Recipe(0.05, 3, 4, l2=0.01), build=case.build, progress=False)
    neither = train(case.task(), case.data, Recipe(0.05, 3, 4), build=case.build, progress=False)
    assert torch.equal(of_task.weight, of_recipe.weight)
    assert not torch.equal(of_task.weight, neither.weight)


def test_a_model_without_trained_parameters_is_refused():
    case = CASES["mlp with dropout"]
    with pytest.raises(DataError, match="requires grad"):
        train_together(
            case.task(), case.data, subsets(), range(MODELS), SGD,
            build=lambda: nn.Linear(6, 3).double().requires_grad_(False), progress=False,
        )  # fmt: skip


def test_a_state_of_another_objective_is_not_taken_up(tmp_path, monkeypatch):
    from refluence.training import workers
    from refluence.training.group import Group

    monkeypatch.setattr(workers, "SAVE_SECONDS", 0.0)
    data = torch.randn(20, 3), torch.zeros(20, dtype=torch.int64)
    rows, recipe = [torch.arange(10), torch.arange(10, 20)], Recipe(0.1, 4, 5)

    def start(l2):
        return train_together(
            rf.Task(nn.Linear(3, 2), l2=l2), data, rows, [0, 1], recipe, path=tmp_path, progress=False
        )

    models, _ = next(start(0.0))  # closed before it is asked for more, as by a kill
    assert models == [0, 1]
    assert list(tmp_path.glob("training-*"))
    resumed = []
    resume = Group.resume
    monkeypatch.setattr(Group, "resume", lambda group, folder: (resume(group, folder), resumed.append(group.done)))
    list(start(0.5))
    list(start(0.0))
    assert resumed == [0, 8]

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from refluence.task import Task
from refluence.training import Recipe
from refluence.zoo import checkpoints
from refluence.zoo.fit import Fit

RECIPE = Recipe(learning_rate=0.1, epochs=1, batch_size=8)
MEASURED = checkpoints.Measured(Fit(0.25, 0.75), Fit(0.5, 1 / 3), "hash of the test rows")


class Tied(nn.Module):
    """An embedding and a linear layer that share one weight, and a layer with buffers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens).mean(1)))


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = Tied()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.train()(torch.randint(6, (20, 3)))  # moves the running statistics
    return model.eval()


def training(network, /, **changes):
    made = checkpoints.Training(
        "digits", "tied", checkpoints.architecture(network), Task(network).describe(), RECIPE, seed=0, data="hash"
    )
    return dataclasses.replace(made, **changes)


def test_tied_weights_and_buffers_come_back_exactly(cache, trained):
    made = training(trained)
    path = checkpoints.save(made, trained, MEASURED)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert "embedding.weight" in names
    assert "head.weight" not in names  # written once
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} <= names
    other = Tied()
    assert checkpoints.load_into(other, made) == MEASURED
    assert other.head.weight is other.embedding.weight
    assert not other.training
    for name, value in trained.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_nothing_saved_is_nothing_loaded(cache, trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    assert checkpoints.load_into(trained, training(trained)) is None
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


OTHERS = {
    "learning_rate": 0.2,
    "epochs": 2,
    "batch_size": 9,
    "optimizer": "adam",
    "momentum": 0.5,
    "betas": (0.8, 0.999),
    "epsilon": 1e-6,
    "l2": 0.1,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "final_share": 0.1,
    "warmup": 3,
    "clip": 1.0,
    "steps": 5,
}


def test_every_setting_of_a_recipe_makes_another_fingerprint(trained):
    assert set(OTHERS) == {field.name for field in dataclasses.fields(Recipe)}
    base = dataclasses.replace(RECIPE, optimizer="sgd")
    prints = {training(trained).fingerprint}
    for name, value in OTHERS.items():
        optimizer = {"optimizer": "adamw"} if name == "weight_decay" else {}
        prints.add(training(trained, recipe=dataclasses.replace(base, **{name: value, **optimizer})).fingerprint)
    assert len(prints) == len(OTHERS) + 1


def test_names_layout_task_seed_data_and_device_make_another_fingerprint(trained):
    smaller = nn.Sequential(nn.Embedding(6, 4))
    prints = {
        training(trained, **change).fingerprint
        for change in (
            {},
            {"dataset": "mnist"},
            {"model": "other"},
            {"architecture": checkpoints.architecture(smaller)},
            {"task": Task(trained, "mse").describe()},
            {"seed": 1},
            {"data": "other"},
            {"device": "cuda"},
        )
    }
    assert len(prints) == 8


def test_shapes_that_a_module_does_not_print_are_part_of_the_layout():
    class Silent(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(n))

    assert str(Silent(3)) == str(Silent(4))
    assert checkpoints.architecture(Silent(3)) != checkpoints.architecture(Silent(4))


def test_a_checkpoint_says_what_made_it(cache, trained):
    made = training(trained)
    with safe_open(checkpoints.save(made, trained, MEASURED), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["training"])["recipe"]["learning_rate"] == 0.1
    assert metadata["fingerprint"] == made.fingerprint
    assert metadata["torch"] == torch.__version__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_the_hash_is_of_the_values_and_their_type(dtype):
    values = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    first = checkpoints.tensors_hash({"a": values})
    assert first == checkpoints.tensors_hash({"a": values.T.contiguous().T})
    changed = values.clone()
    changed[0, 0] = 1
    others = [{"a": changed}, {"b": values}, {"a": values.reshape(4)}, {"a": values.to(torch.float64)}]
    assert first not in map(checkpoints.tensors_hash, others)


def test_empty_and_scalar_tensors_have_hashes():
    assert checkpoints.tensors_hash({"a": torch.tensor(1)}) != checkpoints.tensors_hash({"a": torch.tensor(2)})
    assert checkpoints.tensors_hash({"a": torch.zeros(0, 2)}) != checkpoints.tensors_hash({"a": torch.zeros(0, 3)})

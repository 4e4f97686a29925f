import copy

import pytest
import torch
import torch.nn.functional as F

from refluence.zoo import build_model, load_dataset
from refluence.zoo.training import Recipe, evaluate, recipe_for, stream, train

SHORT = Recipe(learning_rate=0.05, momentum=0.9, epochs=2, batch_size=64)


def build():
    return build_model("mnist", "mlp")  # with dropout


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(150, 1, 28, 28, generator=generator), torch.randint(0, 10, (150,), generator=generator)


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state(data):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = train(build, data, SHORT, seed=5, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(10)  # what the user draws in between does not matter
    second = train(build, data, SHORT, seed=5, progress=False)
    other = train(build, data, SHORT, seed=6, progress=False)
    assert torch.equal(parameters(first), parameters(second))
    assert not torch.equal(parameters(first), parameters(other))
    assert not first.training
    assert all(parameter.grad is None for parameter in first.parameters())


def test_the_random_state_is_given_back_after_an_error(data):
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError):
        train(build, (data[0][:, :, :5], data[1]), SHORT, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_l2_is_that_of_the_task_objective(data):
    """One step on the whole set is θ − lr·∇(mean loss + (l2/2)·‖θ‖²)."""
    inputs, labels = data
    start = build_model("mnist", "lr")
    model = train(
        lambda: copy.deepcopy(start), data, Recipe(0.1, 0.0, epochs=1, batch_size=150, l2=0.3), progress=False
    )
    objective = F.cross_entropy(start(inputs), labels) + 0.15 * sum((p**2).sum() for p in start.parameters())
    objective.backward()
    expected = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in start.parameters()])
    torch.testing.assert_close(parameters(model), expected)


@pytest.mark.parametrize(("model", "accuracy"), [("mlp", 0.96), ("lr", 0.94), ("cnn", 0.96)])
def test_digits_are_learnt(model, accuracy):
    split = load_dataset("digits")
    network = train(lambda: build_model("digits", model), split.train, recipe_for("digits", model), progress=False)
    assert evaluate(network, split.test).accuracy >= accuracy
    assert evaluate(network, split.train).loss < 0.2


def test_each_purpose_has_a_seed_of_its_own():
    assert len({stream(seed, purpose) for seed in range(50) for purpose in ("shuffle", "label noise")}) == 100

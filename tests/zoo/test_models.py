import pytest
import torch

from refluence.errors import DataError
from refluence.zoo import build_model, model_names
from refluence.zoo.training import recipe_for


@pytest.mark.parametrize(
    ("dataset", "model", "parameters"),
    [
        ("digits", "mlp", 4_810),
        ("digits", "lr", 650),
        ("digits", "cnn", 1_898),
        ("mnist", "mlp", 109_386),
        ("mnist", "lr", 7_850),
        ("mnist", "cnn", 9_098),
    ],
)
def test_parameters_and_shapes(dataset, model, parameters):
    network = build_model(dataset, model).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    side = {"digits": 8, "mnist": 28}[dataset]
    assert network(torch.zeros(3, 1, side, side)).shape == (3, 10)
    assert recipe_for(dataset, model).epochs > 0


def test_the_published_recipes():
    mlp, lr = recipe_for("mnist", "mlp"), recipe_for("mnist", "lr")
    assert (mlp.learning_rate, mlp.momentum, mlp.epochs, mlp.batch_size) == (0.01, 0.9, 50, 64)
    assert (lr.learning_rate, lr.momentum, lr.epochs, lr.batch_size) == (0.01, 0, 20, 32)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(DataError, match=r"'gpt'.*mlp, lr, cnn"):
        build_model("digits", "gpt")
    with pytest.raises(DataError, match=r"'nothing'.*digits, mnist"):
        model_names("nothing")


def test_a_negative_l2():
    with pytest.raises(DataError, match="l2"):
        recipe_for("digits", "mlp", l2=-1.0)

import pytest

from refluence.errors import DataError
from refluence.training import train
from refluence.zoo import build_model, load_dataset
from refluence.zoo.fit import evaluate
from refluence.zoo.models.catalogue import _MODELS
from refluence.zoo.recipes import _RECIPES, recipe_for
from refluence.zoo.tasks import task_for


def test_every_model_has_a_recipe():
    assert {name: set(models) for name, models in _MODELS.items()} == {
        name: set(recipes) for name, recipes in _RECIPES.items()
    }


def test_the_published_recipes():
    mlp, lr, resnet = recipe_for("mnist", "mlp"), recipe_for("mnist", "lr"), recipe_for("cifar2", "resnet9")
    assert (mlp.learning_rate, mlp.momentum, mlp.epochs, mlp.batch_size) == (0.01, 0.9, 50, 64)
    assert (lr.learning_rate, lr.momentum, lr.epochs, lr.batch_size) == (0.01, 0, 20, 32)
    assert (resnet.learning_rate, resnet.momentum, resnet.epochs, resnet.batch_size) == (0.01, 0.9, 10, 64)
    for recipe in (mlp, lr, resnet):
        assert (recipe.optimizer, recipe.schedule, recipe.l2, recipe.steps) == ("sgd", "constant", 0, None)
    music = recipe_for("maestro", "musictransformer")
    assert (music.optimizer, music.learning_rate, music.betas, music.epsilon) == ("adam", 1e-4, (0.9, 0.98), 1e-8)
    assert (music.epochs, music.batch_size, music.schedule) == (20, 64, "constant")
    nano = recipe_for("shakespeare", "nanogpt")
    assert (nano.optimizer, nano.betas, nano.weight_decay, nano.clip) == ("adamw", (0.9, 0.99), 0.1, 1.0)
    assert (nano.warmup, nano.total_steps(3921), nano.batch_size) == (100, 5000, 32)
    assert nano.step_size(99, 5000) == pytest.approx(1e-3)
    assert nano.step_size(5000, 5000) == pytest.approx(1e-4)


def test_epochs_or_steps_for_a_quick_run():
    assert recipe_for("shakespeare", "nanogpt", epochs=2).total_steps(3921) == 2 * 123
    assert recipe_for("shakespeare", "nanogpt", steps=7).total_steps(3921) == 7
    assert recipe_for("mnist", "mlp", steps=7).total_steps(5000) == 7
    with pytest.raises(DataError, match="not both"):
        recipe_for("mnist", "mlp", epochs=1, steps=1)
    with pytest.raises(DataError, match="epochs"):
        recipe_for("mnist", "mlp", epochs=0)


def test_the_l2_of_the_recipe_or_another():
    assert recipe_for("mnist", "all_cnn").l2 == 1e-3
    assert recipe_for("mnist", "all_cnn", l2=0.0).l2 == 0
    assert recipe_for("mnist", "mlp", l2=0.5).l2 == 0.5
    with pytest.raises(DataError, match="l2"):
        recipe_for("digits", "mlp", l2=-1.0)


@pytest.mark.parametrize(("model", "accuracy"), [("mlp", 0.96), ("lr", 0.94), ("cnn", 0.96)])
def test_digits_are_learnt(model, accuracy):
    split = load_dataset("digits")
    task = task_for(model, build_model("digits", model))
    trained = task_for(model, train(task, split.train, recipe_for("digits", model), progress=False))
    assert evaluate(trained, split.test).accuracy >= accuracy
    assert evaluate(trained, split.train).loss < 0.2

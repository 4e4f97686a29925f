"""What a task differentiates: losses, measurements, forward passes and the choice of parameters."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import TaskError


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def classes(*shape):
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- losses


def test_cross_entropy_is_that_of_torch():
    logits, y = random(6, 3), classes(6)
    expected = F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(rf.Task(mlp()).losses(logits, (None, y)), expected)


def test_cross_entropy_of_sequences_is_the_mean_over_an_examples_own_counting_targets():
    logits, y = random(4, 6, 3), classes(4, 6)
    y[0, 2:] = -100
    y[2] = -100
    losses = rf.Task(mlp()).losses(logits, (None, y))
    for i in (0, 1, 3):
        torch.testing.assert_close(losses[i], F.cross_entropy(logits[i], y[i], ignore_index=-100))
    assert losses[2] == 0


def test_cross_entropy_takes_classes_last_for_images_too():
    logits, y = random(4, 2, 5, 3), classes(4, 2, 5)
    expected = F.cross_entropy(logits.movedim(-1, 1), y, reduction="none").mean(dim=(1, 2))
    torch.testing.assert_close(rf.Task(mlp()).losses(logits, (None, y)), expected)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (5, 2, 3)])
def test_mse_is_the_mean_over_an_examples_outputs(shape):
    output, y = random(*shape), random(*shape) + 1
    expected = F.mse_loss(output, y, reduction="none").reshape(5, -1).mean(dim=1)
    torch.testing.assert_close(rf.Task(mlp(), "mse").losses(output, (None, y)), expected)


def test_mse_takes_targets_without_the_last_dimension_of_one():
    output, y = random(5, 1), random(5) + 1
    expected = (output[:, 0] - y) ** 2
    torch.testing.assert_close(rf.Task(mlp(), "mse").losses(output, (None, y)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_binary_cross_entropy_is_on_logits(dtype):
    output, y = random(5, 2), (classes(5, 2) > 0).to(dtype)
    expected = F.binary_cross_entropy(output.sigmoid(), y.double(), reduction="none").mean(dim=1)
    torch.testing.assert_close(rf.Task(mlp(), "binary_cross_entropy").losses(output, (None, y)), expected)


# ---------------------------------------------------------------- measurements


def test_the_measurement_is_the_loss_unless_another_is_given():
    output, batch = random(6, 3), (None, classes(6))
    for measurement in (None, "loss"):
        task = rf.Task(mlp(), measurement=measurement)
        assert torch.equal(task.measurements(output, batch), task.losses(output, batch))


def test_margin_is_minus_the_log_odds_of_the_target():
    output, y = random(6, 3), classes(6)
    p = output.softmax(dim=1)[torch.arange(6), y]
    values = rf.Task(mlp(), measurement="margin").measurements(output, (None, y))
    torch.testing.assert_close(values, -(p / (1 - p)).log())


def test_margin_is_finite_where_the_probability_rounds_to_one():
    output = torch.tensor([[80.0, 0.0, 1.0]])
    values = rf.Task(mlp(), measurement="margin").measurements(output, (None, torch.tensor([0])))
    torch.testing.assert_close(values, torch.tensor([-80.0 + torch.logaddexp(torch.tensor(0.0), torch.tensor(1.0))]))


def test_logit_is_minus_the_targets_logit():
    output, y = random(6, 3), classes(6)
    values = rf.Task(mlp(), measurement="logit").measurements(output, (None, y))
    assert torch.equal(values, -output[torch.arange(6), y])


@pytest.mark.parametrize("measurement", ["margin", "logit"])
def test_margin_and_logit_of_sequences_are_means_over_counting_targets(measurement):
    task = rf.Task(mlp(), measurement=measurement)
    output, y = random(2, 4, 3), classes(2, 4)
    y[0, 1:] = -100
    values = task.measurements(output, (None, y))
    torch.testing.assert_close(values[:1], task.measurements(output[:1, 0], (None, y[:1, 0])))
    torch.testing.assert_close(values[1], task.measurements(output[1], (None, y[1])).mean())


@pytest.mark.parametrize("measurement", ["margin", "logit"])
def test_margin_and_logit_of_binary_targets_are_minus_the_log_odds(measurement):
    output, y = random(6), torch.tensor([0, 1, 1, 0, 1, 0])
    p = torch.where(y == 1, output.sigmoid(), 1 - output.sigmoid())
    values = rf.Task(mlp(), "binary_cross_entropy", measurement=measurement).measurements(output, (None, y))
    torch.testing.assert_close(values, -(p / (1 - p)).log())


# ---------------------------------------------------------------- forward


def test_the_default_forward_takes_the_first_element_of_a_tuple():
    model, x = mlp(), random(5, 4)
    assert torch.equal(rf.Task(model).output(model, (x, classes(5))), model(x))


def test_the_default_forward_takes_a_dict_without_labels_and_reads_logits():
    class Model(nn.Linear):
        def forward(self, a, b):
            return SimpleNamespace(logits=super().forward(a + b))

    model, batch = Model(4, 3).double(), {"a": random(5, 4), "b": random(5, 4), "labels": classes(5)}
    task = rf.Task(model)
    output = task.output(model, batch)
    assert torch.equal(output, F.linear(2 * batch["a"], model.weight, model.bias))
    torch.testing.assert_close(task.losses(output, batch), F.cross_entropy(output, batch["labels"], reduction="none"))


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("0.weight", "0.bias", "2.weight", "2.bias")),
        ("2.*", ("2.weight", "2.bias")),
        (["2.bias", "0.weight"], ("0.weight", "2.bias")),
        (("*.bias", "0.*"), ("0.weight", "0.bias", "2.bias")),
        (lambda name, parameter: parameter.ndim == 2, ("0.weight", "2.weight")),
    ],
)
def test_parameters_are_chosen_by_name_glob_or_predicate_in_the_models_order(choice, expected):
    assert rf.Task(mlp(), parameters=choice).parameter_names() == expected


def test_frozen_parameters_are_left_out_unless_named():
    model = mlp()
    model[0].requires_grad_(False)
    assert rf.Task(model).parameter_names() == ("2.weight", "2.bias")
    assert rf.Task(model, parameters="0.weight").parameter_names() == ("0.weight",)


def test_a_tied_weight_appears_once_and_is_found_by_either_name():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert rf.Task(model).parameter_names() == ("a.weight", "a.bias", "b.bias")
    assert rf.Task(model, parameters="b.weight").parameter_names() == ("a.weight",)


def test_a_choice_given_as_an_iterator_lasts():
    task = rf.Task(mlp(), parameters=iter(["0.bias"]))
    assert task.parameter_names() == task.parameter_names() == ("0.bias",)


def test_the_description_is_json_and_tells_functions_apart():
    def loss(output, batch):
        return output.sum(dim=1)

    first, second = (rf.Task(mlp(), f).describe() for f in (loss, lambda output, batch: output.mean(dim=1)))
    assert json.loads(json.dumps(first)) == first
    assert first["loss"] != second["loss"]
    assert first["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


# ---------------------------------------------------------------- errors


def frozen():
    return mlp().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rf.Task(mlp(), "entropy"), ["'entropy'", "cross_entropy", "f(output, batch)"]),
        (lambda: rf.Task(mlp(), l2=-0.5), ["l2", "-0.5"]),
        (lambda: rf.Task(mlp(), l2=float("nan")), ["l2", "nan"]),
        (lambda: rf.Task(mlp(), measurement="odds"), ["'odds'", "margin", "logit"]),
        (lambda: rf.Task(mlp(), "mse", measurement="margin"), ["'margin'", "'mse'"]),
        (lambda: rf.Task(mlp(), parameters="1.*"), ["'1.*'", "0.weight", "2.bias"]),
        (lambda: rf.Task(mlp(), parameters=["0.weight", "1.weight"]), ["'1.weight'", "0.weight"]),
        (lambda: rf.Task(mlp(), parameters=lambda name, parameter: False), ["no parameter", "`parameters`"]),
        (lambda: rf.Task(mlp(), parameters=[]), ["no parameter", "`parameters`"]),
        (lambda: rf.Task(frozen()), ["requires grad", "unfreeze"]),
        (lambda: rf.Task(nn.ReLU()), ["ReLU", "no parameters"]),
    ],
)
def test_a_task_that_cannot_be_names_what_is_wrong_and_what_there_is(make, words):
    with pytest.raises(TaskError) as error:
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("loss", "output", "batch", "words"),
    [
        ("cross_entropy", random(5, 3), (None, random(5)), ["integer targets", "float64", "(5, 3)"]),
        ("cross_entropy", random(5, 3), (None, random(5, 3)), ["integer targets", "(5, 3)"]),
        ("cross_entropy", random(5, 3), (None, classes(5, 1)), ["(5, 1)", "class last"]),
        ("cross_entropy", random(5, 3, 7), (None, classes(5, 7)), ["(5, 3)", "(5, 7)", "class last"]),
        ("cross_entropy", random(5), (None, classes(5)), ["(5,)", "logits"]),
        ("cross_entropy", {"out": random(5, 3)}, (None, classes(5)), ["dict", "forward"]),
        ("cross_entropy", random(5, 3), (random(5, 4),), ["batch[1]", "one element"]),
        ("cross_entropy", random(5, 3), random(5, 4), ["batch[1]"]),
        ("cross_entropy", random(5, 3), {"x": random(5, 4), "y": classes(5)}, ['batch["labels"]', "['x', 'y']"]),
        ("mse", random(5, 3), (None, random(5)), ["(5, 3)", "(5,)", "reshape"]),
        ("mse", [random(5)], (None, random(5)), ["list", "function"]),
        ("binary_cross_entropy", random(5, 2), (None, classes(5)), ["(5, 2)", "(5,)"]),
        (lambda output, batch: output.sum(), random(5, 3), (None,), ["`loss`", "()", 'reduction="none"']),
        (lambda output, batch: output, random(5, 3), (None,), ["`loss`", "(5, 3)", "(batch,)"]),
        (lambda output, batch: 0.5, random(5, 3), (None,), ["`loss`", "float"]),
    ],
)
def test_outputs_and_targets_that_do_not_fit_are_named_with_their_shapes(loss, output, batch, words):
    with pytest.raises(TaskError) as error:
        rf.Task(mlp(), loss).losses(output, batch)
    for word in words:
        assert word in str(error.value)


def test_a_measurement_that_mixes_the_examples_is_called_a_measurement():
    task = rf.Task(mlp(), measurement=lambda output, batch: output.mean())
    with pytest.raises(TaskError, match="`measurement` must return one value per example"):
        task.measurements(random(5, 3), (None,))

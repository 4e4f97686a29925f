import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import DataError, TaskError
from refluence.evaluation.measuring import measure
from training.architectures import BRANCHING, CASES

M = 3


def stacked(models):
    named = [dict([*model.named_parameters(), *model.named_buffers()]) for model in models]
    return {name: torch.stack([own[name].detach() for own in named]) for name in named[0]}


def inputs_of(data):
    return data["tokens"] if isinstance(data, dict) else data[0]


@pytest.mark.parametrize("name", [*CASES, "branching"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_measurements_are_those_of_each_model(name, batch_size):
    case = {**CASES, "branching": BRANCHING}[name]
    task = case.task()
    models = [case.build() for _ in range(M)]
    for model in models:
        for buffer in model.buffers():
            buffer.add_(1)
    if name == "branching":
        batch_size = None  # the model looks at its whole batch
    found = measure(task, stacked(models), case.data, batch_size=batch_size)
    for i, model in enumerate(models):
        model.eval()
        with torch.no_grad():
            expected = task.losses(task.output(model, case.data), case.data)
        torch.testing.assert_close(found["loss"][i], expected)


def test_margin_is_the_log_odds_of_the_label_negated():
    case = CASES["mlp with dropout"]
    models = [case.build() for _ in range(M)]
    found = measure(case.task(), stacked(models), case.data)
    x, y = case.data
    for i, model in enumerate(models):
        p = model.eval()(x).softmax(1).gather(1, y[:, None])[:, 0].detach()
        torch.testing.assert_close(found["margin"][i], -torch.log(p / (1 - p)))
    assert "measurement" not in found


def test_the_own_measurement_of_a_task():
    case = CASES["mlp with dropout"]
    task = rf.Task(case.build(), measurement=lambda output, batch: output[:, 0] * 2)
    models = [case.build() for _ in range(M)]
    found = measure(task, stacked(models), case.data)
    for i, model in enumerate(models):
        torch.testing.assert_close(found["measurement"][i], 2 * model.eval()(case.data[0])[:, 0].detach())


def test_a_loss_given_as_a_function_has_no_margin():
    case = CASES["custom loss on three columns"]
    assert set(measure(case.task(), stacked([case.build()]), case.data)) == {"loss"}


def test_measured_in_the_dtype_of_the_states():
    """float64 states of a float32 model on float32 data are measured in float64, some parameters being the model's."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(9, 6), torch.randint(0, 3, (9,))
    weight = torch.randn(M, 3, 8, dtype=torch.float64)
    found = measure(rf.Task(model), {"2.weight": weight}, (x, y))
    hidden = torch.tanh(F.linear(x.double(), model[0].weight.double(), model[0].bias.double()))
    for i in range(M):
        expected = F.cross_entropy(hidden @ weight[i].T + model[2].bias.double(), y, reduction="none")
        torch.testing.assert_close(found["loss"][i], expected.detach(), rtol=1e-12, atol=1e-12)


def test_the_model_is_left_as_it_was():
    case = CASES["convolutions and batch norms"]
    task = case.task()
    task.model.train()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    measure(task, stacked([case.build()]), case.data)
    assert task.model.training
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_refusals():
    case = CASES["mlp with dropout"]
    states = stacked([case.build()])
    with pytest.raises(TaskError, match="nothing"):
        measure(case.task(), {"nothing": torch.zeros(2, 1)}, case.data)
    with pytest.raises(DataError, match="number of models"):
        measure(case.task(), {}, case.data)
    with pytest.raises(DataError, match="number of models"):
        measure(case.task(), states | {"0.bias": torch.zeros(3, 8)}, case.data)

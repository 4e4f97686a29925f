from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from refluence import Task
from refluence.report.predictions import Verdict, examine
from refluence.report.presentation import Presentation

X = torch.eye(3)


class Table(nn.Module):
    """Gives the rows of a fixed table of outputs, looked up by the one-hot input."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs[x.argmax(dim=1)]


def verdicts(outputs: Any, targets: Any, loss: Any = "cross_entropy", names: Any = None) -> list[Verdict]:
    model = Table(torch.as_tensor(outputs, dtype=torch.float64))
    data = (X.double(), torch.as_tensor(targets))
    found = examine(Task(model, loss=loss), data, range(3), Presentation(class_names=names))
    return [found[row].verdict for row in range(3)]


def test_classes() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.5, 0.3]])
    first, second, _ = verdicts(p.log(), [0, 1, 1], names=["ant", "bee", "cow"])
    assert (first.label, first.prediction, first.correct) == ("ant", "ant", True)
    assert first.loss == pytest.approx(0.35667, abs=1e-4)
    assert (second.label, second.prediction, second.correct) == ("bee", "cow", False)
    first_bar = second.bars[0]
    assert (first_bar.name, first_bar.is_label, first_bar.is_prediction) == ("cow", False, True)
    assert sum(bar.probability for bar in second.bars) == pytest.approx(1)
    assert [bar.name for bar in second.bars if bar.is_label] == ["bee"]


def test_the_label_has_a_bar_even_where_it_is_the_least_probable() -> None:
    logits = torch.arange(9, 0, -1.0).expand(3, 9)
    verdict = verdicts(logits, [8, 8, 0])[0]
    assert [bar.name for bar in verdict.bars] == ["0", "1", "2", "3", "8"]
    assert verdict.correct is False


def test_one_class_and_ignored_targets() -> None:
    assert verdicts(torch.zeros(3, 1), [0, 0, 0])[0].correct is True
    ignored = verdicts(torch.zeros(3, 2), [-100, 0, 1])[0]
    assert (ignored.label, ignored.correct) == ("", None)


def test_two_classes_from_one_logit() -> None:
    first, second, soft = verdicts([2.0, 2.0, -2.0], [1.0, 0.0, 0.25], "binary_cross_entropy", ["no", "yes"])
    assert (first.label, first.prediction, first.correct) == ("yes", "yes", True)
    assert (second.label, second.prediction, second.correct) == ("no", "yes", False)
    assert first.bars[0].probability == pytest.approx(0.8808, abs=1e-4)
    assert (soft.label, soft.correct) == ("0.250", None)


def test_several_labels() -> None:
    outputs, targets = torch.tensor([[3.0, -3, 3]] * 3), torch.tensor([[1.0, 0, 1], [1, 1, 1], [0, 0, 0]])
    first, second, third = verdicts(outputs, targets, "binary_cross_entropy", ["a", "b", "c"])
    assert (first.label, first.prediction, first.correct) == ("a, c", "a, c", True)
    assert (second.label, second.correct) == ("a, b, c", False)
    assert third.label == "none"


def test_regression_has_values_but_no_right_or_wrong() -> None:
    first = verdicts([1.5, 2.0, 3.0], [1.0, 2.0, 3.0], "mse")[0]
    assert first == Verdict(0.25, "1.00", "1.50")
    many = verdicts(torch.ones(3, 6), torch.zeros(3, 6), "mse")[0]
    assert many.label == "0, 0, 0, 0, …"


def test_sequences() -> None:
    logits = torch.tensor([[[9.0, 0], [9, 0], [9, 0]]] * 3)
    verdict = verdicts(logits, [[0, 1, -100]] * 3)[0]
    assert verdict.correct is None
    assert verdict.prediction.replace("\N{NO-BREAK SPACE}", " ") == "1 of 2 targets right, mean probability 50 %"


def test_a_loss_without_targets_shows_its_value_only() -> None:
    model = Table(torch.tensor([1.0, 2.0, 3.0]))
    task = Task(model, loss=lambda output, batch: output**2)
    assert examine(task, (X,), [2], Presentation())[2].verdict == Verdict(9.0)


def test_a_function_on_logits_is_read_as_a_classifier() -> None:
    def focal(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output, batch[1], reduction="none") * 2

    assert verdicts(torch.eye(3) * 5, [0, 1, 0], focal)[2].correct is False


def test_every_kind_of_data_gives_the_same_and_the_model_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].eval()
    x, y = torch.randn(600, 3), torch.randint(0, 2, (600,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [599, 3, 3, 300]
    results = [
        {row: example.verdict for row, example in examine(Task(model), data, rows, Presentation()).items()}
        for data in ((x, y), TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=7))
    ]
    assert sorted(results[0]) == [3, 300, 599]
    assert results[0] == results[1] == results[2]
    assert model.training
    assert not model[2].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

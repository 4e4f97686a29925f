import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import TaskError
from refluence.zoo.fit import evaluate


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return rf.Task(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train())


def test_mean_loss_and_accuracy_whatever_the_batches(classifier):
    inputs, labels = torch.randn(23, 4), torch.randint(3, (23,))
    logits = classifier.model[0](inputs)
    for batch_size in (1, 5, 64):
        fit = evaluate(classifier, (inputs, labels), batch_size=batch_size)
        assert fit.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
        assert fit.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert classifier.model.training  # given back as it was


def test_sequences_count_the_targets_that_are_there():
    torch.manual_seed(0)
    task = rf.Task(nn.Embedding(5, 5))
    tokens, targets = torch.randint(5, (7, 6)), torch.randint(5, (7, 6))
    targets[0, 2:] = targets[3, :1] = -100
    fit = evaluate(task, (tokens, targets), batch_size=3)
    logits, kept = task.model(tokens), targets != -100
    assert fit.accuracy == pytest.approx((logits.argmax(-1) == targets)[kept].double().mean().item())
    rows = [F.cross_entropy(logits[i], targets[i]) for i in range(7)]  # mean over a row's own targets, then over rows
    assert fit.loss == pytest.approx(torch.stack(rows).mean().item(), rel=1e-6)


def test_what_is_no_classifier_is_refused(classifier):
    with pytest.raises(TaskError, match="one value a class"):
        evaluate(rf.Task(classifier.model, "mse"), (torch.randn(3, 4), torch.randn(3, 3)))
    with pytest.raises(TaskError, match="no target is left"):
        evaluate(classifier, (torch.randn(3, 4), torch.full((3,), -100)))

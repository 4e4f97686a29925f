import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import refluence as rf
from refluence.errors import DataError, TaskError
from refluence.evaluation.retraining import load_models, model_seed, retrain
from refluence.evaluation.subsets import leave_out, random_subsets
from refluence.training import Recipe, train
from refluence.training.group import Group

RECIPE = Recipe(0.1, 2, 64, momentum=0.9, schedule="cosine")
HALVES = 12


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))


def digits(rows):
    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.images).float()[:, None] / 16, torch.from_numpy(bunch.target)
    return images[rows], labels[rows]


TRAIN, TEST = digits(slice(0, 300)), digits(slice(1500, 1560))


def task(**options):
    torch.manual_seed(0)
    return rf.Task(build(), **options)


def losses_of(model):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(TEST[0]).double(), TEST[1], reduction="none")


def test_half_subsets_of_real_digits(tmp_path):
    truth = retrain(
        task(), TRAIN, TEST, HALVES, RECIPE, seed=7, baseline=2, path=tmp_path, keep_models=True, progress=False
    )
    assert torch.equal(truth.masks, random_subsets(300, HALVES, seed=7))
    assert truth.measurements["loss"].shape == truth.measurements["margin"].shape == (HALVES, 1, 60)
    assert truth.manifest["trained_together"]
    models = load_models(tmp_path, task())
    assert len(models) == HALVES + 2
    for i in (0, 5, HALVES - 1):
        rows = truth.masks[i].nonzero()[:, 0]
        alone = train(task(), TRAIN, RECIPE, rows=rows, seed=model_seed(7, i, 0, 1), progress=False)
        torch.testing.assert_close(truth.measurements["loss"][i, 0], losses_of(alone), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(truth.measurements["loss"][i, 0], losses_of(models[i]))
    for b in range(2):
        full = train(task(), TRAIN, RECIPE, seed=7 + HALVES + b, progress=False)
        torch.testing.assert_close(truth.baseline["loss"][b], losses_of(full), rtol=1e-4, atol=1e-4)
    assert truth.changes().mean() > 0  # half the data, a worse model
    saved = rf.evaluation.GroundTruth.load(tmp_path / "ground_truth.safetensors")
    assert torch.equal(saved.measurements["loss"], truth.measurements["loss"])


def test_several_seeds_a_subset_and_left_out_groups():
    masks = leave_out(300, [3, [5, 6]])
    truth = retrain(task(), TRAIN, TEST, masks, RECIPE, seeds=2, seed=50, progress=False)
    assert truth.measurements["loss"].shape == (2, 2, 60)
    assert truth.baseline is None
    alone = train(task(), TRAIN, RECIPE, rows=masks[1].nonzero()[:, 0], seed=50 + 1 * 2 + 1, progress=False)
    torch.testing.assert_close(truth.measurements["loss"][1, 1], losses_of(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(truth.values(), truth.measurements["loss"].mean(dim=1))


def test_a_training_of_the_users_own(tmp_path):
    calls = []

    def ridge(rows, seed):
        calls.append((rows, seed))
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)).double()
        x, y = TRAIN[0][rows].flatten(1).double(), nn.functional.one_hot(TRAIN[1][rows], 10).double()
        with torch.no_grad():
            model[1].weight.copy_(torch.linalg.solve(x.T @ x + torch.eye(64), x.T @ y).T)
        return model

    own = rf.Task(nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)).double())
    test = (TEST[0].double(), TEST[1])
    masks = random_subsets(300, 2)
    truth = retrain(own, (TRAIN[0].double(), TRAIN[1]), test, masks, ridge, seed=3, path=tmp_path, progress=False)
    assert [seed for _, seed in calls] == [3, 4]
    assert calls[0][0] == masks[0].nonzero()[:, 0].tolist()
    expected = nn.functional.cross_entropy(ridge(calls[0][0], 3)(test[0]), test[1], reduction="none").detach()
    torch.testing.assert_close(truth.measurements["loss"][0, 0], expected)
    calls.clear()
    retrain(own, (TRAIN[0].double(), TRAIN[1]), test, masks, ridge, seed=3, path=tmp_path, progress=False)
    assert calls == []


KILLED = """
import sys
sys.path.insert(0, {folder!r})
import torch
torch.set_num_threads(1)
import refluence.training.workers as workers
workers.SAVE_SECONDS = 0.0
import test_retraining as t
t.retrain(t.task(), t.TRAIN, t.TEST, 6, t.LONG, together=2, path={path!r}, progress=False)
"""
LONG = Recipe(0.05, 25, 16, optimizer="adam")


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_gives_the_same(tmp_path, monkeypatch):
    code = KILLED.format(folder=str(Path(__file__).parent), path=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    seen = set()
    while len(seen) < 2:  # the second group is on its way
        seen |= set(tmp_path.glob("training-*.safetensors"))
        assert process.poll() is None, "the retraining ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(tmp_path.glob("models-*")))
    assert 1 <= finished < 3
    resumed = []
    resume = Group.resume
    monkeypatch.setattr(Group, "resume", lambda group, folder: (resume(group, folder), resumed.append(group.done))[0])
    again = retrain(task(), TRAIN, TEST, 6, LONG, together=2, path=tmp_path, progress=False)
    assert len(resumed) == 3 - finished  # what was finished is not trained again
    assert resumed[0] > 0  # and what was not goes on where it was
    monkeypatch.undo()
    whole = retrain(task(), TRAIN, TEST, 6, LONG, together=2, progress=False)
    assert torch.equal(again.measurements["loss"], whole.measurements["loss"])
    assert not list(tmp_path.glob("training-*"))
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_file_is_found_and_its_models_are_trained_again(tmp_path):
    first = retrain(task(), TRAIN, TEST, 4, RECIPE, together=2, path=tmp_path, progress=False)
    damaged = sorted(tmp_path.glob("models-*"))[1]
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        again = retrain(task(), TRAIN, TEST, 4, RECIPE, together=2, path=tmp_path, progress=False)
    assert torch.equal(first.measurements["loss"], again.measurements["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": Recipe(0.2, 2, 64)}, "recipe's learning_rate is 0.1, not 0.2"),
        ({"test": (TEST[0] + 1, TEST[1])}, "test data"),
        ({"train": (TRAIN[0], TRAIN[1].flip(0))}, "train data"),
        ({"masks": 3}, "subsets"),
        ({"seeds": 2}, "seeds is 1, not 2"),
        ({"build": build}, "build is 'fresh model'"),
        ({"task": rf.Task(build(), loss="cross_entropy", l2=0.1)}, "l2"),
    ],
)
def test_another_retraining_in_the_folder_is_refused(tmp_path_factory, change, message):
    folder = tmp_path_factory.getbasetemp() / "one retraining"
    asked = {"task": task(), "train": TRAIN, "test": TEST, "masks": 2, "recipe": RECIPE}
    retrain(**asked, path=folder, progress=False)
    with pytest.raises(DataError, match=message):
        retrain(**(asked | change), path=folder, progress=False)


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="keep_models needs a folder"):
        retrain(task(), TRAIN, TEST, 2, RECIPE, keep_models=True)
    with pytest.raises(DataError, match=r"masks must be boolean \(subsets, 300\)"):
        retrain(task(), TRAIN, TEST, torch.ones(2, 299, dtype=torch.bool), RECIPE)
    with pytest.raises(DataError, match="subset 1 has no examples"):
        retrain(task(), TRAIN, TEST, torch.tensor([[True] * 300, [False] * 300]), RECIPE)
    with pytest.raises(DataError, match="seeds must be at least 1"):
        retrain(task(), TRAIN, TEST, 2, RECIPE, seeds=0)
    with pytest.raises(DataError, match="holds no retraining"):
        load_models(tmp_path, task())
    retrain(task(), TRAIN, TEST, 1, RECIPE, path=tmp_path, progress=False)
    with pytest.raises(DataError, match="holds no models"):
        load_models(tmp_path, task())
    kept = tmp_path / "kept"
    retrain(task(), TRAIN, TEST, 1, RECIPE, path=kept, keep_models=True, progress=False)
    with pytest.raises(TaskError, match="other parameters"):
        load_models(kept, rf.Task(nn.Linear(64, 10)))


def scaled(factor):
    def loss(output, batch):
        return factor * nn.functional.cross_entropy(output, batch[1], reduction="none")

    return loss


def partial_of(factor):
    return functools.partial(lambda output, batch, by: by * scaled(1)(output, batch), by=factor)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize(
    "make",
    [
        lambda factor: rf.Task(build(), loss=scaled(factor)),
        lambda factor: rf.Task(build(), loss=partial_of(factor)),
        lambda factor: rf.Task(nn.Sequential(Scale(factor), build())),
        lambda factor: rf.Task(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to([torch.float32, torch.float64][int(factor) - 1])
        ),
    ],
    ids=["closure", "partial", "buffer", "dtype"],
)
def test_a_folder_of_another_task_of_the_same_source_is_refused(make, tmp_path):
    recipe = Recipe(0.1, 1, 64)
    retrain(make(1.0), TRAIN, TEST, 2, recipe, path=tmp_path, progress=False)
    retrain(make(1.0), TRAIN, TEST, 2, recipe, path=tmp_path, progress=False)
    with pytest.raises(DataError, match="another retraining"):
        retrain(make(2.0), TRAIN, TEST, 2, recipe, path=tmp_path, progress=False)


@pytest.mark.parametrize("own", [True, False])
def test_a_model_that_lacks_a_parameter_is_not_measured_with_the_tasks(own):
    task = rf.Task(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))

    def without(*_):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))

    recipe, make = (without, None) if own else (RECIPE, without)
    with pytest.raises(TaskError, match=r"another architecture.*'1.bias'"):
        retrain(task, TRAIN, TEST, 2, recipe, build=make, progress=False)

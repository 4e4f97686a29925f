"""The user's model, data and random state are as before after every call, also after an error."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import refluence as rf
from refluence.errors import NonFiniteError

N = 12


class Model(nn.Module):
    """Everything that a forward pass may leave behind: dropout, running statistics, counters, hooks."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.head, self.frozen = nn.Linear(6, 3), nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        torch.manual_seed(3)  # randomness that is the same for every row and pass
        x = x + 0.1 * torch.randn(4).to(x.dtype)
        return self.frozen(self.head(self.body(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model()
    model.train()
    model.body[1].eval()
    model.frozen.requires_grad_(False)
    model.body[0].bias.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    model.hook_calls = 0

    def count(module, inputs, output):
        model.hook_calls += 1

    model.head.register_forward_hook(count)
    model.head.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return model


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def state(model, data):
    """All that is the user's."""
    return copy.deepcopy(
        {
            "modes": [module.training for module in model.modules()],
            "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            "flags": [parameter.requires_grad for parameter in model.parameters()],
            "gradients": [parameter.grad for parameter in model.parameters()],
            "values": list(model.state_dict().values()),
            "dtypes": [tensor.dtype for tensor in model.state_dict().values()],
            "hooks": [
                [len(hooks) for name, hooks in vars(module).items() if name.endswith("hooks")]
                for module in model.modules()
            ],
            "methods": [sorted(vars(module)) for module in model.modules()],
            "data": data,
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "grad mode": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
    )


def assert_same(now, before):
    for key, value in before.items():
        flat, old = torch.utils._pytree.tree_leaves(now[key]), torch.utils._pytree.tree_leaves(value)
        assert len(flat) == len(old), key
        for a, b in zip(flat, old, strict=True):
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, key


USES = {
    "gram": lambda i, x, y: i.fit((x, y)).score((x[:5], y[:5])),
    "data loader": lambda i, x, y: i.fit(DataLoader(TensorDataset(x, y), batch_size=5)).score(
        DataLoader(TensorDataset(x, y), batch_size=7), groups="class"
    ),
    "everything": lambda i, x, y: [
        i.fit((x, y)),
        i.score((x, y), normalize="l-relatif", groups="class"),
        i.at(0.2).self_influence(),
        i.inverse_hvp((x, y)),
        i.gradient_norm,
        i.effective_dimension,
        i.manifest(),
    ],
    "plan": lambda i, x, y: i.plan_for((x, y)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("solver", [rf.solvers.Gram(), rf.solvers.Dense()], ids=["gram", "dense"])
def test_a_successful_call_changes_nothing(model, data, use, solver):
    before = state(model, data)
    USES[use](rf.Influence(rf.Task(model), solver=solver, damping=0.1, batch_size=5), *data)
    assert_same(state(model, data), before)


@pytest.mark.parametrize("parameters", ["head.*", "frozen.weight", ["frozen.*", "body.*"]])
def test_parameters_that_are_chosen_or_left_out_keep_their_flags(model, data, parameters):
    before = state(model, data)
    task = rf.Task(model, parameters=parameters)
    rf.Influence(task, solver=rf.solvers.Gram(), damping=0.1, batch_size=5).fit(data).score(data)
    assert_same(state(model, data), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attribution_in_another_dtype_leaves_the_model_in_its_own(model, data, dtype):
    before = state(model, data)
    influence = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), damping=0.1, dtype=dtype).fit(data)
    influence.score(data)
    assert_same(state(model, data), before)


@pytest.mark.parametrize("solver", [rf.solvers.Identity(), rf.solvers.Sketched(rf.sketches.SJLT(8), corrected=False)])
def test_the_other_solvers_change_nothing_either(model, data, solver):
    before = state(model, data)
    rf.Influence(rf.Task(model), solver=solver, damping=0.1).fit(data).score(data)
    assert_same(state(model, data), before)


def test_attribution_works_and_changes_nothing_where_gradients_are_turned_off(model, data):
    before = state(model, data)
    expected = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), damping=0.1).fit(data).score(data)
    with torch.no_grad():
        scores = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), damping=0.1).fit(data).score(data)
        assert not torch.is_grad_enabled()
    assert torch.equal(scores.values, expected.values)
    assert_same(state(model, data), before)


class StoppedError(Exception):
    """What a test's own code raises."""


def loss_that_fails_at(call):
    calls = 0

    def loss(output, batch):
        nonlocal calls
        calls += 1
        if calls == call:
            raise StoppedError
        return nn.functional.cross_entropy(output, batch[1], reduction="none")

    return loss


@pytest.mark.parametrize("call", [1, 2, 3, 5, 9, 11, 12, 13, 15])
def test_a_loss_that_raises_midway_changes_nothing(model, data, call):
    before = state(model, data)
    influence = rf.Influence(
        rf.Task(model, loss_that_fails_at(call)), solver=rf.solvers.Gram(), damping=0.1, batch_size=4
    )
    with pytest.raises(StoppedError) as held:
        influence.fit(data).score(data)
    assert_same(state(model, data), before)
    assert held.tb is not None


def test_nan_in_row_seven_changes_nothing(model, data):
    data[0][7] = torch.nan
    before = state(model, data[1:])
    with pytest.raises(NonFiniteError, match="row 7"):
        rf.Influence(rf.Task(model), damping=0.1, batch_size=5).fit(data)
    assert_same(state(model, data[1:]), before)


class FailingRows(TensorDataset):
    """Readable until `broken`."""

    broken = False

    def __getitem__(self, row):
        if self.broken and row >= 8:
            raise StoppedError
        return super().__getitem__(row)


@pytest.mark.parametrize("broken", ["train", "test"])
def test_data_that_fail_in_a_later_pass_change_nothing_while_the_error_is_held(model, data, broken):
    """Passes over test and train are nested then, and the error's traceback keeps both alive."""
    train, test = FailingRows(*data), FailingRows(*data)
    execution = rf.Execution(memory=200_000)
    influence = rf.Influence(
        rf.Task(model), solver=rf.solvers.Gram(), damping=0.1, batch_size=4, execution=execution
    ).fit(train)
    influence._fit.rows.memory, influence._fit.rows._kept, influence._fit.rows._fits = 0, None, False
    before = state(model, data)
    {"train": train, "test": test}[broken].broken = True
    with pytest.raises(StoppedError) as held:
        influence.score(test)
    assert_same(state(model, data), before)
    assert held.tb is not None


def test_a_pass_that_is_left_midway_changes_nothing(model, data):
    before = state(model, data)
    influence = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), damping=0.1, batch_size=4).fit(data)
    capture, batches = influence._fit.capture, influence._fit.rows.batches
    left = capture.gradients(batches, capture.loss)
    next(left)
    assert_same(state(model, data), before)
    left.close()
    assert_same(state(model, data), before)

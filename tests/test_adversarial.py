"""Models and data that once gave, or could give, silently wrong numbers."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import refluence as rf
from refluence.batches import Batches
from refluence.errors import DataError, PlanError, RefluenceError, TaskError
from refluence.gradients.blocks import ZeroBlock
from refluence.gradients.capture import Capture
from support.reference import loop_gradients, scores

MU = 1e-2


def data(n=24, *shape, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (n,), generator=generator)


def rows(task, batch, objective=None):
    """Gradients by one autograd call an example."""
    objective = objective or (lambda model, part: task.losses(task.output(model, part), part))
    return loop_gradients(task.model, objective, task.parameter_names(), batch)


def assert_scores_exact(task, train, test, **options):
    influence = rf.Influence(task, solver=rf.solvers.Gram(), damping=MU, progress=False, **options).fit(train)
    expected = scores(rows(task, test), rows(task, train), MU)
    torch.testing.assert_close(
        influence.score(test).values, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max())
    )


class SortsItsRows(nn.Module):
    """Works on the rows in the order of their first feature."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        hidden = torch.empty(len(x), 5, dtype=x.dtype)
        hidden[order] = torch.tanh(self.inner(x[order]))
        return self.head(hidden)


class PacksItsRows(nn.Module):
    """A row-wise layer on packed sequences, whose rows are ordered by time and then by length."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        lengths = (x[:, :, 0] != 0).sum(dim=1).clamp(min=1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        inner = torch.tanh(self.inner(packed.data))
        packed = PackedSequence(inner, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        padded, _ = pad_packed_sequence(packed, batch_first=True)
        return self.head(padded.sum(dim=1))


class RoutesTokens(nn.Module):
    """Each token goes to one of two experts."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        flat = x.reshape(-1, 4)
        mask = flat[:, 0] > 0
        out = torch.zeros_like(flat)
        out[mask], out[~mask] = torch.tanh(self.first(flat[mask])), torch.tanh(self.second(flat[~mask]))
        return self.head(out.reshape(x.shape).mean(dim=1))


def test_rows_sorted_inside_the_model():
    inputs, labels = data(24, 4)
    inputs[:3, 0] = torch.tensor([-3.0, -2.0, -1.0])  # the probe sees them in order
    assert_scores_exact(rf.Task(SortsItsRows().double()), (inputs, labels), data(5, 4, seed=1), batch_size=8)


def test_packed_sequences_of_equal_length_in_the_probe_only():
    inputs, labels = data(24, 5, 3)
    lengths = [4, 4, 4, 4, *[5, 3] * 10]
    for row, length in enumerate(lengths):
        inputs[row, length:] = 0
    assert_scores_exact(rf.Task(PacksItsRows().double()), (inputs, labels), (inputs[:6], labels[:6]), batch_size=4)


def test_tokens_routed_to_experts():
    inputs, labels = data(24, 3, 4)
    inputs[:3, :, 0] = inputs[:3, :, 0].abs()  # the probe uses one expert only
    assert_scores_exact(rf.Task(RoutesTokens().double()), (inputs, labels), data(5, 3, 4, seed=1), batch_size=8)


def test_one_training_example_with_flattened_positions():
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            hidden = torch.tanh(self.inner(x.transpose(0, 1).reshape(-1, 4)))
            return self.head(hidden.reshape(x.shape[1], x.shape[0], 5).sum(dim=0))

    assert_scores_exact(rf.Task(Flattens().double()), data(1, 3, 4), data(5, 3, 4, seed=1))


def test_reentrant_checkpointing_is_refused():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.inner, self.head, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

        def forward(self, x):
            wanted = x.detach().requires_grad_()
            return self.head(checkpoint(lambda z: torch.tanh(self.inner(z)), wanted, use_reentrant=self.reentrant))

    model = Checkpointed(True).double()
    with pytest.raises(TaskError, match=r"inner.*reentrant.*use_reentrant=False"):
        rf.Influence(rf.Task(model)).fit(data(8, 4))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_scores_exact(rf.Task(Checkpointed(False).double()), data(8, 4), data(5, 4, seed=1))


def test_a_measurement_that_mixes_examples_is_refused():
    def mixing(output, batch):
        losses = nn.functional.cross_entropy(output, batch[1], reduction="none")
        return losses * losses.mean()

    influence = rf.Influence(rf.Task(nn.Linear(4, 3).double(), measurement=mixing), damping=MU).fit(data(8, 4))
    with pytest.raises(TaskError, match="measurement of test row"):
        influence.score(data(5, 4, seed=1))


def test_a_measurement_that_vmap_cannot_follow():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.rand(4, 4, dtype=torch.float64)), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(torch.einsum("ni,ij->nj", x, self.scale))

    def stepped(output, batch):
        losses = nn.functional.cross_entropy(output, batch[1], reduction="none")
        return torch.stack([loss * (2.0 if loss.item() > 1 else 1.0) for loss in losses])

    task = rf.Task(Scaled(), measurement=stepped)
    train, test = data(8, 4), data(5, 4, seed=1)
    influence = rf.Influence(task, solver=rf.solvers.Identity()).fit(train)
    expected = rows(task, test, lambda model, part: stepped(model(part[0]), part)) @ rows(task, train).T
    torch.testing.assert_close(influence.score(test).values, expected, rtol=1e-9, atol=1e-12)


def test_an_unused_layer_costs_nothing():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(500, 500)}).double()
    task = rf.Task(model, forward=lambda m, batch: m["used"](batch[0]))
    batches = Batches(data(8, 4))
    capture = Capture(task, model, {"full": task.parameter_names()}, batches)
    [(_, blocks)] = capture.gradients(batches, capture.loss)
    zeros = [block for block in blocks["full"].blocks if isinstance(block, ZeroBlock)]
    assert sum(block.d for block in zeros) == 500 * 500 + 500
    assert blocks["full"].nbytes < 10_000
    assert blocks["full"].dense().shape == (8, 15 + 500 * 500 + 500)
    assert_scores_exact(
        rf.Task(model, forward=task.forward, parameters=["used.*", "unused.bias"]), data(8, 4), data(5, 4)
    )


def test_factors_do_not_hold_the_tensor_they_are_a_view_of():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head((x * 2)[:, 0])

    task = rf.Task(Pools().double())
    batches = Batches(data(8, 256, 4))
    capture = Capture(task, task.model, {"full": task.parameter_names()}, batches)
    [(_, blocks)] = capture.gradients(batches, capture.loss)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in blocks["full"].tensors()
    }
    assert sum(held.values()) <= 2 * blocks["full"].nbytes


def test_a_pruned_model_is_given_back_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    prune.random_unstructured(model[0], "weight", 0.3)
    before = model[0].weight
    rf.Influence(rf.Task(model), damping=MU).fit(data(8, 4)).score(data(5, 4))
    assert model[0].weight is before
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.testing.assert_close(model[0].weight, model[0].weight_orig * model[0].weight_mask)


def test_a_model_that_changed_after_fit_is_refused():
    model = nn.Linear(4, 3).double()
    influence = rf.Influence(rf.Task(model), damping=MU).fit(data(8, 4))
    with torch.no_grad():
        model.weight.mul_(3)
    with pytest.raises(RefluenceError, match="changed since fit"):
        influence.score(data(5, 4))


def test_self_influence_of_an_example_with_a_tiny_gradient_has_its_digits():
    inputs, labels = data(40, 4)
    inputs[7] *= 1e-8
    model = nn.Linear(4, 3, bias=False).double()
    gram = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), damping=0.1).fit((inputs, labels))
    dense = rf.Influence(rf.Task(model), solver=rf.solvers.Dense(), damping=0.1).fit((inputs, labels))
    torch.testing.assert_close(gram.self_influence(), dense.self_influence(), rtol=1e-9, atol=0)
    for name in ("l-relatif", "theta-relatif"):
        values, expected = (influence.score((inputs, labels), normalize=name).values for influence in (gram, dense))
        torch.testing.assert_close(values, expected, rtol=1e-7, atol=1e-10 * float(expected.abs().max()))


def test_a_damping_below_rounding_is_refused_whatever_was_computed_before():
    train = data(30, 4)
    influence = rf.Influence(rf.Task(nn.Linear(4, 3).double()), solver=rf.solvers.Gram(), damping=1.0).fit(train)
    fresh = influence.at(1e-18)
    with pytest.raises(PlanError, match="below the rounding"):
        fresh.score(train)
    for damping in (0.1, 0.2, 0.3, 0.4):
        influence.at(damping).score(train)
    with pytest.raises(PlanError, match="below the rounding"):
        influence.at(1e-18).score(train)


def test_effective_dimension_without_damping_is_the_rank():
    train = (data(30, 3)[0], data(30, 1, seed=1)[0])
    for solver in (rf.solvers.Gram(), rf.solvers.Dense()):
        influence = rf.Influence(rf.Task(nn.Linear(3, 1).double(), loss="mse"), solver=solver, damping=0.0).fit(train)
        assert influence.effective_dimension == 4


def test_saving_scores_leaves_foreign_folders_alone(tmp_path):
    saved = rf.Scores(torch.eye(2), 2)
    foreign = tmp_path / "results"
    foreign.mkdir()
    (foreign / "manifest.json").write_text(json.dumps({"mine": True}))
    (foreign / "precious.txt").write_text("kept")
    with pytest.raises(DataError, match="holds no scores"):
        saved.save(foreign)
    assert (foreign / "precious.txt").read_text() == "kept"
    saved.save(tmp_path / "scores.zarr")
    saved.save(tmp_path / "scores.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "scores.zarr"]


def test_blocks_of_one_seed_and_of_its_neighbours_have_different_sketches():
    from refluence.solvers.sketched import block_sketches

    sketches = [block_sketches(rf.sketches.SJLT(64, seed=seed), ("a", "b", "c")) for seed in range(4)]
    assert len({sketch.seed for family in sketches for sketch in family.values()}) == 12
    assert block_sketches(rf.sketches.SJLT(64, seed=5), ("full",))["full"].seed == 5


def test_mixed_and_half_precision_models_are_sketched_in_float32_or_wider():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    model[0].to(torch.bfloat16)
    task = rf.Task(model, forward=lambda m, batch: m[2](m[1](m[0](batch[0].to(torch.bfloat16)).float())))
    train = (torch.randn(20, 6), torch.randint(0, 3, (20,)))
    sketched = rf.Influence(task, solver=rf.solvers.Sketched(rf.sketches.SJLT(4096), corrected=False), damping=0.1)
    exact = rf.Influence(task, solver=rf.solvers.Gram(), damping=0.1).fit(train).score(train).values
    difference = sketched.fit(train).score(train).values - exact
    assert float(difference.norm() / exact.norm()) < 0.15

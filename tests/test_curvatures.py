"""`Influence` on every curvature: its names, its samples, and scores by block."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import RefluenceError, TaskError
from support.reference import columns_of, curvature, loop_gradients

N, K, CLASSES, LAMBDA = 17, 4, 3, 0.05
CURVATURES = ("fisher", "ggn", "hessian", "true_fisher", "mc_fisher")


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.randint(
        CLASSES, (n,), generator=generator
    )


TRAIN, TEST = rows(N, 1), rows(K, 2)


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def per_example(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def gradients(model, data, names):
    return loop_gradients(model, per_example, names, data)


def references(model, names):
    """Each curvature by another way: derivatives of flat functions, one example or one label after the other."""
    sizes = [dict(model.named_parameters())[name].shape for name in names]
    theta = torch.cat([dict(model.named_parameters())[name].detach().flatten() for name in names])

    def outputs(flat, x):
        pieces = flat.split([size.numel() for size in sizes])
        values = {name: piece.reshape(size) for name, piece, size in zip(names, pieces, sizes, strict=True)}
        return torch.func.functional_call(model, values, (x,))

    def mean_loss(flat):
        return F.cross_entropy(outputs(flat, TRAIN[0]), TRAIN[1])

    hessian = torch.autograd.functional.hessian(mean_loss, theta)
    J = torch.autograd.functional.jacobian(lambda flat: outputs(flat, TRAIN[0]), theta)
    p = outputs(theta, TRAIN[0]).softmax(dim=1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("nap,nab,nbq->pq", J, inner, J) / N
    fisher = torch.zeros_like(ggn)
    for label in range(CLASSES):
        labels = torch.full((N,), label)
        G = gradients(model, (TRAIN[0], labels), names)
        fisher += curvature(G, p[:, label])
    return {"fisher": curvature(gradients(model, TRAIN, names)), "hessian": hessian, "ggn": ggn, "true_fisher": fisher}


def fitted(model, name, solver=None, **options):
    options = {"damping": LAMBDA, "batch_size": 5, "progress": False, **options}
    return rf.Influence(rf.Task(model), name, solver or rf.solvers.Dense(), **options).fit(TRAIN)


@pytest.fixture(scope="module")
def names(model):
    return [name for name, _ in model.named_parameters()]


@pytest.mark.filterwarnings("ignore:the damped hessian")
@pytest.mark.parametrize("name", ["fisher", "ggn", "hessian", "true_fisher"])
def test_each_name_is_that_curvature(model, names, name):
    G, V = gradients(model, TRAIN, names), gradients(model, TEST, names)
    C = references(model, names)[name]
    influence = fitted(model, name)
    assert influence.curvature == name
    expected = V @ torch.linalg.solve(C + LAMBDA * torch.eye(len(C), dtype=torch.float64), G.T)
    found = influence.score(TEST)
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-10)
    assert found.manifest["curvature"] == name
    assert found.manifest["samples"] is None


@pytest.mark.parametrize("name", ["gauss", "GGN", "true-fisher", "", None])
def test_another_name_is_refused_with_the_names(model, name):
    with pytest.raises(Exception, match=r"curvature|Type-check") as error:
        rf.Influence(rf.Task(model), curvature=name)
    if isinstance(name, str):
        assert isinstance(error.value, RefluenceError)
        for known in CURVATURES:
            assert f'"{known}"' in str(error.value)


# ---------------------------------------------------------------- samples


def test_the_sampled_fisher_is_near_the_exact_one_and_its_error_says_how_near(model):
    exact = fitted(model, "true_fisher").score(TEST).values
    deviations = []
    for seed in range(8):
        found = fitted(model, "mc_fisher", rf.solvers.Gram(), samples=24, seed=seed, batch_size=N).score(TEST)
        assert found.error is not None
        assert found.manifest["samples"] == 24
        deviations.append((found.values - exact) / found.error)
    spread = torch.stack(deviations)
    # a first-order error of skewed draws: the spread of some 500 deviations is near 1, not exactly
    assert 0.7 < float(spread.square().mean().sqrt()) < 1.3
    assert float((spread.abs() > 3).double().mean()) < 0.03


def test_the_error_falls_as_the_root_of_the_samples(model):
    few, many = (
        fitted(model, "mc_fisher", rf.solvers.Gram(), samples=s, batch_size=N).score(TEST).error.square().mean().sqrt()
        for s in (64, 256)
    )
    # with few samples the rows have high leverage, and the error is larger than that of first order
    assert float(few / many) == pytest.approx(2.0, rel=0.25)


def test_one_sample_has_no_error_and_other_seeds_other_labels(model):
    one = fitted(model, "mc_fisher", rf.solvers.Gram(), samples=1)
    assert one.score(TEST).error is None
    again = fitted(model, "mc_fisher", rf.solvers.Gram(), samples=1, batch_size=17)
    other = fitted(model, "mc_fisher", rf.solvers.Gram(), samples=1, seed=1)
    torch.testing.assert_close(again.score(TEST).values, one.score(TEST).values, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(other.score(TEST).values, one.score(TEST).values, rtol=1e-3)


@pytest.mark.parametrize("samples", [0, -1, True])
def test_samples_must_be_a_positive_integer(model, samples):
    with pytest.raises(RefluenceError, match="samples must be an integer of at least 1"):
        rf.Influence(rf.Task(model), "mc_fisher", samples=samples)


@pytest.mark.parametrize("name", ["true_fisher", "mc_fisher"])
def test_a_loss_without_a_distribution_has_no_fisher_over_labels(model, name):
    task = rf.Task(model, loss=lambda output, batch: output.square().sum(dim=1))
    with pytest.raises(TaskError, match="distribution"):
        rf.Influence(task, name, damping=0.1, progress=False).fit(TRAIN)


# ---------------------------------------------------------------- by block


BLOCKS = {"module": ["0", "2"], "parameter": ["0.weight", "0.bias", "2.weight", "2.bias"], "full": ["full"]}


@pytest.mark.filterwarnings("ignore:the damped hessian")
@pytest.mark.parametrize("name", ["fisher", "ggn", "hessian"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_scores_by_block_are_the_blocks_own_and_sum_to_the_total(model, names, name, blocks):
    influence = fitted(model, name, blocks=blocks)
    parts, total = influence.score(TEST, by_block=True), influence.score(TEST)
    assert list(parts) == BLOCKS[blocks]
    torch.testing.assert_close(sum(part.values for part in parts.values()), total.values, rtol=1e-12, atol=1e-13)
    G, V, C = gradients(model, TRAIN, names), gradients(model, TEST, names), references(model, names)[name]
    for (block, part), columns in zip(parts.items(), columns_of(model, names, influence.groups.values()), strict=True):
        own = C[columns][:, columns] + LAMBDA * torch.eye(len(columns), dtype=torch.float64)
        expected = V[:, columns] @ torch.linalg.solve(own, G[:, columns].T)
        torch.testing.assert_close(part.values, expected, rtol=1e-8, atol=1e-10)
        assert part.manifest["block"] == block
        assert json.loads(json.dumps(part.manifest)) == part.manifest
    assert "block" not in total.manifest


def test_by_block_has_each_blocks_damping_and_passes_through_weights_and_groups(model):
    influence = fitted(model, "ggn", blocks="module", damping={"0": 0.3, "2": 0.02})
    options = {"weights": torch.linspace(-1, 2, N), "groups": "class", "normalize": "l-relatif"}
    parts, total = influence.score(TEST, by_block=True, **options), influence.score(TEST, **options)
    assert {block: part.target_damping for block, part in parts.items()} == {"0": 0.3, "2": 0.02}
    assert all(part.shape == (K, CLASSES) for part in parts.values())
    torch.testing.assert_close(sum(part.values for part in parts.values()), total.values, rtol=1e-11, atol=1e-13)


def test_by_block_of_samples_has_the_error_of_each_block(model):
    influence = fitted(model, "mc_fisher", rf.solvers.Gram(), samples=5, blocks="module")
    parts, total = influence.score(TEST, by_block=True), influence.score(TEST)
    torch.testing.assert_close(sum(part.error for part in parts.values()), total.error)


SOLVERS = [
    rf.solvers.Gram(),
    rf.solvers.ConjugateGradient(),
    rf.solvers.Nystroem(4),
    rf.solvers.Ekfac(),
    rf.solvers.Sketched(rf.sketches.Gaussian(16)),
    rf.solvers.Identity(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_the_blocks_of_every_kind_of_state_sum_to_the_total(model, solver):
    influence = fitted(model, "ggn", solver, blocks="module", damping=0.3)
    parts = influence.score(TEST, by_block=True)
    assert list(parts) == ["0", "2"]
    total = influence.score(TEST).values
    torch.testing.assert_close(sum(part.values for part in parts.values()), total, rtol=1e-9, atol=1e-11)

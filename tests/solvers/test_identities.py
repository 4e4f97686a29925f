"""Properties of the exact scores that hold for every network and data set."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import refluence as rf

D = 3 * 4 + 4 + 4 * 3 + 3
few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
solvers = st.sampled_from([rf.solvers.Gram(), rf.solvers.Dense()])
dampings = st.floats(1e-3, 0.1)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = normal(seed + i, *parameter.shape)
    return model


def data(seed, n):
    return normal(seed, n, 3), torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))


def fitted(seed, n, solver, damping, measurement=None, **options):
    task = rf.Task(network(seed), measurement=measurement)
    return rf.Influence(task, solver=solver, damping=damping, **options).fit(data(seed + 10, n))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))


@few
@given(seed=seeds, n=st.integers(2, 17), size=st.integers(1, 20), solver=solvers, damping=dampings)
def test_scores_do_not_depend_on_the_split_into_batches(seed, n, size, solver, damping):
    test = data(seed + 20, 5)
    whole, split = (fitted(seed, n, solver, damping, batch_size=b) for b in (n, size))
    assert_close(split.score(test).values, whole.score(test).values)
    assert_close(split.self_influence(), whole.self_influence())


@few
@given(seed=seeds, n=st.integers(2, 17), solver=solvers, damping=dampings)
def test_reordered_rows_give_reordered_scores(seed, n, solver, damping):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(4, generator=generator), torch.randperm(n, generator=generator)
    train, test = data(seed + 10, n), data(seed + 20, 4)
    influence = rf.Influence(rf.Task(network(seed)), solver=solver, damping=damping)
    expected = influence.fit(train).score(test).values[rows][:, columns]
    found = influence.fit(tuple(x[columns] for x in train)).score(tuple(x[rows] for x in test)).values
    assert_close(found, expected)


@few
@given(seed=seeds, solver=solvers, damping=dampings, factor=st.floats(-3, 3))
def test_scores_are_linear_in_the_test_gradient(seed, solver, damping, factor):
    def first(output, batch):
        return output.square().sum(dim=1)

    def second(output, batch):
        return output[:, 0]

    def both(output, batch):
        return first(output, batch) + factor * second(output, batch)

    test = data(seed + 20, 4)
    a, b, c = (fitted(seed, 9, solver, damping, m).score(test).values for m in (first, second, both))
    assert_close(c, a + factor * b)


@few
@given(seed=seeds, solver=solvers, damping=dampings)
def test_scores_over_blocks_add_up_to_those_of_each_block_alone(seed, solver, damping):
    test = data(seed + 20, 4)
    whole = fitted(seed, 11, solver, damping, blocks="module").score(test).values
    parts = [
        rf.Influence(rf.Task(network(seed), parameters=f"{module}.*"), solver=solver, damping=damping)
        .fit(data(seed + 10, 11))
        .score(test)
        .values
        for module in (0, 2)
    ]
    assert_close(whole, sum(parts))


@few
@given(seed=seeds, n=st.integers(2, 40), solver=solvers, damping=dampings)
def test_the_effective_dimension_falls_with_the_damping_and_stays_below_n_and_d(seed, n, solver, damping):
    influence = fitted(seed, n, solver, damping)
    dimensions = [influence.at(damping * factor).effective_dimension for factor in (1, 2, 10)]
    assert min(n, D) > dimensions[0] > dimensions[1] > dimensions[2] > 0


@few
@given(seed=seeds, n=st.integers(2, 30), damping=dampings)
def test_gram_and_dense_agree(seed, n, damping):
    test = data(seed + 20, 4)
    gram, dense = (fitted(seed, n, solver, damping) for solver in (rf.solvers.Gram(), rf.solvers.Dense()))
    assert_close(gram.score(test).values, dense.score(test).values)
    assert_close(gram.inverse_hvp(test), dense.inverse_hvp(test))


@few
@given(seed=seeds, n=st.integers(2, 12), damping=dampings)
def test_self_influence_is_positive_and_at_most_n(seed, n, damping):
    """It is n times a ridge leverage score, which lies between 0 and 1."""
    own = fitted(seed, n, rf.solvers.Gram(), damping).self_influence()
    assert (own > 0).all()
    assert (own < n).all()

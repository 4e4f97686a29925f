"""Products of the curvature of a few examples from their factors, and the draws that name them."""

from itertools import islice

import pytest
import torch

from refluence.solvers.lissa import draws_of
from support.solving import N, Solving, assert_equal

SETS = torch.tensor([[5, 2, 5], [0, N - 1, 7]])


@pytest.mark.parametrize("name", ["fisher", "ggn", "true_fisher", "hessian"])
@pytest.mark.parametrize(("blocks", "weighted", "batch_size"), [("full", True, 4), ("module", False, N)])
def test_products_of_sets_of_examples_side_by_side_are_those_of_each_set(name, blocks, weighted, batch_size):
    problem = Solving(name, blocks, weighted, batch_size)
    given = {block: v.T for block, v in problem.V.items()}
    twice = {block: torch.cat([v, 2 * v.flip(1)], dim=1) for block, v in given.items()}
    found = problem.curvature.sampled_each(SETS, twice)
    for half, rows in enumerate(SETS):
        for block, v in twice.items():
            own = {block: v.chunk(2, dim=1)[half]} | {b: w.chunk(2, dim=1)[half] for b, w in twice.items()}
            expected = problem.curvature.sampled(rows, own)[block]
            assert_equal(found[block].chunk(2, dim=1)[half], expected)


@pytest.mark.parametrize(("n", "size"), [(10_000, 1), (10_000, 60), (40, 30)])
def test_draws_hold_no_row_twice_repeat_with_the_seed_and_reach_every_row_equally(n, size):
    first, again, other = (list(islice(draws_of(n, size, seed), 2_000)) for seed in (1, 1, 2))
    assert all(len(set(rows.tolist())) == size for rows in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    mean = torch.cat(first).double().mean()
    assert abs(mean - (n - 1) / 2) < 5 * n / (12 * 2_000 * size) ** 0.5

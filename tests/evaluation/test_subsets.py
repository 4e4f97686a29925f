import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refluence.errors import DataError
from refluence.evaluation.subsets import leave_out, random_subsets


@given(st.integers(2, 40), st.integers(1, 5), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_random_subsets_are_those_of_the_published_scheme(n, count, share, seed):
    if not 0 < int(share * n) < n:
        with pytest.raises(DataError, match="must leave some in and some out"):
            random_subsets(n, count, share, seed)
        return
    masks = random_subsets(n, count, share, seed)
    assert masks.shape == (count, n)
    assert masks.dtype == torch.bool
    for s in range(count):
        rows = np.random.default_rng(seed + s).choice(n, int(share * n), replace=False)
        assert set(masks[s].nonzero()[:, 0].tolist()) == set(rows.tolist())


def test_leaving_out_rows_and_groups():
    masks = leave_out(5, [1, [0, 4], np.array([2]), torch.tensor([3, 0]), []])
    assert [(~mask).nonzero()[:, 0].tolist() for mask in masks] == [[1], [0, 4], [2], [0, 3], []]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "nothing to leave out"),
        ([3, 5], "removal 1 has row 5"),
        ([-1], "row -1"),
        ([[0, 1, 2, 3, 4]], "removal 0 leaves no example"),
        ([[1, 1]], "twice"),
    ],
)
def test_leaving_out_what_cannot_be(groups, message):
    with pytest.raises(DataError, match=message):
        leave_out(5, groups)


def test_no_subsets_are_refused():
    with pytest.raises(DataError, match="at least 1"):
        random_subsets(10, 0)


@pytest.mark.parametrize("rows", [np.array([1, 3]), torch.tensor([1, 3])])
def test_rows_of_numpy_and_torch_are_rows(rows):
    assert torch.equal(leave_out(5, rows), leave_out(5, [1, 3]))
    assert torch.equal(leave_out(5, [rows]), leave_out(5, [[1, 3]]))
    assert torch.equal(leave_out(5, list(rows)), leave_out(5, [1, 3]))

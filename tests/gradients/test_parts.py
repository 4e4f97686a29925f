"""Trees that passes give: their sums and what lies below one another."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refluence.gradients.parts import added, joined


@dataclass
class Count:
    number: int

    def add(self, other):
        return Count(self.number + other.number)


def tree(k):
    return {"a": torch.full((2, 3), float(k)), "b": (k, [Count(k), None]), f"only {k}": torch.ones(1)}


def test_sums_go_into_every_kind_of_leaf_and_keep_the_keys_of_both():
    total = added(tree(1), tree(10))
    assert torch.equal(total["a"], torch.full((2, 3), 11.0))
    assert total["b"] == (11, [Count(11), None])
    assert {"only 1", "only 10"} <= set(total)


@pytest.mark.parametrize("pair", [(None, torch.ones(2)), (torch.ones(2), None)])
def test_what_one_part_does_not_have_nobody_has(pair):
    assert added(*pair) is None


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_rows_of_parts_lie_below_one_another_in_their_order(sizes):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = [torch.arange(s, s + n, dtype=torch.float64) for s, n in zip(starts, sizes, strict=True)]
    found = joined([{"x": part, "y": (part[:, None].expand(-1, 2), None)} for part in rows])
    assert torch.equal(found["x"], torch.arange(sum(sizes), dtype=torch.float64))
    assert found["y"][0].shape == (sum(sizes), 2)
    assert found["y"][1] is None

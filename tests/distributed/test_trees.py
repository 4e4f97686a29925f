"""Trees brought to a device, taken apart and put together."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from refluence.distributed.trees import leaves, moved, with_leaves
from refluence.solvers.psd import PositiveMatrix

META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass(frozen=True)
class Foreign:
    values: torch.Tensor


def test_tensors_of_containers_and_of_the_library_s_objects_are_moved_and_others_are_left():
    system, foreign = PositiveMatrix(torch.eye(3).double()), Foreign(torch.ones(2))
    found = moved({"a": [torch.ones(2), 5], "b": (system, foreign, None)}, META)
    assert found["a"][0].device == META
    assert found["a"][1] == 5
    assert found["b"][0].matrix.device == META
    assert system.matrix.device == CPU
    assert found["b"][1] is foreign


def test_what_is_there_already_is_not_copied_unless_asked():
    tree = {"a": torch.ones(2), "b": [torch.zeros(1)]}
    assert moved(tree, CPU) is tree
    copied = moved(tree, CPU, copy=True)
    copied["a"] += 1
    assert torch.equal(tree["a"], torch.ones(2))


TREES = st.recursive(
    st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner) | st.tuples(inner, inner)
)


@given(TREES)
def test_leaves_put_back_give_the_tree(tree):
    assert with_leaves(tree, leaves(tree)) == tree

"""Of the tests themselves: signatures are checked, at first in every call and later in some."""

import pytest
import torch
from jaxtyping import TypeCheckError

from refluence.linalg import neumann_solve
from support.checking import EVERY, FIRST


def call(vectors):
    return neumann_solve(lambda v: v, vectors, 2.0, depth=0)


def refused(calls):
    count = 0
    for _ in range(calls):
        try:
            call(torch.ones(3))
        except TypeCheckError:
            count += 1
        except IndexError:  # of the function itself
            pass
    return count


def test_the_first_calls_of_a_test_are_checked_and_then_one_in_so_many():
    assert refused(FIRST) == FIRST
    assert refused(EVERY) == 1
    assert refused(10 * EVERY) == 10


@pytest.mark.parametrize("again", [False, True])
def test_every_test_begins_anew(again):
    assert refused(FIRST) == FIRST
    for _ in range(EVERY):
        call(torch.ones(3, 1))

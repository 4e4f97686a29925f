from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from refluence import Scores
from refluence.errors import DataError
from refluence.evaluation.retrieval import class_retrieval, subclass_retrieval, top_cardinality, top_shares

SCORES = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 5.0, 5.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
TRAIN, TEST = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2])


def test_the_share_of_the_top_that_is_of_the_class():
    found = class_retrieval(Scores(SCORES, 4, test_ids=np.array([7, 8, 9])), TRAIN, TEST)
    assert found.details["share"].tolist() == [1, 1, 0.25]
    assert found.details["chance"].tolist() == [0.25, 0.5, 0.25]
    assert found.details["test"].tolist() == [7, 8, 9]
    assert float(found) == pytest.approx(0.75)
    assert found.low <= 0.75 <= found.high
    assert class_retrieval(SCORES, TRAIN, TEST, k=2).details["share"].tolist() == [0.5, 1, 0.25]
    assert class_retrieval(SCORES, TRAIN, TEST, k=4).details["share"].tolist() == [0.25, 0.5, 0.25]


def test_ties_share_the_last_place():
    """The expected share over every order of the tied examples."""
    values = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    orders = [[0, *order, 4] for order in itertools.permutations([1, 2, 3])]
    for k in range(1, 6):
        expected = np.mean([[row in order[:k] for row in range(5)] for order in orders], axis=0)
        np.testing.assert_allclose(top_shares(values, k)[0], expected)


def test_subclasses_have_a_name_of_their_own():
    found = subclass_retrieval(SCORES, [0, 1, 1, 2], [0, 1, 2], k=2)
    assert (found.name, float(found)) == ("subclass_retrieval", pytest.approx(1.75 / 3))


def test_cardinality():
    assert float(top_cardinality(torch.eye(4), k=1)) == 1
    same = top_cardinality(torch.arange(8.0).repeat(4, 1), k=2)
    assert float(same) == 0.25
    assert math.isnan(same.low)


def test_impossible_input():
    with pytest.raises(DataError, match="k must be from 1 to the 4"):
        class_retrieval(SCORES, TRAIN, TEST, k=5)
    with pytest.raises(DataError, match="k must be"):
        top_cardinality(SCORES, k=0)
    with pytest.raises(DataError, match="test labels have shape"):
        class_retrieval(SCORES, TRAIN, TRAIN)

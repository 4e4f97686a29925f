"""Per-example gradients of every kind of model equal those of a loop of `torch.autograd.grad`, to 1e-10 in float64."""

import functools

import pytest
import torch

from refluence.batches import Batches
from refluence.gradients.capture import Capture
from refluence.gradients.groups import parameter_groups
from support.models import CASES, N
from support.reference import loop_gradients

RTOL = 1e-10

pytestmark = [
    # torch says so of operations that vmap can only loop over
    pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]


class Prepared:
    """A case's capture, made once for each choice of blocks, with the rows by the loop."""

    def __init__(self, name):
        self.case = CASES[name]
        self.model, self.batch = self.case.build()
        self.task = self.case.task()
        self.names = self.task.parameter_names()
        self.capture = functools.cache(self._capture)
        self.expected = loop_gradients(self.model, self._loss, self.names, self.batch)
        assert self.expected.abs().max() > 1e-3

    def _loss(self, model, batch):
        return self.task.losses(self.task.output(model, batch), batch)

    def _capture(self, blocks):
        groups = parameter_groups(self.task.model, self.names, blocks)
        return Capture(self.task, self.task.model, groups, Batches(self.batch))

    def pieces(self, batch_size, blocks="full"):
        """(first row, group → block) of every batch."""
        capture = self.capture(blocks)
        return capture.gradients(Batches(self.batch, batch_size), capture.loss)


@pytest.fixture(scope="module", params=CASES)
def prepared(request):
    return Prepared(request.param)


def assert_rows_equal(rows, expected):
    error = (rows - expected).norm(dim=1)
    assert rows.shape == expected.shape
    assert rows.dtype == torch.float64
    assert (error <= RTOL * expected.norm(dim=1)).all(), f"relative errors {error / expected.norm(dim=1)}"


@pytest.mark.parametrize("batch_size", [N, 2, 1])
def test_gradients_equal_a_loop_over_single_examples(prepared, batch_size):
    rows = torch.cat([blocks["full"].dense() for _, blocks in prepared.pieces(batch_size)])
    assert_rows_equal(rows, prepared.expected)


def test_each_parameter_alone_equals_a_loop(prepared):
    found = list(prepared.pieces(3, "parameter"))
    sizes = [dict(prepared.model.named_parameters(remove_duplicate=False))[key].numel() for key in prepared.names]
    for key, wanted in zip(prepared.names, prepared.expected.split(sizes, dim=1), strict=True):
        error = (torch.cat([blocks[key].dense() for _, blocks in found]) - wanted).norm(dim=1)
        assert (error <= RTOL * prepared.expected.norm(dim=1)).all(), key


def test_parameters_take_the_routes_meant_for_them(prepared):
    coverage = prepared.capture("full").coverage
    assert set(coverage.by_kind) <= prepared.case.kinds
    assert coverage.attributed == prepared.expected.shape[1]


def test_every_operation_of_the_blocks_agrees_with_the_rows(prepared):
    """Gram among uneven batches, products, norms, parts of the rows, and chunks of any width."""
    expected = prepared.expected
    found = [(start, blocks["full"]) for start, blocks in prepared.pieces(3)]
    generator = torch.Generator().manual_seed(0)
    d, scale = expected.shape[1], expected.norm()
    V = torch.randn(d, 2, generator=generator, dtype=torch.float64)
    for start, block in found:
        own = expected[start : start + block.n]
        for other_start, other in found:
            theirs = expected[other_start : other_start + other.n]
            gram = block.gram(other)
            assert gram.dtype == torch.float64
            torch.testing.assert_close(gram, own @ theirs.T, rtol=0, atol=RTOL * float(scale) ** 2)
        U = torch.randn(block.n, 3, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(block.matvec(V), own @ V, rtol=0, atol=RTOL * float(scale * V.norm()))
        torch.testing.assert_close(block.rmatvec(U), own.T @ U, rtol=0, atol=RTOL * float(scale * U.norm()))
        torch.testing.assert_close(block.squared_norms(), own.square().sum(dim=1), rtol=1e-9, atol=1e-24)
        assert_rows_equal(block.rows(1, block.n).dense(), own[1:])
        for width in (1, 7, d, 3 * d):
            seen = torch.full_like(own, torch.nan)
            for first, values in block.chunks(width):
                assert seen[:, first : first + values.shape[1]].isnan().all(), "columns are covered once at most"
                seen[:, first : first + values.shape[1]] = values
            assert_rows_equal(seen.nan_to_num(nan=0.0), own)  # what no chunk covers is zero

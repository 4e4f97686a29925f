"""A bad example stops a fit with a store, or is left out; what was made is stored either way."""

import warnings

import pytest
import torch
from torch.utils.data import Dataset

import refluence as rf
from refluence.errors import BadExampleError
from support.stored import BATCH, SHARD, Counting, K, N, data, fitted, record, shards

TRAIN, TEST = data(N), data(K, seed=2)
PROBED = 32
BAD = 50


class Failing(Counting):
    """The classifier, which fails on inputs above 1000."""

    def forward(self, x):
        if bool((x > 1000).any()):
            raise LookupError("no such word")
        return super().forward(x)


class Files(Dataset):
    """The train rows, of which one has lost its file."""

    def __len__(self):
        return N

    def __getitem__(self, row):
        if row == BAD:
            raise FileNotFoundError("no file")
        return TRAIN[0][row], TRAIN[1][row]


def spoiled(value, row=BAD):
    x = TRAIN[0].clone()
    x[row, 0] = value
    return x, TRAIN[1]


KINDS = {"a loss that is NaN": spoiled(torch.nan), "a model that raises": spoiled(2000.0), "no file": Files()}


def weights(*rows):
    return torch.tensor([float(row not in rows) for row in range(N)])


def skipping(train, *store, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* left out")
        return fitted(train, *store, model=Failing(), skip_bad=True, **options)


@pytest.mark.parametrize("kind", ["a loss that is NaN", "a model that raises"])
def test_whole_shards_and_batches_before_the_example_are_kept(tmp_path, kind):
    with pytest.raises(BadExampleError, match=rf"train row {BAD}\b"):
        fitted(KINDS[kind], tmp_path, model=Failing())
    made = BAD - BAD % BATCH
    assert len(shards(tmp_path)) == -(-made // SHARD)
    again = fitted(TRAIN, tmp_path, model=Failing())
    assert (record(again)["rows_read"], record(again)["rows_made"]) == (made, N - made)
    assert torch.equal(again.score(TEST).values, fitted(TRAIN).score(TEST).values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fit_goes_on_from_what_was_stored_when_it_met_the_example(tmp_path, kind):
    influence = skipping(KINDS[kind], tmp_path)
    assert influence.skipped.keys() == {BAD}
    found = record(influence)
    # The missing file is met by the checksums, before any gradient is made; else the row that stands for the bad one is
    # read too.
    expected = 0 if kind == "no file" else BAD - BAD % BATCH + 1
    assert found["rows_read"] == expected
    assert found["rows_made"] == N - expected
    plain = fitted(TRAIN, weights=weights(BAD))
    assert torch.equal(influence.score(TEST).values, plain.score(TEST).values)
    assert torch.equal(influence.self_influence(), plain.self_influence())
    assert influence.damping == plain.damping


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_store_gives_the_same_fit_without_a_gradient(tmp_path, kind):
    first = skipping(KINDS[kind], tmp_path)
    model = Failing()
    with pytest.warns(UserWarning, match="1 of 60 training example is left out"):
        again = fitted(KINDS[kind], tmp_path, model=model, skip_bad=True)
    assert again.skipped == first.skipped
    assert record(again)["rows_made"] == 0
    assert torch.equal(again.score(TEST).values, first.score(TEST).values)


def test_a_store_of_good_rows_is_read_without_a_search(tmp_path):
    fitted(TRAIN, tmp_path)
    model = Counting()
    again = fitted(TRAIN, tmp_path, model=model, skip_bad=True)
    assert again.skipped == {}
    assert set(model.rows_seen(TRAIN[0])) <= set(range(PROBED))


def test_an_example_that_is_good_again_is_the_only_one_made(tmp_path):
    skipping(spoiled(torch.nan), tmp_path)
    mended = skipping(TRAIN, tmp_path)
    assert mended.skipped == {}
    assert (record(mended)["rows_read"], record(mended)["rows_made"]) == (N - 1, 1)
    torch.testing.assert_close(mended.score(TEST).values, fitted(TRAIN).score(TEST).values)


def test_norms_and_replicates_leave_the_example_out(tmp_path):
    options = {"damping": rf.RelativeDamping(20.0), "replicates": 2}
    influence = skipping(spoiled(2000.0), tmp_path, **options)
    plain = fitted(TRAIN, weights=weights(BAD), **options)
    assert influence.damping == plain.damping
    found, expected = influence.score(TEST), plain.score(TEST)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.error, expected.error)

import os

import pytest
import torch

from refluence.errors import DataError
from refluence.zoo import dataset_names, load_dataset
from refluence.zoo.mnist import find


def test_digits_is_the_whole_set_split_by_class():
    split = load_dataset("digits")
    (x, y), (test_x, test_y) = split.train, split.test
    assert x.shape == (1437, 1, 8, 8)
    assert test_x.shape == (360, 1, 8, 8)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (0, 1)
    assert len(y) + len(test_y) == 1797
    shares = torch.bincount(y) / len(y) - torch.bincount(test_y) / len(test_y)
    assert shares.abs().max() < 0.005
    assert split.class_names == tuple("0123456789")
    assert split.image.shape == x.shape[1:]


def test_digits_rows_are_the_same_every_time():
    first, second = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(first.train[0], second.train[0])
    assert torch.equal(first.test[1], second.test[1])


def test_train_and_test_rows_of_digits_are_disjoint():
    split = load_dataset("digits")
    train = {row.numpy().tobytes() for row in split.train[0]}
    assert not any(row.numpy().tobytes() in train for row in split.test[0])


def test_fewer_rows_are_the_first_ones():
    whole, part = load_dataset("digits"), load_dataset("digits", n_train=100, n_test=7)
    assert torch.equal(part.train[0], whole.train[0][:100])
    assert torch.equal(part.test[1], whole.test[1][:7])


@pytest.mark.parametrize("n_train", [0, -1, 1438])
def test_rows_that_are_not_there(n_train):
    with pytest.raises(DataError, match=r"digits train has 1,437 rows"):
        load_dataset("digits", n_train=n_train)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match=r"'imagenet'.*digits, mnist"):
        load_dataset("imagenet")
    assert dataset_names() == ("digits", "mnist")


@pytest.mark.data
@pytest.mark.skipif("REFLUENCE_DATA" not in os.environ, reason="$REFLUENCE_DATA is not set: no MNIST files")
def test_mnist_is_the_published_benchmark():
    assert find() is not None
    split = load_dataset("mnist")
    x, y = split.train
    assert x.shape == (5000, 1, 28, 28)
    assert split.test[0].shape == (500, 1, 28, 28)
    assert y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert split.test[1][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    pixels = x * split.image.std + split.image.mean
    assert pixels.min().item() == pytest.approx(0, abs=1e-6)
    assert pixels.max().item() == pytest.approx(1, abs=1e-6)
    assert x.min().item() == pytest.approx(-0.1307 / 0.3081)

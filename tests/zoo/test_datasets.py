import pytest
import torch

from refluence.errors import DataError
from refluence.zoo import ImageFormat, dataset_names, load_dataset
from refluence.zoo.datasets import canonical_name, source_of


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
    assert split.tokens is None


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
    known = "digits, mnist, fashion_mnist, cifar10, cifar2, maestro, shakespeare"
    with pytest.raises(DataError, match=f"'imagenet'.*{known}"):
        load_dataset("imagenet")
    assert ", ".join(dataset_names()) == known


def test_other_spellings_of_a_name():
    assert canonical_name("tinyshakespeare") == canonical_name("tiny_shakespeare") == "shakespeare"
    assert canonical_name("mnist") == "mnist"
    assert source_of("tinyshakespeare").name == "shakespeare"
    assert source_of("digits") is None


@pytest.mark.parametrize("name", [name for name in dataset_names() if source_of(name)])
def test_a_set_that_is_not_here_says_how_to_get_it_and_downloads_nothing(name, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path))
    source = source_of(name)
    monkeypatch.setattr("refluence.zoo.official_files.Path.is_file", lambda path: False)
    with pytest.raises(DataError, match=f"{source.title.split()[0]}.* was not found.*\n.*refluence data fetch {name}"):
        load_dataset(name)
    assert not cache.exists()


def test_pixels_undo_the_normalisation_exactly():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    for image in (ImageFormat((1, 28, 28), 0.1307, 0.3081), ImageFormat((3, 32, 32), 0.5, 0.5), ImageFormat((1, 8, 8))):
        x = bytes_.float().div(255).sub(image.mean).div(image.std)
        assert torch.equal(image.pixels(x), bytes_)

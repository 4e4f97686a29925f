import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refluence.errors import DataError
from refluence.zoo import load_dataset, shakespeare
from refluence.zoo.official_files import locate
from refluence.zoo.token_windows import windows
from support.official import knowing, put

HERE = pytest.mark.skipif(locate(shakespeare.SHAKESPEARE) is None, reason="Tiny Shakespeare is not on this machine")


@pytest.mark.parametrize("folder", ["tinyshakespeare", "shakespeare", "shakespeare_char"])
def test_characters_are_numbered_in_order_and_the_last_tenth_is_for_tests(tmp_path, monkeypatch, cache, folder):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path))
    contents = {"input.txt": b"to be or not to be? " * 150}
    put(tmp_path / folder, contents)
    (x, y), (test_x, _), vocabulary = shakespeare.load(locate(knowing(shakespeare.SHAKESPEARE, contents)))
    text = contents["input.txt"].decode()
    assert vocabulary == tuple(sorted(set(text)))
    assert x.shape == (10, 256)  # 2,700 characters
    assert test_x.shape == (1, 256)  # 300
    assert shakespeare.text_of(vocabulary, x.flatten()) == text[:2560]
    assert shakespeare.text_of(vocabulary, y[3]) == text[3 * 256 + 1 : 4 * 256 + 1]
    assert shakespeare.text_of(vocabulary, test_x[0].tolist()) == text[2700:2956]


@given(st.integers(0, 60), st.integers(1, 9))
def test_windows_are_consecutive_and_targets_one_place_later(total, length):
    tokens = torch.arange(total)
    inputs, targets = windows(tokens, length)
    assert inputs.flatten().tolist() == list(range(inputs.numel()))
    assert torch.equal(targets, inputs + 1)
    assert inputs.numel() <= max(0, total - 1) < inputs.numel() + length + 1


@pytest.mark.data
@HERE
def test_the_published_blocks():
    split = load_dataset("tinyshakespeare")
    assert split.name == "shakespeare"
    assert split.train[0].shape == split.train[1].shape == (3921, 256)
    assert split.test[0].shape == (435, 256)
    assert split.tokens.vocabulary == 65
    assert split.tokens.length == 256
    assert split.image is None
    assert split.train[0].max() == 64
    assert split.tokens.decode(split.train[0][0]).startswith("First Citizen:\nBefore we proceed any further")
    with pytest.raises(DataError, match="shakespeare train has 3,921 rows; 3,922 cannot"):
        load_dataset("shakespeare", n_train=3922)
    part = load_dataset("shakespeare", n_train=10, n_test=3)
    assert torch.equal(part.train[1], split.train[1][:10])
    assert torch.equal(part.test[0], split.test[0][:3])

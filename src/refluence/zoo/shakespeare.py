"""Tiny Shakespeare as sequences of characters, split as nanoGPT does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refluence.zoo.official_files import Download, Layout, Located, OfficialFile, Source
from refluence.zoo.token_windows import windows

BLOCK = 256
_FILE = "input.txt"
_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

SHAKESPEARE = Source(
    name="shakespeare",
    title="Tiny Shakespeare",
    layouts=(
        Layout(
            ("tinyshakespeare", "shakespeare", "tiny_shakespeare", "shakespeare_char"), (OfficialFile(_FILE, _SHA256),)
        ),
    ),
    downloads=(
        Download(
            _FILE,
            _SHA256,
            1_115_394,
            ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",),
        ),
    ),
    folder="shakespeare",
    ways=(
        f"Set {{data}} to a folder with `tinyshakespeare/{_FILE}`, the file of char-rnn.",
        f"Set {{data}} to nanoGPT's `data/`, which has `shakespeare_char/{_FILE}` once its `prepare.py` has run.",
    ),
)


def load(files: Located) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """Blocks of 256 characters of the first nine tenths and of the rest, the characters that follow, the vocabulary.

    Blocks do not overlap; a rest shorter than a block and its last target is left out. Ids are places in the
    vocabulary, which is the sorted set of the whole text's characters.

    Raises:
        DataError: the file is not the published one.
    """
    text = files.read(_FILE).decode("ascii")
    vocabulary = tuple(sorted(set(text)))
    table = torch.zeros(128, dtype=torch.long)
    table[torch.tensor([ord(character) for character in vocabulary])] = torch.arange(len(vocabulary))
    tokens = table[torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()]
    cut = int(len(tokens) * 0.9)
    return windows(tokens[:cut], BLOCK), windows(tokens[cut:], BLOCK), vocabulary


def text_of(vocabulary: tuple[str, ...], ids: Sequence[int] | Tensor) -> str:
    """The characters of some ids."""
    return "".join(vocabulary[int(index)] for index in ids)

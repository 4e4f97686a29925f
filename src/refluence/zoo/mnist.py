"""MNIST and Fashion-MNIST: the same four IDX files, found on this machine or downloaded when asked to."""

from __future__ import annotations

import torch
from torch import Tensor

from refluence.zoo.idx import read_idx
from refluence.zoo.official_files import Download, Layout, Located, OfficialFile, Source

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
MNIST_SCALE = (0.1307, 0.3081)
FASHION_SCALE = (0.2860, 0.3530)
FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)

MNIST = Source(
    name="mnist",
    title="MNIST",
    layouts=(
        Layout(
            ("mnist", "MNIST/raw"),
            (
                OfficialFile(TRAIN_IMAGES, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
                OfficialFile(TRAIN_LABELS, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
                OfficialFile(TEST_IMAGES, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
                OfficialFile(TEST_LABELS, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
            ),
        ),
    ),
    downloads=(
        Download(
            f"{TRAIN_IMAGES}.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            9_912_422,
            _MNIST_MIRRORS,
        ),
        Download(
            f"{TRAIN_LABELS}.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            28_881,
            _MNIST_MIRRORS,
        ),
        Download(
            f"{TEST_IMAGES}.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            1_648_877,
            _MNIST_MIRRORS,
        ),
        Download(
            f"{TEST_LABELS}.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            4_542,
            _MNIST_MIRRORS,
        ),
    ),
    folder="mnist",
    ways=(
        "Set {data} to a folder with `mnist/` holding the four official IDX files, .gz or unpacked.",
        "Set {data} to the `root` of torchvision's MNIST, which has `MNIST/raw/`.",
    ),
)

FASHION_MNIST = Source(
    name="fashion_mnist",
    title="Fashion-MNIST",
    layouts=(
        Layout(
            ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
            (
                OfficialFile(TRAIN_IMAGES, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
                OfficialFile(TRAIN_LABELS, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
                OfficialFile(TEST_IMAGES, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
                OfficialFile(TEST_LABELS, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
            ),
        ),
    ),
    downloads=(
        Download(
            f"{TRAIN_IMAGES}.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            26_421_880,
            _FASHION_MIRRORS,
        ),
        Download(
            f"{TRAIN_LABELS}.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            29_515,
            _FASHION_MIRRORS,
        ),
        Download(
            f"{TEST_IMAGES}.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            4_422_102,
            _FASHION_MIRRORS,
        ),
        Download(
            f"{TEST_LABELS}.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            5_148,
            _FASHION_MIRRORS,
        ),
    ),
    folder="fashion_mnist",
    ways=(
        "Install Debian's package `dataset-fashion-mnist`, or set {data} to a folder with `fashion_mnist/` holding the "
        "four official IDX files, .gz or unpacked.",
        "Set {data} to the `root` of torchvision's FashionMNIST, which has `FashionMNIST/raw/`.",
    ),
)


def load(
    files: Located, train: int, test: int, scale: tuple[float, float]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first `train` and `test` images, (n, 1, 28, 28) as (pixel/255 − mean)/std, and their labels (n,).

    Raises:
        DataError: a file is not the published one, or more rows asked than there are.
    """
    return _pair(files, TRAIN_IMAGES, TRAIN_LABELS, train, scale), _pair(files, TEST_IMAGES, TEST_LABELS, test, scale)


def _pair(files: Located, images: str, labels: str, rows: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor]:
    mean, std = scale
    pixels = read_idx(files.read(images), rows, f"{files.source.name}: {images}")
    y = read_idx(files.read(labels), rows, f"{files.source.name}: {labels}")
    x = torch.from_numpy(pixels.copy())[:, None].float().div_(255).sub_(mean).div_(std)
    return x, torch.from_numpy(y.copy()).long()

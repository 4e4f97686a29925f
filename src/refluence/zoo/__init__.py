"""Data sets and models of the published benchmarks, trained by seeded recipes."""

from refluence.zoo.benchmark import Benchmark, load_benchmark, load_train, load_untrained
from refluence.zoo.datasets import DataSplit, ImageFormat, TokenFormat, dataset_names, load_dataset
from refluence.zoo.fit import Fit, evaluate
from refluence.zoo.models import build_model, model_names
from refluence.zoo.recipes import recipe_for

__all__ = [
    "Benchmark",
    "DataSplit",
    "Fit",
    "ImageFormat",
    "TokenFormat",
    "build_model",
    "dataset_names",
    "evaluate",
    "load_benchmark",
    "load_dataset",
    "load_train",
    "load_untrained",
    "model_names",
    "recipe_for",
]

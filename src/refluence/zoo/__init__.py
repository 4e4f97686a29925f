"""Data sets and models of the published benchmarks, trained by seeded recipes."""

from refluence.zoo.benchmark import Benchmark, load_benchmark
from refluence.zoo.datasets import DataSplit, ImageFormat, dataset_names, load_dataset
from refluence.zoo.models import build_model, model_names

__all__ = [
    "Benchmark",
    "DataSplit",
    "ImageFormat",
    "build_model",
    "dataset_names",
    "load_benchmark",
    "load_dataset",
    "model_names",
]

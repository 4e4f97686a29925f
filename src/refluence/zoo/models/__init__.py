"""The models of the zoo, one a module."""

from refluence.zoo.models.all_cnn import AllCnn
from refluence.zoo.models.catalogue import build_model, check_names, model_names
from refluence.zoo.models.gpt import Gpt
from refluence.zoo.models.musictransformer import MusicTransformer
from refluence.zoo.models.resnet9 import ResNet9

__all__ = ["AllCnn", "Gpt", "MusicTransformer", "ResNet9", "build_model", "check_names", "model_names"]

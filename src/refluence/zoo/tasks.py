"""What a model of the zoo is asked: its outputs, its loss and its targets."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from refluence.batches import Batch
from refluence.task import Task
from refluence.zoo.datasets import Pair

LAST_TARGET = ("musictransformer",)


def task_for(model: str, network: nn.Module, l2: float = 0.0) -> Task:
    """The task of a network of the zoo: cross-entropy of its logits.

    Images have one label. Of a sequence, a GPT predicts every next token, and its loss is the mean over them. The
    published loss of the Music Transformer is that of the one event after the window: a classification of sequences.
    """
    return Task(network, forward=logits_after_the_last if model in LAST_TARGET else None, l2=l2)


def pair_for(model: str, data: Pair) -> Pair:
    """Inputs and the targets that the task of a model reads: of a sequence all, or the last only."""
    inputs, targets = data
    return (inputs, targets[:, -1]) if model in LAST_TARGET else data


def logits_after_the_last(model: nn.Module, batch: Batch) -> Float[Tensor, "n c"]:
    """Logits of the event after the sequences batch[0]."""
    logits: Tensor = model(batch[0], last=True)
    return logits[:, -1]

"""Per-example gradients for the libraries that are given gradients and do not compute them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def per_example_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(n, d): the gradients of the cross-entropy of each example, by `vmap(grad)`."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    return torch.cat([gradient.flatten(start_dim=1) for gradient in gradients.values()], dim=1)

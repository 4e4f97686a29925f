"""One training step of many models as a graph of tensor operations.

The step, `vmap` of the models over stacked parameters and one backward pass of the sum of their mean losses, is traced
once; replaying the graph costs neither autograd nor `vmap`. The gradient of the sum holds each model's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from refluence.batches import Batch, tensors_of, tree_map
from refluence.task import Task
from refluence.training.randomness import DRAWN, Draws

_aten = torch.ops.aten
_SAME_SHAPE = (_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.reshape.default)


class CannotTrainTogetherError(Exception):
    """Why models cannot be trained together; they are then trained one at a time."""


class MeanLoss(nn.Module):
    """The mean loss of a batch as a module, so that `functional_call` can put other parameters under it."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._task = (task,)

    def forward(self, batch: Batch) -> Tensor:
        """The mean of the batch's losses."""
        task = self._task[0]
        return task.losses(task.output(self.model, batch), batch).mean()


@dataclass(frozen=True)
class Stacked:
    """The parameters and buffers of m models of one architecture.

    Args:
        trained: name → (m, ...).
        frozen: the same of parameters that are not trained, where the models differ in them.
        buffers: the same.
        shared: parameters that are not trained and alike in all models, once.
    """

    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    shared: dict[str, Tensor]

    @staticmethod
    def of(models: Sequence[nn.Module]) -> Stacked:
        """The stack of some models, copied."""
        parameters = [dict(model.named_parameters()) for model in models]
        buffers = [dict(model.named_buffers()) for model in models]
        trained, frozen, shared = {}, {}, {}
        for name, first in parameters[0].items():
            all_of = [own[name].detach() for own in parameters]
            if first.requires_grad:
                trained[name] = torch.stack(all_of)
            elif all(torch.equal(all_of[0], other) for other in all_of[1:]):
                shared[name] = all_of[0].clone()
            else:
                frozen[name] = torch.stack(all_of)
        return Stacked(trained, frozen, {k: torch.stack([b[k] for b in buffers]) for k in buffers[0]}, shared)

    @property
    def count(self) -> int:
        """The number of models, m."""
        return next(iter(self.trained.values())).shape[0]

    def states(self) -> dict[str, Tensor]:
        """Name → (m, ...) of every parameter and buffer."""
        shared = {name: tensor.expand(self.count, *tensor.shape) for name, tensor in self.shared.items()}
        found = self.trained | self.frozen | self.buffers
        return {name: tensor.contiguous() for name, tensor in found.items()} | shared

    def clone(self) -> Stacked:
        """A copy."""
        kinds = (self.trained, self.frozen, self.buffers, self.shared)
        return Stacked(*({name: tensor.clone() for name, tensor in kind.items()} for kind in kinds))


class StackedStep:
    """Losses and gradients of m models on a batch each.

    Args:
        task: the forward pass and the loss.
        model: the architecture in train mode; nothing of it is changed.
        stacked: the models; nothing of them is changed.
        batch: tensors (m, b, ...): their first batches.

    Raises:
        CannotTrainTogetherError: an operation that `vmap` cannot follow, or a random one that is no dropout.
    """

    def __init__(self, task: Task, model: nn.Module, stacked: Stacked, batch: Batch) -> None:
        self._names = [list(kind) for kind in (stacked.trained, stacked.frozen, stacked.buffers, stacked.shared)]
        copies = stacked.clone()
        step = _step(task, model, self._names, batch)
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.enable_grad(),
                sdpa_kernel(SDPBackend.MATH),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings("ignore", message="There is a performance drop")
                self._graph = make_fx(step)(*self._flat(copies, batch))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise CannotTrainTogetherError(f"torch.func.vmap cannot follow the model: {_first_line(error)}") from error
        _simplify(self._graph)
        _own_random_numbers(self._graph)

    def __call__(self, stacked: Stacked, batch: Batch, draws: Sequence[Draws]) -> tuple[Tensor, list[Tensor]]:
        """Mean losses (m,) and the gradients (m, ...) of `stacked.trained`; updates the buffers in place."""
        with torch.no_grad():
            losses, *gradients = self._graph(draws, *self._flat(stacked, batch))
        return losses, gradients

    def _flat(self, stacked: Stacked, batch: Batch) -> list[Tensor]:
        kinds = (stacked.trained, stacked.frozen, stacked.buffers, stacked.shared)
        state = [kind[name] for kind, names in zip(kinds, self._names, strict=True) for name in names]
        return [*state, *tensors_of(batch)]


def _step(task: Task, model: nn.Module, names: Sequence[Sequence[str]], example: Batch) -> Callable[..., list[Tensor]]:
    """f(trained…, frozen…, buffers…, shared…, batch tensors…) → [losses, gradients…]."""
    loss = MeanLoss(task, model)
    ends = [sum(map(len, names[: i + 1])) for i in range(len(names))]
    trained = ends[0]
    stacked_names = [f"model.{name}" for kind in names[:3] for name in kind]
    shared_names = [f"model.{name}" for name in names[3]]

    def step(*flat: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in flat[:trained]]
        shared = dict(zip(shared_names, flat[ends[2] : ends[3]], strict=True))

        def one(own: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
            it = iter(tensors)
            batch = tree_map(lambda _: next(it), example)
            return functional_call(loss, shared | dict(zip(stacked_names, own, strict=True)), (batch,))

        own = [*leaves, *flat[trained : ends[2]]]
        losses = vmap(one, randomness="different")(own, list(flat[ends[3] :]))
        gradients = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
        return [losses.detach(), *gradients]

    return step


def _simplify(module: fx.GraphModule) -> None:
    """Drop what does nothing, and add biases within the matrix products."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        alias = node.target in (_aten.detach.default, _aten.alias.default)
        same = node.target in _SAME_SHAPE and _shape(node) == _shape(source)
        times_one = node.target is _aten.mul.Scalar and node.args[1] == 1 and _kind(node) == _kind(source)
        if alias or same or (times_one and _only_read(node)):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    for node in list(graph.nodes):
        _fuse_bias(graph, node)
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    module.recompile()


def _fuse_bias(graph: fx.Graph, node: fx.Node) -> None:
    """bias + a @ b as one call."""
    if node.op != "call_function" or node.target is not _aten.add.Tensor or node.kwargs:
        return
    bias, product = node.args[:2]
    if not isinstance(bias, fx.Node) or not isinstance(product, fx.Node):
        return
    if bias.target is _aten.bmm.default:
        bias, product = product, bias
    if product.target is not _aten.bmm.default or len(product.users) != 1 or len(_shape(bias) or ()) != 3:
        return
    if _kind(node) != _kind(product) or _kind(bias)[1] != _kind(product)[1]:
        return
    with graph.inserting_before(node):
        fused = graph.call_function(_aten.baddbmm.default, (bias, *product.args))
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)


def _only_read(node: fx.Node) -> bool:
    """Whether nothing can write to the values of a node: it goes to outputs, views and plain sums only."""
    for user in node.users:
        if user.op == "output":
            continue
        if user.target in _SAME_SHAPE or user.target is _aten.transpose.int:
            if not _only_read(user):
                return False
        elif user.target not in (_aten.add.Tensor, _aten.baddbmm.default, _aten.bmm.default):
            return False
    return True


def _is_impure(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return (schema is not None and schema.is_mutable) or node.target in _WRITES or _is_random(node.target)


# Batch normalisation in training mode writes to the running statistics it is given, which its schema does not say.
_WRITES = {
    getattr(_aten, name).default
    for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit")
    if hasattr(_aten, name)
}


def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _own_random_numbers(module: fx.GraphModule) -> None:
    """Let every random operation of the graph draw each model's part from its stream, a new first input."""
    graph = module.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        draws = graph.placeholder("draws")
    for node in graph.nodes:
        if node.op != "call_function" or not _is_random(node.target) or not node.users:
            continue
        if node.target not in DRAWN:
            raise CannotTrainTogetherError(
                f"the model draws random numbers by {node.target}, which is no dropout: only dropout masks are drawn "
                "for each model on its own"
            )
        node.target = DRAWN[node.target]
        node.args = (draws, *node.args)
    module.recompile()


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _kind(node: fx.Node) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    value = node.meta.get("val")
    return _shape(node), value.dtype if isinstance(value, Tensor) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

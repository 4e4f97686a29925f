"""Small float64 models, one for every way in which a parameter can be used, each with a batch of N examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

N = 5
CLASSES = 3
RECORDED = frozenset({"outer", "rows"})


@dataclass(frozen=True)
class Case:
    """A model with data; `kinds` are the routes that its parameters may take."""

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    loss: Any = "cross_entropy"
    forward: Any = None
    parameters: Any = None
    kinds: frozenset[str] = field(default=RECORDED)

    def build(self) -> tuple[nn.Module, Any]:
        """(model, batch), the same every time."""
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model, batch = self.make()
            model = model.double()
            for parameter in model.parameters():
                # zero-initialised biases and unit scales would hide a term that multiplies them
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model, batch

    def task(self, **options: Any) -> Any:
        """A task of the case's model; the batch comes with `build`."""
        import refluence as rf

        model, _ = self.build()
        chosen = {"loss": self.loss, "forward": self.forward, "parameters": self.parameters, **options}
        return rf.Task(model, **chosen)


CASES: dict[str, Case] = {}


def case(name: str, *arguments: Any, **options: Any) -> Callable:
    """Register the decorated function as `Case.make`, called with `arguments`."""

    def register(make: Callable) -> Callable:
        CASES[name] = Case(name, functools.partial(make, *arguments), **options)
        return make

    return register


def labels(*shape: int) -> Tensor:
    return torch.randint(CLASSES, (N, *shape))


def rows(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64)


def total(output: Tensor, batch: Any) -> Tensor:
    """A loss for outputs of any shape, examples first."""
    flat = output.reshape(output.shape[0], -1)
    return (flat * torch.linspace(-1, 2, flat.shape[1], dtype=flat.dtype)).sum(dim=1).square() + flat.sin().sum(dim=1)


def output_of(model: nn.Module, batch: Any) -> Any:
    """The model on all inputs of a batch without targets."""
    return model(*batch)


# ---------------------------------------------------------------- one layer at a time


@case("linear")
def _linear():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)), (rows(4), labels())


@case("linear without bias")
def _linear_without_bias():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES, bias=False))
    return model, (rows(4), labels())


case("biases only", parameters="*.bias")(_linear)
case("weights only", parameters="*.weight")(_linear)
case("one named parameter", parameters=["2.bias"])(_linear)
case("by predicate", parameters=lambda name, parameter: parameter.ndim == 2 and name.startswith("0"))(_linear)


@case("frozen layer")
def _frozen():
    model, batch = _linear()
    model[0].requires_grad_(False)
    return model, batch


@case("frozen layer chosen by name", parameters=["0.weight"])
def _frozen_but_chosen():
    return _frozen()


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, CLASSES), nn.Linear(7, 2)

    def forward(self, x):
        return self.used(x)


@case("unused layer", kinds=RECORDED | {"unused"})
def _unused():
    return _Unused(), (rows(4), labels())


@case("linear on sequences", 4)
@case("linear on sequences as long as the batch", N)
@case("linear on sequences as long as the probe", 3)
@case("linear on sequences as long as a batch of two", 2)
def _linear_on_sequences(length):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)), (rows(length, 4), labels(length))


@case("linear on images of positions")
def _linear_on_grids():
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, CLASSES)), (rows(2, 3, 3), labels(2, 3))


CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(2, 3, 3), (9,)),
    "conv1d stride, padding, no bias": (nn.Conv1d(2, 3, 3, stride=2, padding=2, bias=False), (9,)),
    "conv1d same, even kernel": (nn.Conv1d(2, 3, 4, padding="same"), (9,)),
    "conv1d same, dilation": (nn.Conv1d(2, 3, 4, padding="same", dilation=2), (9,)),
    "conv1d groups": (nn.Conv1d(4, 6, 3, groups=2, padding=1), (7,)),
    "conv1d depthwise": (nn.Conv1d(4, 4, 3, groups=4), (7,)),
    "conv2d": (nn.Conv2d(2, 3, 3), (5, 6)),
    "conv2d as wide as the image": (nn.Conv2d(2, 3, (4, 5)), (4, 5)),
    "conv2d stride": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1)), (5, 6)),
    "conv2d stride leaving a margin": (nn.Conv2d(2, 3, 2, stride=3), (6, 7)),
    "conv2d padding": (nn.Conv2d(2, 3, 3, padding=(1, 2)), (4, 5)),
    "conv2d padding same": (nn.Conv2d(2, 3, (2, 3), padding="same"), (4, 5)),
    "conv2d padding valid": (nn.Conv2d(2, 3, (2, 3), padding="valid"), (4, 5)),
    "conv2d dilation": (nn.Conv2d(2, 3, 2, dilation=(2, 3)), (5, 6)),
    "conv2d groups": (nn.Conv2d(4, 6, 2, groups=2, stride=2, padding=1), (4, 5)),
    "conv2d depthwise": (nn.Conv2d(3, 6, 3, groups=3, padding="same", bias=False), (4, 5)),
    "conv2d circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 5)),
    "conv2d reflect, stride": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect", stride=2), (4, 5)),
    "conv2d one by one": (nn.Conv2d(3, 4, 1), (2, 3)),
    "conv3d": (nn.Conv3d(2, 2, 2, padding=1, stride=2), (3, 4, 3)),
    "conv3d same, dilation, groups": (nn.Conv3d(2, 2, 2, padding="same", dilation=2, groups=2), (3, 4, 3)),
}


def _convolution(layer, space):
    return layer, (rows(layer.in_channels, *space),)


for _name, (_layer, _space) in CONVOLUTIONS.items():
    # a copy's own parameters: the case draws its noise anew, on top of the layer made at import
    case(_name, _layer, _space, loss=total, forward=output_of)(
        lambda layer, space: _convolution(type(layer)(**_arguments(layer)), space)
    )


def _arguments(layer):
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


@case("transposed convolution", kinds=frozenset({"vmap"}), loss=total, forward=output_of)
def _transposed():
    return nn.ConvTranspose2d(2, 3, 2, stride=2), (rows(2, 3, 4),)


@case("bilinear", kinds=frozenset({"vmap"}), loss=total, forward=output_of)
def _bilinear():
    return nn.Bilinear(3, 4, 2), (rows(3), rows(4))


@case("embedding")
def _embedding():
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, CLASSES)), (torch.randint(7, (N, 3)), labels())


@case("embedding with padding_idx")
def _embedding_padding():
    tokens = torch.randint(7, (N, 4))
    tokens[:, -1] = 2
    tokens[1] = 2
    return nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Linear(16, CLASSES)), (tokens, labels())


@case("embedding with negative padding_idx")
def _embedding_negative_padding():
    tokens = torch.randint(5, 7, (N, 4))
    return nn.Sequential(nn.Embedding(7, 4, padding_idx=-1), nn.Flatten(), nn.Linear(16, CLASSES)), (tokens, labels())


@case("embedding of one token")
def _embedding_of_one_token():
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, CLASSES)), (torch.randint(7, (N,)), labels())


@case("embedding bag", kinds=RECORDED | {"vmap", "single"})
def _embedding_bag():
    return nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, CLASSES)), (torch.randint(7, (N, 3)), labels())


def _normalised(norm, *shape):
    return nn.Sequential(norm, nn.Tanh()), (rows(*shape),)


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(6), (6,)),
    "layer norm on sequences": (lambda: nn.LayerNorm(6), (N, 6)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (4, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (4, 6)),
    "rms norm with eps": (lambda: nn.RMSNorm((2, 6), eps=0.3), (4, 2, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 6), (6,)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 2)),
}
for _name, (_norm, _shape) in NORMS.items():
    case(_name, _norm, _shape, loss=total, forward=output_of, kinds=RECORDED | {"vmap"})(
        lambda norm, shape: _normalised(norm(), *shape)
    )


@case("batch norm of vectors", nn.BatchNorm1d, (6,), loss=total, forward=output_of)
@case("batch norm of sequences", nn.BatchNorm1d, (6, N), loss=total, forward=output_of)
@case("batch norm of images", nn.BatchNorm2d, (6, 2, 3), loss=total, forward=output_of)
@case("batch norm of volumes", nn.BatchNorm3d, (6, 2, 2, 2), loss=total, forward=output_of)
def _batch_norm(kind, shape):
    norm = kind(shape[0], eps=0.01)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return _normalised(norm, *shape)


# ---------------------------------------------------------------- attention


class _Attention(nn.Module):
    """Self- or cross-attention of an input (n, t, 4) with masks of every sort."""

    def __init__(self, batch_first, cross, mask, **options):
        super().__init__()
        self.cross, self.mask, self.batch_first = cross, mask, batch_first
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x, memory, padding):
        t = x.shape[1]
        masks = {}
        if self.mask in ("causal", "both"):
            causal = torch.full((t, t), -torch.inf, dtype=x.dtype).triu(1)
            masks |= {"attn_mask": causal, "is_causal": self.mask == "causal"}
        if self.mask in ("padding", "both"):
            zeros = torch.zeros(padding.shape, dtype=x.dtype)
            masks |= {"key_padding_mask": zeros.masked_fill(padding, -torch.inf)}
        if not self.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        keys = memory if self.cross else x
        y, _ = self.attention(x, keys, keys, need_weights=self.mask == "both", **masks)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(y.mean(dim=1))


def _third_last(model, batch):
    return model(*batch[:1], *batch[2:])


@case("self-attention", True, False, None, forward=_third_last)
@case("self-attention, sequence first", False, False, None, forward=_third_last)
@case("self-attention, causal mask", True, False, "causal", forward=_third_last)
@case("self-attention, padding mask", True, False, "padding", forward=_third_last)
@case("self-attention, both masks, sequence first", False, False, "both", forward=_third_last)
@case("cross-attention", True, True, None, forward=_third_last)
@case("cross-attention, sequence first", False, True, "padding", forward=_third_last)
def _attention(batch_first, cross, mask, length=4, **options):
    padding = torch.zeros(N, length, dtype=torch.bool)
    padding[1, -1] = padding[3, -2:] = True
    model = _Attention(batch_first, cross, mask, **options)
    return model, (rows(length, 4), labels(), rows(length, options.get("kdim") or 4), padding)


@case("attention without bias", True, False, None, forward=_third_last)
def _attention_without_bias(*arguments):
    return _attention(*arguments, bias=False)


@case("attention with other key and value sizes", True, True, None, forward=_third_last)
def _attention_other_sizes(*arguments):
    return _attention(*arguments, kdim=3, vdim=3)


@case("attention with bias_kv", False, False, None, forward=_third_last, kinds=RECORDED | {"vmap", "single"})
def _attention_bias_kv(*arguments):
    return _attention(*arguments, add_bias_kv=True)


@case("self-attention as long as the batch, sequence first", False, False, None, N, forward=_third_last)
@case("self-attention as long as the probe, sequence first", False, False, None, 3, forward=_third_last)
def _attention_ambiguous(*arguments):
    return _attention(*arguments)


class _Encoder(nn.Module):
    def __init__(self, batch_first=True, norm_first=False, layers=1):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, 0.1, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.batch_first, self.head = batch_first, nn.Linear(4, CLASSES)

    def forward(self, x):
        y = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(y.mean(dim=1))


@case("transformer encoder", True, False, 2)
@case("transformer encoder, norm first", True, True)
@case("transformer encoder, sequence first", False, False)
def _encoder(*arguments):
    return _Encoder(*arguments), (rows(N, 4), labels())


# ---------------------------------------------------------------- weights used more than once, and bare parameters


class _Tied(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens).tanh())


@case("tied head", False)
@case("tied head with bias", True)
def _tied(bias):
    return _Tied(bias), (torch.randint(7, (N, 3)), torch.randint(7, (N, 3)))


case("tied head chosen by its other name", True, parameters=["head.weight"])(_tied)


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        y = self.norm(self.layer(x).tanh())
        return self.head(self.norm(self.layer(y) + x))


@case("one module used twice")
def _twice():
    return _Twice(), (rows(4), labels())


@case("one module used twice on sequences")
def _twice_on_sequences():
    return _Twice(), (rows(N, 4), labels(N))


class _TwiceConvolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, CLASSES)

    def forward(self, x):
        y = self.layer(self.layer(x).tanh()[..., ::2, :])
        return self.head(y.mean(dim=(2, 3)))


@case("one convolution used twice on two sizes")
def _twice_convolved():
    return _TwiceConvolved(), (rows(2, 4, 3), labels())


class _OtherBias(nn.Module):
    """The same weight with two biases, and one bias with two weights."""

    def __init__(self):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = F.linear(x, self.weight, self.a).tanh()
        return F.linear(F.linear(y, self.weight, self.b).tanh(), self.other, self.a)


@case("weights and biases that change partners")
def _other_bias():
    return _OtherBias(), (rows(4), labels())


class _Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(N, 4))
        self.class_token = nn.Parameter(torch.randn(1, 1, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.tensor(0.2))
        self.matrix = nn.Parameter(torch.randn(4, CLASSES))

    def forward(self, x):
        y = (x + self.positions) * self.scale
        y = torch.cat([self.class_token.expand(len(x), -1, -1), y], dim=1).tanh()
        return (y.mean(dim=1) @ self.matrix) * self.temperature + self.shift


@case("bare parameters, 0-d too", kinds=RECORDED | {"vmap"})
def _bare():
    return _Bare(), (rows(N, 4), labels())


class _ChannelScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.randn(3, 1, 1)), nn.Parameter(torch.randn(1, 3, 1, 1))
        self.per_place = nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return (self.gain * x + self.offset) * self.per_place


@case("scales over channels and places", loss=total, forward=output_of, kinds=RECORDED | {"vmap"})
def _channel_scale():
    return _ChannelScale(), (rows(3, 2, 4),)


class _GrownScale(nn.Module):
    """A parameter with more dimensions than what it multiplies."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2, 1, 4))

    def forward(self, x):
        return (self.scale * x).tanh().transpose(0, 1)


@case("parameter with more dimensions than its input", loss=total, forward=output_of, kinds=RECORDED | {"vmap"})
def _grown_scale():
    return _GrownScale(), (rows(4),)


class HuggingFaceConv1D(nn.Module):
    """GPT-2's linear layer: weight (in, out), `addmm` on flattened positions."""

    def __init__(self, out, width):
        super().__init__()
        self.out = out
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(width, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        shape = (*x.size()[:-1], self.out)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


@case("addmm on flattened positions")
def _addmm():
    model = nn.Sequential(HuggingFaceConv1D(6, 4), nn.Tanh(), HuggingFaceConv1D(CLASSES, 6))
    return model, (rows(N, 4), labels(N))


class _Products(nn.Module):
    """x @ W in its spellings."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.d = nn.Parameter(torch.randn(4, CLASSES))

    def forward(self, x):
        y = torch.matmul((x @ self.a).tanh(), self.b).tanh()
        return y.matmul(self.c).tanh() @ self.d


@case("x @ W")
def _products():
    return _Products(), (rows(3, 4), labels(3))


class _Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(CLASSES, 5))

    def forward(self, x):
        return torch.einsum("nk,ck->nc", (x @ self.weight.T).tanh(), self.other)


@case("x @ W.T and einsum", kinds=RECORDED | {"vmap"})
def _transposed_weight():
    return _Transposed(), (rows(4), labels())


# ---------------------------------------------------------------- layouts


class _Flattened(nn.Module):
    """Linear layers on (b·t, d), with the examples outermost or innermost."""

    def __init__(self, major):
        super().__init__()
        self.major = major
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        b, t, _ = x.shape
        flat = (x if self.major else x.transpose(0, 1)).reshape(b * t, -1)
        y = self.last(self.norm(self.first(flat) + self.bias).tanh())
        return y.reshape(b, t, -1) if self.major else y.reshape(t, b, -1).transpose(0, 1)


@case("flattened, examples outermost", True, 4)
@case("flattened, examples innermost", False, 4)
@case("flattened, examples innermost, as long as the batch", False, N)
@case("flattened, examples innermost, as long as the probe", False, 3)
def _flattened(major, length):
    return _Flattened(major), (rows(length, 4), labels(length))


class _SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(7, 4), nn.Parameter(torch.randn(N, 1, 4))
        self.layer, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)

    def forward(self, tokens):
        y = self.embedding(tokens.T)
        y = self.norm(self.layer(y + self.positions[: len(y)]).tanh())
        return self.head(y).transpose(0, 1)


@case("sequence first", 4, kinds=RECORDED | {"vmap"})
@case("sequence first, as long as the batch", N, kinds=RECORDED | {"vmap"})
@case("sequence first, as long as the probe", 3, kinds=RECORDED | {"vmap"})
def _sequence_first(length):
    return _SequenceFirst(), (torch.randint(7, (N, length)), labels(length))


# ---------------------------------------------------------------- what vmap or one pass cannot follow


class _Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.head = kind(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        y, _ = self.recurrent(x)
        return self.head(y[:, -1])


@case("gru", nn.GRU, kinds=RECORDED | {"single"})
@case("lstm", nn.LSTM, kinds=RECORDED | {"single"})
@case("rnn", nn.RNN, kinds=RECORDED | {"single"})
def _recurrent(kind):
    return _Recurrent(kind), (rows(4, 3), labels())


class _Branching(nn.Module):
    """Examples take one of two layers, by their own values."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        chosen = [self.first(row) if row.sum().item() > 0 else self.second(row) for row in x]
        return self.head(torch.stack(chosen).tanh())


@case("control flow by the data", kinds=RECORDED | {"single"})
def _branching():
    return _Branching(), (rows(4), labels())


class Experts(nn.Module):
    """The rows that a mask selects go to the second expert; `x[mask]` is no function of the batch that vmap follows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        mask = x[:, 0] > 0
        y = self.first(x)
        if bool(mask.any()):
            y = y.clone()
            y[mask] = self.second(x[mask])
        return self.head(y.tanh())


@case("experts by a mask", [1, -1, 1, 1, -1], kinds=RECORDED | {"single"})
@case("expert not used by the first rows", [-1, -1, -1, 1, 1], kinds=RECORDED | {"single", "unused"})
@case("expert used by the first rows only", [1, 1, 1, -1, -1], kinds=RECORDED | {"single"})
def _experts(signs):
    x = rows(4)
    x[:, 0] = x[:, 0].abs() * torch.tensor(signs, dtype=torch.float64)
    return Experts(), (x, labels())


@case("in-place relu")
def _in_place():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, CLASSES)), (rows(4), labels())


class _InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shift, self.last = nn.Linear(4, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, CLASSES)

    def forward(self, x):
        y = self.first(x.clone())
        y += self.shift
        y.mul_(2.0)
        return self.last(F.relu_(y))


@case("in-place arithmetic on a layer's output", kinds=RECORDED | {"vmap", "single"})
def _in_place_arithmetic():
    return _InPlace(), (rows(4), labels())


class _Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant))


@case("checkpointed block", False, kinds=RECORDED | {"vmap", "single"})
def _checkpointed(reentrant):
    return _Checkpointed(reentrant), (rows(4), labels())


class _Cube(torch.autograd.Function):
    """w³x, with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight**3

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight**3, (gradient * x * 3 * weight**2).sum(dim=0)


class _Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(_Cube.apply(x, self.weight))


@case("custom autograd function", kinds=RECORDED | {"vmap", "single"})
def _custom():
    return _Custom(), (rows(4), labels())


class _WeightNormalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x).tanh())


@case("weight norm", kinds=RECORDED | {"vmap", "single"})
def _weight_normalised():
    return _WeightNormalised(), (rows(4), labels())


# ---------------------------------------------------------------- whole models


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])

    def forward(self, x):
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(y)))


@case("small ResNet")
def _resnet():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        _Residual(3),
        nn.MaxPool2d(2),
        _Residual(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, CLASSES),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model, (rows(1, 8, 8), labels())


class LanguageModel(nn.Module):
    """A causal transformer with learned positions, dropout and a tied head."""

    def __init__(self, vocabulary=7, width=4, length=6):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 2, 6, 0.1, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids):
        t = input_ids.shape[1]
        y = self.tokens(input_ids) + self.positions(torch.arange(t))
        mask = torch.full((t, t), -torch.inf, dtype=y.dtype).triu(1)
        return self.head(self.norm(self.body(y, mask=mask, is_causal=True)))


@case("language model with ignored targets", 6, (1,), kinds=RECORDED | {"vmap"})
@case("language model as long as the batch", N, (), kinds=RECORDED | {"vmap"})
@case("language model whose first examples are all ignored", N, (0, 1, 2), kinds=RECORDED | {"vmap", "single"})
def _language_model(length, ignored):
    tokens, targets = torch.randint(7, (N, length)), torch.randint(7, (N, length))
    targets[:, 0] = -100
    targets[list(ignored)] = -100
    return LanguageModel(), (tokens, targets)


@dataclass
class _Output:
    logits: Tensor
    extra: str = "not a tensor"


class _DictModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = LanguageModel()

    def forward(self, input_ids, scale):
        return _Output(self.model(input_ids) * scale[:, None, None])


@case("dict batches and an output with logits", kinds=RECORDED | {"vmap"})
def _dict_batch():
    tokens, targets = torch.randint(7, (N, 4)), torch.randint(7, (N, 4))
    targets[2, 1:] = -100
    return _DictModel(), {"input_ids": tokens, "scale": rows(), "labels": targets}


class _Ignored(nn.Module):
    """The first rows have no gradient at all; flattened with the examples innermost."""

    def __init__(self):
        super().__init__()
        self.body, self.embedding = _Flattened(False), nn.Embedding(7, 4)

    def forward(self, tokens):
        return self.body(self.embedding(tokens))


@case("first examples without gradient, examples innermost", 4, kinds=RECORDED | {"vmap", "single"})
@case("first examples without gradient, as long as the batch", N, kinds=RECORDED | {"vmap", "single"})
def _no_evidence(length):
    targets = labels(length)
    targets[:3] = -100
    return _Ignored(), (torch.randint(7, (N, length)), targets)

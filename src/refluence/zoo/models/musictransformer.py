"""Music Transformer: self-attention that knows how far apart two events are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class MusicTransformer(nn.Module):
    """A causal transformer over events with relative positions: 13,115,782 parameters with 390 events.

    Embedding and sinusoidal positions, post-norm layers, a last layer normalisation and a linear layer.

    Args:
        vocabulary: number of events.
        context: the longest sequence.
        depth, width, heads, hidden: layers, their width, attention heads, units of the feed-forward part.
        dropout: after the positions, on the attention weights, and after both parts of a layer.

    Source: Huang et al. 2018, "Music Transformer", in the layout of dattri's `maestro_musictransformer`.
    """

    positions: Tensor

    def __init__(
        self,
        vocabulary: int = 390,
        context: int = 256,
        depth: int = 6,
        width: int = 512,
        heads: int = 8,
        hidden: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("positions", sinusoids(context, width), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(Layer(width, heads, hidden, context, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, events: Int[Tensor, "n t"], last: bool = False) -> Float[Tensor, "n places c"]:
        """Logits of the event after each one; with `last` only of the one after the sequence, (n, 1, c)."""
        x = self.dropout(self.embedding(events) + self.positions[: events.shape[1]])
        x = self.layers(x)
        out: Tensor = self.head(self.norm(x[:, -1:] if last else x))
        return out


class Layer(nn.Module):
    """Attention and a feed-forward part with ReLU, each added to its input and then normalised."""

    def __init__(self, width: int, heads: int, hidden: int, context: int, dropout: float) -> None:
        super().__init__()
        self.attention = RelativeAttention(width, heads, context, dropout)
        self.widen, self.narrow = XavierLinear(width, hidden), XavierLinear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout1, self.dropout, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        """The sequence after both parts."""
        x = self.norm1(x + self.dropout1(self.attention(x)))
        out: Tensor = self.norm2(x + self.dropout2(self.narrow(self.dropout(F.relu(self.widen(x))))))
        return out


class RelativeAttention(nn.Module):
    """Causal attention softmax((QKᵀ + S)/√d) V with S_ij = q_i · e_{i−j}; all heads share the embeddings e.

    Row `context` − 1 − k of `distances` is e_k, the embedding of distance k.
    """

    def __init__(self, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.joint, self.out = XavierLinear(width, 3 * width), XavierLinear(width, width)
        self.distances = nn.Parameter(torch.empty(context, width // heads))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embeddings of the distances anew."""
        nn.init.xavier_uniform_(self.distances)

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"heads={self.heads}, context={len(self.distances)}"

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        """What each position takes from itself and the earlier ones."""
        n, t, width = x.shape
        q, k, v = self.joint(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q = q / math.sqrt(q.shape[-1])
        scores = q @ k.mT + relative_scores(q, self.distances)
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = self.dropout(scores.masked_fill(later, -torch.inf).softmax(dim=-1))
        out: Tensor = self.out((weights @ v).transpose(1, 2).reshape(n, t, width))
        return out


def relative_scores(
    queries: Float[Tensor, "n heads t d"], distances: Float[Tensor, "context d"]
) -> Float[Tensor, "n heads t t"]:
    """S_ij = q_i · e_{i−j} for j ≤ i, by the skewing of Huang et al. 2018, Section 3.4.1; undefined for j > i.

    Products with the embeddings in their own order have S_ij in column t − 1 − i + j. A column put before them and
    another cut into rows move row i by just that much, in O(t) memory a row instead of O(t·d).
    """
    t = queries.shape[-2]
    products = F.pad(F.linear(queries, distances[-t:]), (1, 0))
    return products.reshape(*products.shape[:-2], t + 1, t)[..., 1:, :]


class XavierLinear(nn.Linear):
    """A linear layer that starts from Glorot & Bengio's uniform weights and bias 0."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


def sinusoids(context: int, width: int) -> Float[Tensor, "context width"]:
    """sin and cos, in turn, of position · 10000^(−i/width) for i = 0, 2, 4, … (Vaswani et al. 2017, Section 3.5)."""
    angles = torch.arange(context)[:, None] * torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(context, width)

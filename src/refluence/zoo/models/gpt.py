"""A GPT over characters, in the layout of nanoGPT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

DEVIATION = 0.02


class Gpt(nn.Module):
    """A causal transformer with learned positions and pre-norm layers, whose last layer is the embedding's transpose.

    No layer has a bias. The published size on 65 characters (depth 6, width 384, 6 heads, context 256) has 10,745,088
    parameters, the embeddings of the 256 positions (98,304) included and the tied embedding of the characters counted
    once.

    Args:
        vocabulary: number of tokens.
        context: the longest sequence.
        depth, width, heads: layers, their width, attention heads.
        dropout: after the embeddings, on the attention weights, and after both parts of a layer.

    Source: Radford et al. 2019 (GPT-2); nanoGPT's `train_shakespeare_char`.
    """

    def __init__(self, vocabulary: int, context: int, depth: int, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = NormalEmbedding(vocabulary, width)
        self.positions = NormalEmbedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(Layer(width, heads, depth, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t vocabulary"]:
        """Logits of the token after each one."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # a row for each example
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        return F.linear(self.norm(self.layers(x)), self.tokens.weight)


class Layer(nn.Module):
    """Attention, then four times as wide a part with GELU; each takes its input normalised and is added to it."""

    def __init__(self, width: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        last = DEVIATION / math.sqrt(2 * depth)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = CausalAttention(width, heads, last, dropout)
        self.widen, self.narrow = NormalLinear(width, 4 * width), NormalLinear(4 * width, width, last)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        """The sequence after both parts."""
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.norm2(x)))))


class CausalAttention(nn.Module):
    """softmax(QKᵀ/√d) V over a position's own and the earlier ones."""

    def __init__(self, width: int, heads: int, last: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.joint, self.out = NormalLinear(width, 3 * width), NormalLinear(width, width, last)
        self.dropout_weights, self.dropout = nn.Dropout(dropout), nn.Dropout(dropout)

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"heads={self.heads}"

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        """What each position takes from itself and the earlier ones."""
        n, t, width = x.shape
        q, k, v = self.joint(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        scores = (q / math.sqrt(q.shape[-1]) @ k.mT).masked_fill(later, -torch.inf)
        mixed = self.dropout_weights(scores.softmax(dim=-1)) @ v
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(n, t, width)))


class NormalLinear(nn.Linear):
    """A linear layer without bias that starts from a normal distribution."""

    def __init__(self, inputs: int, outputs: int, deviation: float = DEVIATION) -> None:
        self.deviation = deviation
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=self.deviation)


class NormalEmbedding(nn.Embedding):
    """An embedding that starts from a normal distribution."""

    def reset_parameters(self) -> None:
        """Draw the embeddings anew."""
        nn.init.normal_(self.weight, std=DEVIATION)

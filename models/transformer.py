"""A small character-level transformer: causal, pre-norm, with tied embeddings.

4 layers of width 128 with 4 heads have 788,736 parameters, not counting the embeddings. Initial
matrices are normal with standard deviation 0.02. For matrices that write to the residual stream it
is smaller (Radford et al. 2019).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.declared import Model


class Block(nn.Module):
    """Self-attention and a perceptron, each added to the residual stream (batch, time, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        split = self.queries_keys_values(self.norm_attention(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in split)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))


class Transformer(nn.Module):
    """Log-probabilities (batch, time, vocabulary) of the character after each of (batch, time).

    Args:
        vocabulary: the number of distinct characters.
        hidden: the width. It has hidden / 32 heads, or one head if 32 does not divide the width.
        layers: the number of blocks.
        context: the largest number of characters in a text.
    """

    def __init__(
        self, vocabulary: int, hidden: int = 128, layers: int = 4, context: int = 256
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.characters = nn.Embedding(vocabulary, hidden)
        self.places = nn.Embedding(context, hidden)
        heads = 1 if hidden % 32 else hidden // 32
        self.blocks = nn.Sequential(*(Block(hidden, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.head.weight = self.characters.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                outward = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if outward else 1))

    def forward(self, characters: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Compute the log-probabilities. The model has no state between calls.

        Args:
            characters: (batch, time), int64.

        Raises:
            ValueError: the text is longer than the context.
        """
        if characters.shape[1] > self.places.num_embeddings:
            raise ValueError(
                f"the transformer reads {self.places.num_embeddings} characters at a time, not "
                f"{characters.shape[1]}; lower trainer.sequence_length"
            )
        time = torch.arange(characters.shape[1], device=characters.device)
        x = self.characters(characters) + self.places(time)
        return F.log_softmax(self.head(self.norm(self.blocks(x))), dim=-1), None


MODELS = {"transformer": Model(Transformer, reads="text", sizes=("hidden", "layers"))}

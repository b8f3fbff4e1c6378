"""Karpathy's char-rnn: a character-level language model of stacked LSTMs.

Input characters are one-hot, which equals an embedding into the first layer's gates. Initial
weights are uniform in +-0.08, and the forget gates' biases are 1, as in char-rnn's ``train.lua``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.declared import Model

Hidden = tuple[Tensor, Tensor]


class CharRNN(nn.Module):
    """Log-probabilities (batch, time, vocabulary) of the character after each of (batch, time).

    Args:
        vocabulary: the number of distinct characters.
        hidden: the number of units of each layer.
        layers: the number of LSTM layers.
    """

    def __init__(self, vocabulary: int, hidden: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.lstm = nn.LSTM(vocabulary, hidden, layers)
        self.linear = nn.Linear(hidden, vocabulary)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.08, 0.08)
            # torch orders the gates input, forget, cell, output, and adds two biases.
            for layer in range(layers):
                getattr(self.lstm, f"bias_ih_l{layer}")[hidden : 2 * hidden] = 1.0
                getattr(self.lstm, f"bias_hh_l{layer}")[hidden : 2 * hidden] = 0.0

    def forward(self, characters: Tensor, state: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """Compute the log-probabilities, and the hidden state after the last character.

        Args:
            characters: (batch, time), int64.
            state: the hidden state that a call on the preceding text returned, a pair of tensors
                (layers, batch, hidden); zeros if None.
        """
        # Time first: this is the LSTM's internal order, so it makes no copies.
        one_hot = F.one_hot(characters.T, self.vocabulary).to(self.linear.weight.dtype)
        output, state = self.lstm(one_hot, state)
        return F.log_softmax(self.linear(output), dim=-1).transpose(0, 1), state

    @torch.inference_mode()
    def sample(
        self, start: Tensor, length: int, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Draw characters that continue ``start``, one by one.

        Args:
            start: characters (time,), int64, at least one.
            length: the number of characters to draw.
            temperature: divides the log-probabilities. Below 1, likely characters become more
                likely.
            generator: the source of randomness.

        Returns:
            the drawn characters (length,), int64.
        """
        drawn = []
        characters, state = start[None], None
        for _ in range(length):
            output, state = self(characters, state)
            chances = torch.softmax(output[0, -1] / temperature, dim=0)
            characters = torch.multinomial(chances, 1, generator=generator)[None]
            drawn.append(characters[0])
        return torch.cat(drawn) if drawn else start[:0]


MODELS = {"char_rnn": Model(CharRNN, reads="text", sizes=("hidden", "layers"))}

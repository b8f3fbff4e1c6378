"""Prediction of the next character of a book, with the batches of Karpathy's char-rnn.

A book of N characters is divided into B streams (the batch size). A batch reads the next S
characters of every stream (the sequence length). There are K = (N - 1) // (B S) batches, so stream
b has the K S characters from number b K S on. The target of each character is the next one. The
rest of the book is not used.

The first floor(0.95 K) batches are the training part. The others are the test part: the last
twentieth of each stream. War and Peace has N = 3,196,211, so K = 1278 for B = S = 50. Training
reads the first 60,700 of the 63,900 characters of each stream, and the test the last 3,200.
`validation` holds out as many batches from the end of the training part and leaves the test part
unread. char-rnn differs in one character: its last stream ends by predicting the first character of
the book.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data.corpus import Book
from experiments.data.source import TEXT
from experiments.tasks.base import Measure
from experiments.tasks.compiled_gradient import Gradient
from models.char_rnn import Hidden

TRAIN_SHARE = 0.95


class LanguageModel:
    """A book on a device, as streams of characters.

    The hidden state starts at zero in each epoch and each evaluation. It passes from batch to
    batch, but no gradient does.

    Args:
        validation: whether to hold out the end of the training part, not the test part.

    Attributes:
        vocabulary: the characters of the training part, sorted by code point; a character's
            index in it is its number.

    Raises:
        ValueError: the book is too short for streams of this size, or the training part lacks a
            character of the held-out part.
    """

    kinds: ClassVar[tuple[str, ...]] = (TEXT,)
    keys: ClassVar[dict[str, Any]] = {"data.validation": False, "trainer.sequence_length": None}
    required: ClassVar[tuple[str, ...]] = ("trainer.sequence_length",)
    distributed: ClassVar[bool] = False
    judged_by: ClassVar[Measure] = Measure(
        "test_perplexity", "test perplexity", "perplexity {:.3f}"
    )
    metrics: tuple[str, ...] = ("test_loss", "test_bits_per_character", "test_perplexity")

    def __init__(
        self,
        book: Book,
        batch_size: int,
        sequence_length: int,
        validation: bool,
        device: torch.device | str,
    ) -> None:
        self.batch_size, self.sequence_length = batch_size, sequence_length
        characters = np.frombuffer(book.text.encode("utf-32-le"), dtype=np.uint32)
        batches = max(len(characters) - 1, 0) // (batch_size * sequence_length)
        self.train = int(TRAIN_SHARE * batches)
        self.end = batches
        if validation:
            self.end, self.train = self.train, 2 * self.train - batches
        if not 0 < self.train < self.end:
            raise ValueError(
                f"{book.label} has {len(characters):,} characters, too few for a training and a "
                f"held-out part of {batch_size} streams read {sequence_length} at a time; lower "
                "trainer.batch_size or trainer.sequence_length"
            )
        # Each stream includes the first character of the next one, the target of its last.
        length = batches * sequence_length
        streams = np.lib.stride_tricks.sliding_window_view(characters, length + 1)[::length]
        streams = streams[:batch_size, : self.end * sequence_length + 1]
        known = np.unique(streams[:, : self.train * sequence_length + 1])
        self.vocabulary = "".join(map(chr, known))
        unknown = np.setdiff1d(streams, known)
        if len(unknown):
            raise ValueError(
                f"the held-out part of {book.label} has {', '.join(repr(chr(c)) for c in unknown)},"
                " but the training part does not; give another trainer.batch_size or "
                "trainer.sequence_length, which move the border between the parts"
            )
        self.streams = torch.from_numpy(np.searchsorted(known, streams)).to(device)
        self.model_arguments = {"vocabulary": len(known)}
        self.hidden: Hidden | None = None

    @classmethod
    def of(cls, config: Any, data: Book, device: torch.device) -> LanguageModel:
        trainer = config.trainer
        sizes = trainer.batch_size, trainer.sequence_length
        return cls(data, *sizes, config.data.validation, device)

    @classmethod
    def check(cls, config: Any, kind: str) -> None: ...

    @property
    def steps_per_epoch(self) -> int:
        return self.train

    def _batches(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Characters and their targets, (batch, time) both, from batch `first` to `last` - 1."""
        length = self.sequence_length
        for start in range(first * length, last * length, length):
            stop = start + length
            yield self.streams[:, start:stop], self.streams[:, start + 1 : stop + 1]

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The training part from its beginning, in the book's order."""
        self.hidden = None
        yield from self._batches(0, self.train)

    def gradient(self, model: nn.Module, compile: bool, autocast: bool) -> Gradient:
        """Return a function of a batch that sets `grad`, keeps the hidden state, returns the loss.

        The loss is the mean over characters. As in char-rnn, the gradient is of the loss summed
        over the sequence and averaged over the streams. char-rnn's clamp to +-5 needs this scale.
        """

        def run(characters: Tensor, following: Tensor) -> Tensor:
            model.zero_grad()
            with torch.autocast(characters.device.type, torch.bfloat16, enabled=autocast):
                output, state = model(characters, self.hidden)
            self.hidden = state and (state[0].detach(), state[1].detach())
            loss = F.nll_loss(output.float().flatten(0, 1), following.flatten())
            (loss * self.sequence_length).backward()
            return loss.detach()

        return run

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The mean loss in nats and in bits, and the perplexity, on the held-out part."""
        losses, hidden = [], None
        model.eval()
        for characters, following in self._batches(self.train, self.end):
            output, hidden = model(characters, hidden)
            losses.append(F.nll_loss(output.flatten(0, 1), following.flatten()))
        model.train()
        loss = torch.stack(losses).double().mean()
        found = (loss, loss / math.log(2), loss.exp())
        return dict(zip(self.metrics, torch.stack(found).tolist(), strict=True))

    def renew_averages(self, model: nn.Module) -> None: ...

    def state_dict(self) -> dict[str, Tensor]:
        """The hidden state; empty if it is zero."""
        return {} if self.hidden is None else dict(zip("hc", self.hidden, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        device = self.streams.device
        self.hidden = (state["h"].to(device), state["c"].to(device)) if state else None

    def kept(self, model: nn.Module) -> dict[str, Any]:
        """The weights and the vocabulary, for `experiments.sample`."""
        return {"model": model.state_dict(), "vocabulary": self.vocabulary}


TASK = LanguageModel

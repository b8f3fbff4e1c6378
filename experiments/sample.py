"""Sample text from a finished run of the character RNN.

    python -m experiments.sample run=0123456789abcdef
    python -m experiments.sample run=0123456789abcdef temperature=0.7 length=2000 'start=Prince '

`run` is the run's hash. The weights are in the run's directory in the store. The records in
results/ have no weights.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch

from experiments.cli import asked_for_help, guarded, number, split
from experiments.records.store import RunStore
from models.char_rnn import CharRNN


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    run: str = ""
    temperature: str = "0.8"
    length: str = "1000"  # characters
    seed: str = "0"
    start: str = "\n"  # the text before the first sampled character
    store: str = "runs"


def sample(options: Options) -> str:
    """Return the start and the sampled text after it.

    Raises:
        ValueError: an invalid option, or a run without weights, in one line.
    """
    temperature = number(options, "temperature", float)
    length, seed = number(options, "length"), number(options, "seed")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={options.temperature} must be above 0")
    for name, value in (("length", length), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name}={value} must be 0 or more")
    if not options.run:
        raise ValueError("run= is not set; give the hash of a finished run of experiment=char_rnn")
    store = RunStore(options.store)
    path = store.run(options.run).path / "model.pt"
    summary = store.summary(options.run)
    if summary is None or not path.is_file():
        what = "is not finished" if summary is None else "has no weights"
        raise ValueError(
            f"run {options.run} {what} in {options.store!r}; give the hash of a run of "
            "experiment=char_rnn that was trained there, or its store as store="
        )
    kept = torch.load(path, map_location="cpu", weights_only=True)
    numbers = {character: number for number, character in enumerate(kept["vocabulary"])}
    unknown = sorted(set(options.start) - numbers.keys())
    if unknown or not options.start:
        problem = f"has {', '.join(map(repr, unknown))}" if unknown else "is empty"
        raise ValueError(
            f"start={options.start!r} {problem}; give one or more of the characters "
            f"{kept['vocabulary']!r}"
        )
    model = CharRNN(len(numbers), summary["model"]["hidden"], summary["model"]["layers"])
    model.load_state_dict(kept["model"])
    start = torch.tensor([numbers[character] for character in options.start])
    generator = torch.Generator().manual_seed(seed)
    drawn = model.eval().sample(start, length, temperature, generator)
    return options.start + "".join(kept["vocabulary"][number] for number in drawn.tolist())


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    print(sample(options))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))

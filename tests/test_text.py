"""The task of next characters: the book and its editions, streams, hidden state, perplexity."""

import hashlib
import io
import math
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import summarise
from experiments.config.compose import compose
from experiments.config.identity import identity, run_hash
from experiments.config.resolve import resolve, resolve_all
from experiments.config.schema import Config
from experiments.data import corpus
from experiments.data.corpus import CHARACTERS, LENGTH, SHA256, Book
from experiments.records.store import RunStore
from experiments.tasks.language_model import LanguageModel
from experiments.training.trainer import Progress, train
from models.char_rnn import CharRNN

WHOLE = Path(os.environ.get("HYPEROPT_DATA", "data"), corpus.FILE)
needs_book = pytest.mark.skipif(not WHOLE.is_file(), reason="needs War and Peace")

TINY = "to be or not to be, that is the question: whether 'tis nobler in the mind. " * 8


def text(characters: str = TINY, validation: bool = False) -> LanguageModel:
    return LanguageModel(Book(characters), 3, 5, validation, "cpu")


def written(task: LanguageModel, numbers: Tensor) -> list[str]:
    return ["".join(task.vocabulary[i] for i in row) for row in numbers.tolist()]


# Streams.


def test_streams_are_the_book_in_equal_parts_and_each_character_predicts_the_next() -> None:
    """600 characters: 39 batches of 3 streams by 5, of which 37 are for training."""
    task = text()
    assert len(TINY) == 600 and task.steps_per_epoch == 37
    batches = list(task.epoch(torch.Generator()))
    assert len(batches) == 37
    read, following = (torch.cat(part, dim=1) for part in zip(*batches, strict=True))
    for b, start in enumerate((0, 195, 390)):
        assert written(task, read)[b] == TINY[start : start + 185]
        assert written(task, following)[b] == TINY[start + 1 : start + 186]


def test_the_test_part_is_the_end_of_each_stream_and_the_validation_part_the_one_before() -> None:
    seen: dict[bool, list[list[str]]] = {False: [], True: []}

    class Reader(nn.Module):
        def forward(self, characters: Tensor, state: Any) -> tuple[Tensor, Any]:
            seen[validation].append(written(task, characters))
            return torch.zeros(*characters.shape, len(task.vocabulary)), ()

    for validation in (False, True):
        task = text(validation=validation)
        task.evaluate(Reader())
        assert task.steps_per_epoch == (35 if validation else 37)
    joined = {key: list(map("".join, zip(*parts, strict=True))) for key, parts in seen.items()}
    assert joined[False] == [TINY[start + 185 : start + 195] for start in (0, 195, 390)]
    assert joined[True] == [TINY[start + 175 : start + 185] for start in (0, 195, 390)]


def test_the_vocabulary_is_the_training_parts() -> None:
    task = text()
    assert task.vocabulary == "".join(sorted(set(TINY)))
    assert task.model_arguments == {"vocabulary": len(set(TINY))}
    assert text(TINY[:590] + "é" + TINY[591:]).vocabulary == task.vocabulary  # it is not used


def test_a_character_only_in_the_test_part_is_named() -> None:
    for place in (188, 386, 584):  # in the test part of each stream
        with pytest.raises(ValueError, match=r"held-out part of .* has 'é', but the training"):
            text(TINY[:place] + "é" + TINY[place + 1 :])
        text(TINY[:place] + "é" + TINY[place + 1 :], validation=True)


def test_a_book_that_is_too_short_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"has 16 characters, too few .* 3 streams read 5 at"):
        text("0123456789abcdef")


@needs_book
def test_the_parts_of_the_book_are_the_documented_ones() -> None:
    whole = corpus.BOOK.load(corpus.NAME, WHOLE.parent)
    assert (whole.sha256, len(whole.text), whole.name) == (SHA256, LENGTH, corpus.NAME)
    assert "".join(sorted(set(whole.text))) == "".join(sorted(CHARACTERS))
    assert whole.text.startswith(corpus.OPENING)
    task = LanguageModel(whole, 50, 50, False, "cpu")
    assert (task.train, task.end, len(task.vocabulary)) == (1214, 1278, 82)
    assert task.streams.shape == (50, 63_901)
    first = "".join(task.vocabulary[i] for i in task.streams[1, :100].tolist())
    assert first == whole.text[63_900:64_000]


# The gradient, the hidden state, and perplexity.


def model_of(task: LanguageModel) -> CharRNN:
    torch.manual_seed(1)
    return CharRNN(len(task.vocabulary), hidden=6)


def test_the_hidden_state_matches_one_long_pass() -> None:
    """An epoch's losses equal those of reading each stream at once; the next epoch starts fresh."""
    task = text()
    model = model_of(task)
    gradient = task.gradient(model, compile=False, autocast=False)
    epochs = [[gradient(*batch) for batch in task.epoch(torch.Generator())] for _ in range(2)]
    output, (hidden, cell) = model(task.streams[:, :185])
    long = F.nll_loss(output.transpose(1, 2), task.streams[:, 1:186], reduction="none")
    expected = long.view(3, 37, 5).mean(dim=(0, 2))
    for losses in epochs:
        torch.testing.assert_close(torch.stack(losses), expected, atol=1e-5, rtol=0)
    assert task.hidden is not None and not task.hidden[0].requires_grad
    torch.testing.assert_close(task.hidden, (hidden, cell), atol=1e-5, rtol=0)


def test_the_gradient_is_of_the_sum_over_the_sequence_and_of_this_batch_alone() -> None:
    task = text()
    model = model_of(task)
    gradient = task.gradient(model, compile=False, autocast=False)
    first, second = list(task.epoch(torch.Generator()))[:2]
    gradient(*first)
    found = gradient(*second)
    grads = [p.grad for p in model.parameters()]
    with torch.no_grad():
        _, state = model(first[0])
    output, _ = model(second[0], state)
    sums = -output.gather(2, second[1][:, :, None]).sum(dim=(1, 2))
    expected = torch.autograd.grad(sums.mean(), list(model.parameters()))
    assert 5 * found.item() == pytest.approx(sums.mean().item(), rel=1e-6)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, atol=1e-6, rtol=1e-5)


def test_perplexity_by_hand() -> None:
    """A model that knows the frequencies alone, on "abab...": a has 3/4, b 1/4.

    Of the 10 characters to predict in each stream's end half are a, half b. Perplexity is
    1 / sqrt(3/4 * 1/4) = 4 / sqrt(3), of which the logarithms are the losses.
    """

    class Frequencies(nn.Module):
        def forward(self, characters: Tensor, state: Any) -> tuple[Tensor, Any]:
            assert not self.training
            log = torch.tensor([0.75, 0.25]).log()
            return log.expand(*characters.shape, 2), ()

    task = text("ab" * 300)
    model = Frequencies()
    found = task.evaluate(model)
    assert model.training
    assert found == {
        "test_loss": pytest.approx(math.log(4 / math.sqrt(3)), rel=1e-6),
        "test_bits_per_character": pytest.approx(2 - math.log2(3) / 2, rel=1e-6),
        "test_perplexity": pytest.approx(4 / math.sqrt(3), rel=1e-6),
    }


def test_perplexity_of_bigrams_by_counting() -> None:
    """A model that knows the training part's bigrams, compared with a count in Python."""
    task = text()
    pairs = Counter(
        pair
        for start in (0, 195, 390)
        for pair in zip(TINY[start : start + 185], TINY[start + 1 : start + 186], strict=True)
    )
    seen = Counter(first for first, _ in pairs.elements())
    table = torch.tensor(
        [[pairs[a, b] / seen[a] for b in task.vocabulary] for a in task.vocabulary]
    )

    class Bigrams(nn.Module):
        def forward(self, characters: Tensor, state: Any) -> tuple[Tensor, Any]:
            return table.log()[characters], ()

    held_out = [place for start in (0, 195, 390) for place in range(start + 185, start + 195)]
    chances = [pairs[TINY[i], TINY[i + 1]] / seen[TINY[i]] for i in held_out]
    expected = np.prod([1 / chance for chance in chances]) ** (1 / len(chances))
    assert task.evaluate(Bigrams())["test_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_starts_from_zero_and_leaves_the_training_alone() -> None:
    task = text()
    model = model_of(task)
    batches = task.epoch(torch.Generator())
    task.gradient(model, compile=False, autocast=False)(*next(batches))
    before = task.hidden
    once = task.evaluate(model)
    assert task.evaluate(model) == once and task.hidden is before
    output, _ = model(task.streams[:, 185:195])
    expected = F.nll_loss(output.flatten(0, 1), task.streams[:, 186:196].flatten())
    assert once["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


# Whole runs.

SHORT = (
    *("experiment=char_rnn", "model.hidden=5", "trainer.batch_size=3", "trainer.sequence_length=5"),
    *("trainer.epochs=2", "trainer.record_every=4", "trainer.compile=false", "device=cpu"),
    "trainer.checkpoint_every=null",
)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with a few lines under the book's name."""
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256(TINY.encode()).hexdigest())
    (root := tmp_path / "data").mkdir()
    (root / corpus.FILE).write_text(TINY)
    return root


def config(root: Path, store: Path, *overrides: str) -> Config:
    places = (f"data.root={root}", f"store={store}")
    (found,) = resolve_all([compose([*SHORT, *places, *overrides])])
    return found


def result(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "provenance"}


TOWER = "stack=Adam(0.01)[lr, beta1] / SGD(1e-6)"


def test_a_run_records_losses_perplexity_and_bits_of_every_epoch(
    tiny: Path, tmp_path: Path
) -> None:
    summary = train(config(tiny, tmp_path, TOWER))
    lines = (tmp_path / summary["hash"] / "curves.csv").read_text().splitlines()
    names, *rows = (line.split(",") for line in lines)
    last = dict(zip(names, map(float, rows[-1]), strict=True))
    assert len(rows) == 2 and last["0.lr"] != 0.01
    for name in ("train_loss", "test_loss", "test_bits_per_character", "test_perplexity"):
        assert last[name] == summary[name]
    assert last["test_perplexity"] == pytest.approx(math.exp(last["test_loss"]))
    assert last["test_bits_per_character"] == pytest.approx(last["test_loss"] / math.log(2))
    assert last["test_loss"] < math.log(len(set(TINY)))
    assert summary["model"] == {"name": "char_rnn", "hidden": 5, "layers": 2}


MIXED = ("model=transformer", "model.hidden=8", "model.layers=1", "stack=AdamW(0.01) / SGD(1e-6)")


def test_a_transformer_whose_matrices_have_a_stack_of_their_own(tiny: Path, tmp_path: Path) -> None:
    muon = "stack.matrices=Muon(0.02, bfloat16=False)[lr: log] / SGD(0.1, normalize=True)"
    asked = config(tiny, tmp_path, *MIXED, muon)
    summary = train(asked)
    plain = config(tiny, tmp_path, *MIXED)
    assert summary["hash"] == run_hash(asked) != run_hash(plain)
    assert "matrices" not in identity(plain)
    assert summary["matrices"] == muon.partition("=")[2]
    learned = summary["hyperparameters"][0]
    assert learned["lr[0]"] != 0.02 and learned["lr[1]"] != 0.01
    assert summary["test_loss"] < math.log(len(set(TINY)))
    lines = (tmp_path / summary["hash"] / "hyperparameters.csv").read_text().splitlines()
    assert {"0.lr[0]", "0.lr[1]", "1.lr[0]", "1.lr[1]"} <= set(lines[0].split(","))


def test_runs_on_texts_and_on_images_are_summarised_together(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_text = train(config(tiny, tmp_path, "trainer.steps=2"))
    images = ["data=mnist-5k", "trainer.epochs=1", "device=cpu", "trainer.compile=false"]
    eager = [*images, "trainer.compile_model=false", f"store={tmp_path}"]
    of_images = train(resolve(compose(eager), "mnist-5k"))
    monkeypatch.setattr(sys, "argv", ["summarise", f"store={tmp_path}", "by=data"])
    assert summarise.main() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["data", "n", "diverged", "test_error", "test_perplexity", "train_loss"]
    assert lines[0].split()[:4] == ["mnist-5k", "1", "0", f"{of_images['test_error']:.4g}"]
    assert lines[1].split()[:4] == ["war_and_peace", "1", "0", f"{of_text['test_perplexity']:.4g}"]


@pytest.mark.parametrize("every", ["null", "5"])
@pytest.mark.parametrize("stack", [TOWER, "stack=Adam(0.01)[lr: log] / Adam(0.01) / SGD(1e-5)"])
def test_a_run_cut_in_mid_epoch_ends_as_if_it_had_not_been(
    tiny: Path, tmp_path: Path, every: str, stack: str
) -> None:
    """Including hidden state and hyperparameters; a checkpoint is written every five steps."""
    overrides = (stack, f"trainer.checkpoint_every={every}")
    whole = train(config(tiny, tmp_path / "whole", *overrides))
    broken = config(tiny, tmp_path / "broken", *overrides)
    run = RunStore(broken.store).run(run_hash(broken))

    def cut(progress: Progress) -> None:
        if progress.step in at:
            at.remove(progress.step)
            raise KeyboardInterrupt

    at = [12, 48, 60]  # 37 steps are an epoch
    for step, resumed_at in ((12, 10), (48, 45), (60, 60)):
        with pytest.raises(KeyboardInterrupt):
            train(broken, cut)
        state: Any = run.checkpoint() or {"step": 0}
        if every == "5":
            # Reports come before the checkpoint of the same step.
            assert state["step"] == (55 if step == 60 else resumed_at)
            assert state["task"]["h"].abs().sum() > 0
        else:
            assert state["step"] == (0 if step == 12 else 37)
    again = train(broken)
    assert result(again) == result(whole)
    for name in ("curves.csv", "hyperparameters.csv"):
        texts = [(tmp_path / w / again["hash"] / name).read_text() for w in ("broken", "whole")]
        assert texts[0] == texts[1]
    weights = [
        torch.load(tmp_path / w / again["hash"] / "model.pt", weights_only=True)
        for w in ("broken", "whole")
    ]
    for name, tensor in weights[0]["model"].items():
        assert tensor.equal(weights[1]["model"][name]), name


def test_a_run_cut_between_its_last_step_and_its_end_has_its_last_epoch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(tiny, tmp_path / "whole", TOWER, "trainer.checkpoint_every=1"))
    broken = config(tiny, tmp_path / "broken", TOWER, "trainer.checkpoint_every=1")

    def interrupt(task: LanguageModel, model: nn.Module) -> dict[str, float]:
        raise KeyboardInterrupt

    for _ in range(2):  # at the end of the first epoch, twice
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LanguageModel, "evaluate", interrupt)
            train(broken)
    evaluate, done = LanguageModel.evaluate, list[int]()

    def second(task: LanguageModel, model: nn.Module) -> dict[str, float]:
        done.append(1)
        return interrupt(task, model) if len(done) == 2 else evaluate(task, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LanguageModel, "evaluate", second)
        train(broken)
    assert result(train(broken)) == result(whole)


def test_the_checkpoint_interval_is_not_in_the_identity(tiny: Path, tmp_path: Path) -> None:
    hashes = {
        run_hash(config(tiny, tmp_path, f"trainer.checkpoint_every={every}"))
        for every in ("null", "1", "7")
    }
    assert len(hashes) == 1
    others = ("data.validation=true", "trainer.clip_value=1", "trainer.sequence_length=6")
    assert len(hashes | {run_hash(config(tiny, tmp_path, other)) for other in others}) == 4


def test_gradients_are_clamped(tiny: Path, tmp_path: Path) -> None:
    """With SGD of lr 1, no weight moves by more than the bound times the steps."""
    start = config(tiny, tmp_path, "stack=SGD(0)", "trainer.steps=1")
    moved = config(tiny, tmp_path, "stack=SGD(1)", "trainer.steps=1", "trainer.clip_value=0.01")
    runs = [train(start)["hash"], train(moved)["hash"]]
    weights = [torch.load(tmp_path / run / "model.pt", weights_only=True)["model"] for run in runs]
    steps = torch.cat([(weights[1][name] - weights[0][name]).flatten() for name in weights[0]])
    assert steps.abs().max().item() == pytest.approx(0.01, rel=1e-4)
    assert (steps.abs() < 0.009).any()


def test_a_run_that_diverges_is_a_result(tiny: Path, tmp_path: Path) -> None:
    summary = train(config(tiny, tmp_path, "stack=SGD(1e42)"))
    assert summary["diverged"] and summary["test_perplexity"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=mlp"], "model.name='mlp' does not read text; give model=char_rnn"),
        (["data=mnist-5k"], "model.name='char_rnn' does not read grey images"),
        (["stack.matrices=Muon(x)"], "expected '=' after x, found ')' (column 7"),
        (["stack.matrices=Muon(0.1)", "stack=Prodigy(1.0)"], "Prodigy(1.0) is of another package"),
        (["stack.matrices=Muon(0.1)", "schedule=linear"], "stack.matrices needs schedule=constant"),
        (["trainer.sequence_length=null"], "trainer.sequence_length=None must be 1 or more for"),
        (["model.hidden=0"], "model.hidden=0 must be 1 or more for text"),
        (
            ["trainer.compile_model=true"],
            "trainer.compile_model=true does not apply to text; give trainer.compile_mod",
        ),
        (["trainer.clip_value=0"], "trainer.clip_value=0.0 must be a number above 0, or null"),
        (["trainer.checkpoint_every=0"], "trainer.checkpoint_every=0 must be 1 or more, or null"),
        (
            ["data.augment=true"],
            "data.augment=true does not apply to text; give data.augment=false",
        ),
    ],
)
def test_a_bad_value_gets_one_clear_line(tiny: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(tiny, tiny, *overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["data.validation=true", "trainer.sequence_length=5", "model.hidden=3"]
)
def test_options_of_texts_are_refused_for_images(override: str) -> None:
    with pytest.raises(ValueError, match=f"{override} does not apply to grey images; "):
        resolve(compose(["data=mnist-5k", override]), "mnist-5k")


# Sources of the book.

HEADER = (
    "The Project Gutenberg eBook of X\r\n\r\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n"
)
LICENCE = "\r\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\nSection 1."


def answer(content: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fake a download's content; returns the list of requests."""
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if not content:
            raise TimeoutError
        return io.BytesIO(content)

    monkeypatch.setattr(corpus.urllib.request, "urlopen", urlopen)
    return asked


def test_gutenbergs_header_and_licence_are_stripped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body of the expected download has the same name as the bare file."""
    body = TINY.strip()
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256(body.encode()).hexdigest())
    page = f"{HEADER}\r\n{body}\r\n{LICENCE}".encode("utf-8-sig")
    asked = answer(page, monkeypatch)
    root = tmp_path / "new"
    assert corpus.BOOK.resolve(corpus.NAME, root, download=True) == corpus.NAME
    assert corpus.BOOK.load(corpus.NAME, root).text == body
    assert corpus.BOOK.resolve(corpus.NAME, root, download=True) == corpus.NAME
    assert asked == [corpus.URL]


def test_another_edition_has_another_name_and_its_differences_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / corpus.FILE).write_text(TINY)
    name = f"{corpus.NAME}-{hashlib.sha256(TINY.encode()).hexdigest()[:8]}"
    wanted = compose([*SHORT, f"data.root={tmp_path}"])
    (found,) = resolve_all([wanted])
    assert found.data.name == name
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for words in ("has 600 characters, not 3,196,211", "begins 'to be", "lacks", "NOT comparable"):
        assert words in said
    assert corpus.BOOK.load(name, tmp_path).label == f"War and Peace (edition {name[-8:]})"
    (tmp_path / corpus.FILE).write_text(TINY + "!")
    for other in (name, corpus.NAME):
        with pytest.raises(
            ValueError, match=r"is War and Peace \(edition \w+\), not War and Peace"
        ):
            corpus.BOOK.load(other, tmp_path)
    with pytest.raises(ValueError, match=r"is War and Peace \(edition \w+\), not War and Peace"):
        resolve_all([replace(wanted, data=replace(wanted.data, name=name))])


@pytest.mark.parametrize("page", ["", "<html>Busy</html>"])
def test_without_the_book_the_error_names_the_file(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(page.encode(), monkeypatch)
    for download in (False, True):
        with pytest.raises(ValueError) as caught:
            corpus.BOOK.resolve(corpus.NAME, tmp_path, download)
        said = str(caught.value)
        assert ("could not be downloaded" in said) == download == bool(asked)
        assert f"put {corpus.FILE}" in said and "HYPEROPT_DATA" in said and "\n" not in said
    assert not (tmp_path / corpus.FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\xff", "is not text in UTF-8"),
        (
            (HEADER + TINY).encode(),
            "is cut short: it has Project Gutenberg's header, but not the licence",
        ),
    ],
)
def test_a_damaged_book_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / corpus.FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus.BOOK.resolve(corpus.NAME, tmp_path, False)

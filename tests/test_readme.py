"""All commands and code of README and docs/reproduce.md work as written."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import Digits
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_project import ROOT, make, make_targets
from test_rules import PLAIN

from experiments.cli import split
from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.overrides import protect_notation
from experiments.config.resolve import resolve
from experiments.sample import Options
from experiments.studies.char_rnn import runs as char_rnn
from experiments.studies.char_rnn.runs import cell_config
from hyperopt import RULES, Rule, format_value, parse

README = (ROOT / "README.md").read_text()


REPRODUCE = (ROOT / "docs" / "reproduce.md").read_text()
RULES_PAGE = (ROOT / "docs" / "rules.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh", README + REPRODUCE) for line in block.splitlines()]
MAKE = [command for command in COMMANDS if "make" in command.split()]
RUNS = [command for command in COMMANDS if command.startswith("python -m experiments.run ")]
SUMMARISE = [line for line in COMMANDS if line.startswith("python -m experiments.summarise")]
SAMPLES = [command for command in COMMANDS if command.startswith("python -m experiments.sample ")]
STACKS = re.findall(r"^\| `(.+?)` \|", REPRODUCE, re.MULTILINE)
# tests/test_wheel.py installs the package.
OTHER = {"source .venv/bin/activate", "pip install ."}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_command_is_one_that_is_tested() -> None:
    assert set(COMMANDS) - {*MAKE, *RUNS, *SUMMARISE, *SAMPLES} == OTHER


@pytest.mark.parametrize("command", MAKE)
def test_make_commands_are_known_to_make(command: str) -> None:
    words = shlex.split(command)
    words.remove("make")
    assert [word for word in words if "=" not in word and word not in make_targets()] == []
    done = make("-n", *words)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", RUNS)
def test_run_commands_compose(command: str) -> None:
    arguments = shlex.split(command)[3:]
    sweep = "-m" in arguments
    overrides = protect_notation([word for word in arguments if word != "-m"])
    parsed = OverridesParser.create().parse_overrides(overrides)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert sweep == (len(jobs) > 1)
    told = re.search(r"a sweep of (\d+) runs", README)
    assert not sweep or (told and int(told[1]) == len(jobs))
    for job in jobs[0], jobs[-1]:
        compose(job)


@pytest.mark.parametrize("command", SAMPLES)
def test_sample_commands_name_a_run_that_the_page_makes(command: str) -> None:
    options, overrides = split(shlex.split(command)[3:], Options, ())
    assert not overrides
    first = cell_config(char_rnn.CELLS[0], 0, char_rnn.PRESETS["cpu"].overrides)
    assert options.run == run_hash(resolve(first, first.data.name))


@pytest.mark.parametrize("notation", STACKS)
def test_the_stacks_in_the_table_parse(notation: str) -> None:
    assert parse(str(parse(notation))) == parse(notation)


def test_python_examples_run_and_learn(
    mnist: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training loop halves the loss on a few real digits; the example of a rule trains too."""
    train, rule = blocks("python")
    monkeypatch.chdir(tmp_path)
    x = mnist.x_train[:1024].flatten(1).float() / 255
    loader = list(zip(x.split(64), mnist.y_train[:1024].split(64), strict=True))
    model = torch.nn.Linear(784, 10)
    loss_fn = torch.nn.CrossEntropyLoss()
    names = {"model": model, "loader": loader * 4, "loss_fn": loss_fn}

    def loss() -> float:
        with torch.no_grad():
            return loss_fn(model(x), mnist.y_train[:1024]).item()

    with patch.dict(RULES):
        before = loss()
        exec(train, names)
        halfway = loss()
        assert halfway < before / 2

        exec(rule, names)
        (loop,) = re.findall(r"^for .*\n(?:    .*\n)+", train, re.MULTILINE)
        exec(loop, names)
        assert loss() < halfway
        (lowest, _) = names["optimizer"].hyperparameters()  # type: ignore[attr-defined]
        assert lowest["lr"] != 1e-3, "the level above has not moved the new rule's lr"
        assert parse("SignSGD(1e-3) / SGD(1e-8)").height == 1


def cell(rule: type[Rule], names: Iterable[str]) -> str:
    """Hyperparameters with their defaults and domains; in parentheses if off by default."""
    texts = []
    for hyper in map(rule.hypers.__getitem__, names):
        text = f"`{hyper.name}={format_value(hyper.default)}` {hyper.domain.name}"
        texts.append(text if hyper.default or not hyper.tuned else f"({text})")
    return ", ".join(texts)


def test_the_table_of_rules_is_that_of_the_code() -> None:
    peers = {parse(stack).levels[0].name: peer for stack, peer, _, _ in PLAIN}
    peers |= {name: name for name, rule in RULES.items() if not rule.elementwise}
    rows = [
        "| Rule | Tuned by default | Constant by default | Options | As | Tests |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rule in RULES.items():
        tuned, not_tuned = (
            [n for n, h in rule.hypers.items() if h.tuned is t] for t in (True, False)
        )
        own = {n: option.default for n, option in rule.options.items() if n not in vars(Rule)}
        options = ", ".join(f"`{n}={format_value(default)}`" for n, default in own.items())
        elsewhere = {"Lion": "its paper", "AdamWScheduleFree": "its authors' package"}
        elsewhere["SOAP"] = "its authors' code"
        peer = elsewhere.get(peers[name], f"`torch.optim.{peers[name]}`")
        rows.append(
            f"| `{name}` | {cell(rule, tuned)} | {cell(rule, not_tuned)} | {options} | {peer} "
            f"| `pytest -k {name}` |"
        )
    section = RULES_PAGE.partition("## All rules\n\n")[2].partition("\n\n")[0]
    assert section == "\n".join(rows)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_links_have_targets() -> None:
    targets = re.findall(r"\]\(([^)]+?)\)", README)
    local = [target.partition("#") for target in targets if not target.startswith("http")]
    assert local
    assert [path for path, _, _ in local if not (ROOT / path).exists()] == []
    assert [
        f"{path}#{anchor}"
        for path, _, anchor in local
        if anchor and anchor not in anchors(ROOT / path)
    ] == []


def test_code_fences_are_of_known_kinds() -> None:
    kinds = re.findall(r"^```(\w*)$", README, re.MULTILINE)
    assert set(kinds[::2]) <= {"sh", "python", "bibtex"}
    assert set(kinds[1::2]) == {""}

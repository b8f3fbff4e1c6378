"""Everything that the README tells a reader to type works as written."""

import csv
import json
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import pandas as pd
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
from experiments.studies.figure2.cost import words
from experiments.studies.step_time.report import bars
from hyperopt import RULES, Rule, format_value, parse

README = (ROOT / "README.md").read_text()


@pytest.fixture
def results(committed: Callable[[str], Path]) -> Path:
    return committed("README.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
MAKE = [command for command in COMMANDS if "make" in command.split()]
RUNS = [command for command in COMMANDS if command.startswith("python -m experiments.run ")]
SUMMARISE = [line for line in COMMANDS if line.startswith("python -m experiments.summarise")]
SAMPLES = [command for command in COMMANDS if command.startswith("python -m experiments.sample ")]
STACKS = re.findall(r"^\| `(.+?)` \|", README, re.MULTILINE)


def test_every_command_is_one_that_is_tested() -> None:
    assert set(COMMANDS) - {*MAKE, *RUNS, *SUMMARISE, *SAMPLES} == {"source .venv/bin/activate"}


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
def test_sample_commands_name_a_run_that_the_readme_makes(command: str) -> None:
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
    train, keep, rule = blocks("python")
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

        exec(keep, names)
        learned = names["schedule"].values["lr"]  # type: ignore[attr-defined]
        assert names["plain"].param_groups[0]["lr"] == learned[0]  # type: ignore[attr-defined]

        exec(rule, names)
        (loop,) = re.findall(r"^for .*\n(?:    .*\n)+", train, re.MULTILINE)
        exec(loop, names)
        assert loss() < halfway
        (lowest, _) = names["optimizer"].hyperparameters()  # type: ignore[attr-defined]
        assert lowest["lr"] != 1e-3, "the level above has not moved the new rule's lr"
        assert parse("SignSGD(1e-3) / SGD(1e-8)").height == 1


def test_results_are_those_of_the_committed_table(results: Path) -> None:
    shown = re.findall(r"^\| `(.+?)` \| (\S+ ± \S+) \| (\S+ ± \S+) \|$", README, re.MULTILINE)
    agreeing = re.findall(r"Of the (\d+) rows of the paper's Table 1,[^.]*? (\d+) agree", README)
    table = (results / "table1" / "paper" / "table.csv").read_text()
    rows = {row["row"]: row for row in csv.DictReader(table.splitlines())}
    assert shown
    for stack, *errors in shown:
        for source, error in zip(("published", "our"), errors, strict=True):
            mean, sd = (float(rows[stack][f"{source}_{what}"]) for what in ("error", "sd"))
            assert error == f"{mean:.2f} ± {sd:.2f}", (stack, source)
    agrees = sum(row["agrees"] == "True" for row in rows.values())
    assert agreeing == [(str(len(rows)), str(agrees))]
    (other,) = (row for row in rows.values() if row["agrees"] != "True")
    (package,) = re.findall(r"run on the same data, gives ([\d.]+ ± [\d.]+)\.", README)
    assert package == f"{float(other['rerun_error']):.2f} ± {float(other['rerun_sd']):.2f}"
    assert shown[-1][0] == other["row"]


def cell(rule: type[Rule], names: Iterable[str]) -> str:
    """Hyperparameters with their defaults and domains; in parentheses if off by default."""
    texts = []
    for hyper in map(rule.hypers.__getitem__, names):
        text = f"`{hyper.name}={format_value(hyper.default)}` {hyper.domain.name}"
        texts.append(text if hyper.default or not hyper.tuned else f"({text})")
    return ", ".join(texts)


def test_the_table_of_rules_is_that_of_the_code() -> None:
    peers = {parse(stack).levels[0].name: peer for stack, peer, _, _ in PLAIN}
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
        peer = elsewhere.get(peers[name], f"`torch.optim.{peers[name]}`")
        rows.append(
            f"| `{name}` | {cell(rule, tuned)} | {cell(rule, not_tuned)} | {options} | {peer} "
            f"| `pytest -k {name}` |"
        )
    section = README.partition("## The rules\n\n")[2].partition("\n\n")[0]
    assert section == "\n".join(rows)


def test_the_costs_are_those_of_the_committed_benchmark(results: Path) -> None:
    times, compiling = (
        pd.read_csv(results / "step_time" / name) for name in ("times.csv", "compile.csv")
    )
    found = [value for _, _, _, value in bars(times, compiling)]
    (share,) = re.findall(r"takes ([\d.]+) times as long as torch's own Adam", README)
    (faster,) = re.findall(r"height 50 is (\d+) times faster", README)
    assert share == f"{found[0]:.2f}"
    assert faster == f"{found[7]:.0f}"


def test_the_errors_of_taller_towers_are_those_of_the_committed_figure(results: Path) -> None:
    points = pd.read_csv(results / "figure3" / "cpu" / "table.csv")
    errors = points.set_index(["rule", "height", "lr"]).sort_index().test_error
    plain, tall = re.findall(
        r"gets ([\d.]+) % of the\s+test digits.*?ends at ([\d.]+) %", README, re.S
    )[0]
    assert float(plain) == round(errors["Adam", 0, 1e-8], 1)
    assert float(tall) == round(errors["Adam", 5, 1e-8], 1)
    (low, high) = re.findall(r"heights 2 and 5\s+end at ([\d.]+) and ([\d.]+) %", README)[0]
    assert [float(low), float(high)] == [round(errors["Adam", k, 1e-4], 1) for k in (2, 5)]
    (best,) = re.findall(r"step size of ([\d.]+) with which plain SGD does best", README)
    assert float(best) == float(f"{errors['SGD', 0].idxmin():.3g}")


def test_auto_s_worst_starts_are_those_of_the_committed_benchmark(results: Path) -> None:
    points = pd.read_csv(results / "robustness" / "paper" / "table.csv")
    auto = points[points.method == "Auto"]
    ratios = auto.groupby("task").ratio
    section = README.partition("## Any start")[2].partition("\n## ")[0]
    counts = re.findall(r"[Ff]rom (\d+)\s+starts", section)
    told = re.findall(r"([\d.]+)\s+times", section)
    tasks = "mlp", "mlp30", "softmax", "char_rnn", "resnet"
    assert told == [f"{ratios.max()[task]:.2f}" for task in tasks]
    sizes = ratios.size()
    assert int(counts[0]) == sizes["mlp"] == sizes["mlp30"] == sizes["softmax"]
    assert int(counts[1]) == sizes["char_rnn"] == sizes["resnet"]
    assert {*re.findall(r"with (\d+) seeds", section)} == {"3"} and (auto.n == 3).all()


def test_the_perplexities_are_those_of_the_committed_table(results: Path) -> None:
    cells = pd.read_csv(results / "char_rnn" / "cpu" / "table.csv").set_index(["kind", "lr"])
    section = README.partition("## A character RNN")[2].partition("\n## ")[0]
    found = re.findall(r"\b\d+\.\d\d\b", section)
    runs = [(kind, lr) for lr in (1e-4, 1e-2) for kind in ("plain", "tower")] + [("free", 1e-4)]
    assert found == [f"{cells.test_perplexity[run]:.2f}" for run in runs]


def test_the_errors_of_figure_2_are_those_of_the_committed_table(results: Path) -> None:
    table = pd.read_csv(results / "figure2" / "cpu" / "table.csv")
    cells = table.set_index(["kind", "lr", "momentum"])
    plain, tower, error = cells.loc["plain"], cells.loc["tower"], cells.test_error
    above = tower.train_loss - plain.train_loss
    section = README.partition("## A schedule that nobody wrote")[2].partition("\n## ")[0]
    facts = (
        f"test error of {error['he', 0.1, 0.9]:.2f} %, "
        f"the best tower at {tower.test_error.min():.2f} %",
        f"From {(tower.test_error < plain.test_error).sum()} of the 9 starts the tower ends",
        f"at {error['tower', 1, 0.09]:.2f} % and not at {error['plain', 1, 0.09]:.2f} %",
        f"no worse from {(above <= 0).sum()} of the 9",
        f"From {((above > 0) & (above < 0.01)).sum()} others it is at most "
        f"{above[above < 0.1].max():.3f} nats above",
        f"end {tower.train_loss[0.1, 0.9] - cells.train_loss['replay', 0.1, 0.9]:.3f} apart",
        f"from 0.1 to {tower.learned_lr[0.1].min():.3f} "
        f"and from 1 to {tower.learned_lr[1].min():.2f}",
    )
    words = " ".join(section.split())
    assert [fact for fact in facts if fact not in words] == []
    assert set(table.n) == {1} and "10 epochs for the paper's 64,000 steps, and one seed" in words
    assert (tower.test_error[1, 0.9], plain.test_error[1, 0.9] < 50) == (90, True)


def test_the_cost_of_figure_2_is_what_was_counted(results: Path) -> None:
    gflop, operators = re.findall(r"a step\s+is ([\d.]+) GFLOP in (\d+) operators", README)[0]
    cost = json.loads((results / "figure2" / "cost.json").read_text())
    assert (gflop, int(operators)) == (f"{cost['gflop']:.1f}", cost["operators"])
    minutes, hours = re.findall(r"about (\d+) minutes,\s+and all 60 take (\d+) hours", README)[0]
    estimate = words(cost)
    assert f"{minutes} minutes of launching at 20 µs" in estimate
    assert f"all 60 of them, one after the other, would take {hours} hours" in estimate


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+?)\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [target for target in targets if not target.startswith("http")]
    assert local
    assert [target for target in local if not (ROOT / Path(target)).exists()] == []


def test_code_fences_are_of_known_kinds() -> None:
    kinds = re.findall(r"^```(\w*)$", README, re.MULTILINE)
    assert set(kinds[::2]) <= {"sh", "python", "bibtex"}
    assert set(kinds[1::2]) == {""}

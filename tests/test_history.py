"""Histories record, draw and print all levels; callbacks log them in other packages."""

import math
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from test_frameworks import LOADER, TOKENS, small_transformer
from test_loops import Net, batch, loss_of

from hyperopt import Auto, History, HyperOptimizer, lightning_callback, trainer_callback

STACK = "SGD(0.1, momentum=0.9) / SGD({lr: 1e-4, momentum: 1e-3}) / SGD(1e-8)"


def train(model: Net, optimizer: HyperOptimizer, steps: int) -> None:
    for t in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(t)).backward()
        optimizer.step()


def watched(stack: str = STACK, steps: int = 6, **own: Any) -> tuple[HyperOptimizer, History]:
    model = Net()
    optimizer = HyperOptimizer(model.parameters(), stack, compile=False)
    history = History(optimizer, **own)
    train(model, optimizer, steps)
    return optimizer, history


@pytest.fixture(autouse=True)
def plain_style() -> Iterator[None]:
    """Use matplotlib's own style; other tests load the studies' style."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def test_it_keeps_the_values_of_snapshots() -> None:
    model = Net()
    optimizer = HyperOptimizer(model.parameters(), STACK, compile=False)
    history, expected = History(optimizer), []
    for _ in range(5):
        train(model, optimizer, 1)
        expected.append(optimizer.snapshot().tolist())
    assert history.steps == [1, 2, 3, 4, 5]
    values = history.values()
    assert tuple(values) == optimizer.names
    np.testing.assert_array_equal(np.array(list(values.values())).T, expected)
    assert len(set(values["0.lr"])) >= 4  # the first step does not move it

    history.stop()
    train(model, optimizer, 1)
    assert history.steps == [1, 2, 3, 4, 5]


def test_every_so_many_steps() -> None:
    assert watched(steps=7, every=3)[1].steps == [3, 6]


def test_later_names_are_nan_before() -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = HyperOptimizer([first], "SGD(0.1)[lr: per group] / SGD(1e-3)", compile=False)
    history = History(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        (first.square().sum() + second.square().sum()).backward()
        optimizer.step()

    step()
    optimizer.add_param_group({"params": [second]})
    step()
    late = history.values()["0.lr[1]"]
    assert math.isnan(late[0]) and late[1] > 0
    assert history.plot() is not None


def ink(path: Path) -> float:
    """The share of pixels that are not white."""
    return float((np.asarray(Image.open(path).convert("L")) < 250).mean())


def test_a_figure_has_a_panel_for_each_hyperparameter_that_moved(tmp_path: Path) -> None:
    _, history = watched(steps=30)
    figure = history.plot(tmp_path / "all.png")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["lr of level 0", "momentum of level 0", "lr of level 1"]
    values = history.values()
    drawn = {axis.get_title(): axis.lines[0].get_ydata() for axis in figure.axes}
    assert list(drawn["momentum of level 0"]) == values["0.momentum"]
    assert Image.open(tmp_path / "all.png").size == (1200, 260) and ink(tmp_path / "all.png") > 0.01

    history.plot(tmp_path / "one.png", names=["0.momentum"])
    assert Image.open(tmp_path / "one.png").size == (400, 260) and ink(tmp_path / "one.png") > 0.01
    with pytest.raises(ValueError, match=r"there is no '0\.momentun'; the names are 0\.lr"):
        history.plot(names=["0.momentun"])


def test_large_factors_are_drawn_on_a_log_scale() -> None:
    model = Net()
    optimizer = Auto(model.parameters(), compile=False)
    history = History(optimizer)
    train(model, optimizer, 30)
    (lr,) = (axis for axis in history.plot().axes if axis.get_title() == "lr of level 0")
    assert lr.get_yscale() == "log"


def test_each_tensor_is_a_line_with_its_name() -> None:
    model = Net()
    stack = "SGD(0.1)[lr: per tensor] / SGD(1e-3)"
    optimizer = HyperOptimizer(model.named_parameters(), stack, compile=False)
    history = History(optimizer)
    train(model, optimizer, 4)
    (axis,) = history.plot().axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: History(torch.optim.SGD([torch.ones(1)])), TypeError, "HyperOptimizer, not a S"),  # type: ignore[arg-type]
        (lambda o: History(o, every=0), ValueError, "every=0 must be 1 or more"),
        (lambda o: History(o, show_every=-1), ValueError, "show_every=-1 0 or more"),
        (lambda o: History(o).plot(), ValueError, "the optimizer has made no step"),
    ],
)
def test_bad_input_is_one_clear_line(make: Any, error: type[Exception], message: str) -> None:
    optimizer = HyperOptimizer(Net().parameters(), STACK, compile=False)
    with pytest.raises(error, match=message):
        make(optimizer)


def test_in_a_terminal_it_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer, _ = watched(steps=5, show_every=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 2", "step 4"]
    assert all(f" {name} " in lines[0] for name in optimizer.names)


def test_in_a_notebook_it_draws_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    handle = SimpleNamespace(update=shown.append)

    def display(figure: Any, display_id: bool) -> Any:
        shown.append(figure)
        return handle

    notebook = SimpleNamespace(
        get_ipython=lambda: SimpleNamespace(kernel=None),
        display=SimpleNamespace(display=display),
    )
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    watched(steps=7, show_every=2)
    assert [len(figure.axes[0].lines[0].get_ydata()) for figure in shown] == [2, 4, 6]
    assert Image.open(BytesIO(shown[-1]._repr_png_())).size[0] > 600


def test_it_imports_nothing_before_it_draws() -> None:
    code = (
        "import sys, torch, hyperopt\n"
        "p = torch.nn.Parameter(torch.ones(2))\n"
        "o = hyperopt.HyperOptimizer([p], 'SGD(0.1) / SGD(1e-3)', compile=False)\n"
        "h = hyperopt.History(o); p.sum().backward(); o.step()\n"
        "print({'matplotlib', 'IPython', 'transformers', 'lightning'} & set(sys.modules))\n"
        "for make in hyperopt.lightning_callback, lambda: hyperopt.trainer_callback(None):\n"
        "    try: make()\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "set()",
        "import lightning.pytorch or pytorch_lightning first: the callback belongs to it",
        "import transformers first: the callback belongs to it",
    ], done.stderr


@pytest.mark.filterwarnings("ignore")  # what they say of their own code and of the loader
def test_lightning_logs_all_names(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("pytorch_lightning")
    rows: list[dict[str, float]] = []

    class Recorder(lightning.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            rows.append(metrics)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, x: torch.Tensor) -> torch.Tensor:
            return loss_of(self.net, x)

        def configure_optimizers(self) -> HyperOptimizer:
            return HyperOptimizer(self.parameters(), STACK, compile=False)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        callbacks=[lightning_callback()],
        log_every_n_steps=1,
        logger=Recorder(str(tmp_path)),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, LOADER)
    optimizer: Any = module.optimizers()
    names = optimizer.optimizer.names
    assert len(rows) == 8 and all(set(names) <= set(row) for row in rows)
    last = optimizer.optimizer.hyperparameters()[0]["lr"]
    assert rows[-1]["0.lr"] == pytest.approx(last, rel=1e-6)
    assert len({row["0.lr"] for row in rows}) >= 7


@pytest.mark.filterwarnings("ignore")  # what they say of their own code
def test_the_trainer_logs_all_names(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_transformer()
    optimizer = HyperOptimizer(model.parameters(), "AdamW(1e-3) / SGD(1e-5)", compile=False)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=10,
        logging_steps=5,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=TOKENS, optimizers=(optimizer, None)
    )
    trainer.add_callback(trainer_callback(trainer))
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "0.lr" in entry]
    assert [entry["step"] for entry in found] == [5, 10]
    assert all(set(optimizer.names) <= set(entry) for entry in found)
    assert found[-1]["0.lr"] == pytest.approx(optimizer.hyperparameters()[0]["lr"], rel=1e-6)

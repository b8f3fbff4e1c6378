"""The loops of other packages take the optimizer as any other, and it does the same there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_loops import Net, batch, loss_of, made, same
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from hyperopt import HyperOptimizer

STACK = "AdamW(0.05)[beta1, beta2] / SGD({beta1: 1e-2, beta2: 0.1}, momentum=0.5) / SGD(1e-3)"
EPOCHS, BATCHES = 3, 4
DATA: Any = torch.cat([batch(t) for t in range(BATCHES)])
LOADER: DataLoader = DataLoader(DATA, batch_size=len(DATA) // BATCHES)


@pytest.fixture
def expected() -> tuple[Net, HyperOptimizer]:
    """Two batches for each step, gradients clipped, the step size decaying."""
    model, optimizer = made(STACK)
    for t in range(0, EPOCHS * BATCHES, 2):
        optimizer.zero_grad()
        for i in (t, t + 1):
            (loss_of(model, batch(i % BATCHES)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    return model, optimizer


def test_accelerate(expected, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = made(STACK)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, plain, LOADER, ExponentialLR(plain, 0.9)
    )

    def train_an_epoch() -> None:
        for x in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    train_an_epoch()
    accelerator.save_state(str(tmp_path))
    train_an_epoch()
    accelerator.load_state(str(tmp_path))
    for _ in range(1, EPOCHS):
        train_an_epoch()
    same((model, plain), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore")  # what they say of their own code and of the loader
def test_lightning(expected, tmp_path):
    lightning: Any = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, x: Tensor) -> Tensor:
            return loss_of(self.net, x)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = HyperOptimizer(self.parameters(), STACK, compile=False)
            schedule = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    def fit(module: Module, epochs: int, start: Path | None = None) -> None:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, LOADER, ckpt_path=start)
        trainer.save_checkpoint(tmp_path / "checkpoint")

    fit(Module(), 1)
    module: Any = Module()
    fit(module, EPOCHS, tmp_path / "checkpoint")
    same((module.net, module.optimizers().optimizer), expected, rtol=1e-12)

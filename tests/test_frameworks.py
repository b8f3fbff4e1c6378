"""Training loops of other packages accept the optimizer, with the same results."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_loops import Net, batch, loss_of, made, same, same_weights
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, LinearLR
from torch.utils.data import DataLoader

from hyperopt import Auto, HyperOptimizer

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


@pytest.mark.filterwarnings("ignore")  # warnings about their own code and the loader
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


def small_transformer() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


TOKENS = [{"input_ids": [(3 * i + t) % 16 for t in range(8)]} for i in range(8)]
TOKENS = [{**entry, "labels": entry["input_ids"]} for entry in TOKENS]
MAKERS: dict[str, Any] = {
    "Auto": lambda params: Auto(params, 1e-3, compile=False),
    "tower": lambda params: HyperOptimizer(params, "AdamW(1e-3) / SGD(1e-5)", compile=False),
}


def trained_by_hugging_face(model: Any, make: Any, folder: Path, **own: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=20, **own
    )
    optimizer = make(p for p in model.parameters() if p.requires_grad)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=TOKENS, optimizers=(optimizer, None)
    )
    before = trainer.evaluate(TOKENS)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(TOKENS)["eval_loss"] < before
    return trainer


@pytest.mark.filterwarnings("ignore")  # what they say of their own code
@pytest.mark.parametrize("name", MAKERS)
def test_hugging_face_trainer(name, tmp_path):
    """Its default schedule is linear to 0."""
    trainer = trained_by_hugging_face(small_transformer(), MAKERS[name], tmp_path, logging_steps=5)
    learned = trainer.optimizer.optimizer.hyperparameters()[0]
    assert learned["effective_lr"] == 0 != learned["lr"]
    rates = [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ]
    assert rates == pytest.approx([1e-3 * (16 - 5 * i) / 20 for i in range(4)])


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer_resumes_from_a_checkpoint(tmp_path):
    def run(folder: Path, start: str | None, save: bool) -> Any:
        model, make = small_transformer(), MAKERS["tower"]
        own = {"save_strategy": "steps", "save_steps": 10} if save else {"save_strategy": "no"}
        transformers = pytest.importorskip("transformers")
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=20,
            **own,
        )
        optimizer = make(model.parameters())
        trainer = transformers.Trainer(
            model, arguments, train_dataset=TOKENS, optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=start)
        return model, optimizer

    whole = run(tmp_path, None, True)
    again = run(tmp_path / "again", str(tmp_path / "checkpoint-10"), False)
    same(again, whole, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_low_rank_adapters(name, tmp_path):
    """PEFT freezes the model, and trains matrices of its own."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(small_transformer(), config)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = trained_by_hugging_face(model, MAKERS[name], tmp_path)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert len(trainer.optimizer.state) == len([*model.parameters()]) - len(base)


@pytest.mark.parametrize("name", MAKERS)
def test_accelerate_prepares_an_optimizer_with_its_schedule(name):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net, peer = Net(), Net()
    plain, other = (MAKERS[name](model.parameters()) for model in (net, peer))
    schedule = LinearLR(plain, 1.0, 0.1, 6)
    model, optimizer, loader, scheduler = accelerator.prepare(net, plain, LOADER, schedule)
    by_hand = LinearLR(other, 1.0, 0.1, 6)
    for _ in range(2):
        for x in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, x))
            optimizer.step()
            scheduler.step()
        for x in LOADER:
            other.zero_grad()
            loss_of(peer, x).backward()
            other.step()
            by_hand.step()
    same((net, plain), (peer, other))
    learned = plain.hyperparameters()[0]
    assert learned["effective_lr"] == pytest.approx(0.1 * learned["lr"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_lightning_with_a_schedule_its_lr_finder_and_weight_averaging(name, tmp_path):
    lightning: Any = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.callbacks import StochasticWeightAveraging
    from pytorch_lightning.tuner import Tuner

    class Module(lightning.LightningModule):
        lr = 1e-3

        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, x: Tensor) -> Tensor:
            return loss_of(self.net, x)

        def configure_optimizers(self) -> Any:
            optimizer = MAKERS[name](self.parameters())
            return [optimizer], [ExponentialLR(optimizer, 0.9)]

    def trainer(callbacks: Any = None, epochs: int = 8) -> Any:
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )

    module = Module()
    finder = Tuner(trainer()).lr_find(module, LOADER, num_training=20, early_stop_threshold=None)
    assert finder is not None and len(finder.results["lr"]) == 20
    with torch.no_grad():
        before = loss_of(module.net, DATA).item()
    trainer().fit(module, LOADER)
    learned = module.optimizers().optimizer.hyperparameters()[0]
    assert learned["effective_lr"] == pytest.approx(0.9**8 * learned["lr"])
    with torch.no_grad():
        assert loss_of(module.net, DATA).item() < before
    averaged = Module()
    trainer(StochasticWeightAveraging(1e-2, swa_epoch_start=3)).fit(averaged, LOADER)
    with torch.no_grad():
        assert loss_of(averaged.net, DATA).item() < before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_skorch(name):
    skorch = pytest.importorskip("skorch")
    from skorch.callbacks import LRScheduler

    net = skorch.NeuralNetRegressor(
        Net(torch.float32),
        optimizer=lambda groups, lr: MAKERS[name](groups),
        callbacks=[LRScheduler("ExponentialLR", gamma=0.9)],
        max_epochs=8,
        train_split=None,
        verbose=0,
    )
    x = DATA.float()
    net.fit(x.numpy(), x[:, :2].sin().numpy())
    assert net.history[-1]["train_loss"] < net.history[0]["train_loss"]
    learned = net.optimizer_.hyperparameters()[0]
    assert learned["effective_lr"] < 0.5 * learned["lr"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_fastai(name):
    """It is not among the packages that are tested with: it brings a hundred others."""
    fastai = pytest.importorskip("fastai.optimizer")
    model, plain = Net(), Net()
    wrapped = fastai.OptimWrapper(opt=MAKERS[name](model.parameters()))
    optimizer = MAKERS[name](plain.parameters())
    for t in range(4):
        wrapped.set_hyper("lr", 1e-3 / (t + 1))
        optimizer.param_groups[0]["lr"] = 1e-3 / (t + 1)
        for net, o in ((model, wrapped), (plain, optimizer)):
            o.zero_grad()
            loss_of(net, batch(t)).backward()
            o.step()
    same_weights(model, plain)

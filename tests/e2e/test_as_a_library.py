"""Every part in a stock Trainer, with stock callbacks and loggers; and those through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from commands import fit
from data_helpers import many_texts, write_jsonl
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import t6_lightning
from datamodules import PythonDocs, TextFiles
from t6_lightning import T6Config, T6Module, TPAConfig
from t6_lightning.checkpoint.io import VerifiedCheckpointIO
from t6_lightning.common.errors import BadInput
from t6_lightning.runs.folder import RunFolder
from t6_lightning.training.callbacks.cadence import Cadence
from t6_lightning.training.callbacks.checkpoints import Checkpoints
from t6_lightning.training.callbacks.monitor import Monitor
from t6_lightning.training.callbacks.progress import TrainingProgress
from t6_lightning.training.callbacks.seeds import StepSeeds
from t6_lightning.training.callbacks.spikes import SpikeGuard
from t6_lightning.training.optim import AdamWConfig
from t6_lightning.training.schedule import Cosine

CONTEXT = 32


def net(dropout: float = 0.0) -> T6Config:
    attention = TPAConfig(n_heads=3, head_dim=16)
    return T6Config(
        vocab_size=257, d_model=32, n_layers=2, context=CONTEXT, dropout=dropout, attention=attention
    )


def module(dropout: float = 0.0) -> T6Module:
    torch.manual_seed(0)
    return T6Module(net(dropout), AdamWConfig(lr=3e-3), Cosine(warmup_steps=2))


@pytest.fixture
def texts(home: Path, tmp_path: Path) -> Path:
    """About 60 windows of training text, and held-out documents of both kinds."""
    return write_jsonl(tmp_path / "texts.jsonl", many_texts(60))


def data(texts: Path, **settings: Any) -> TextFiles:
    options: dict[str, Any] = {"tokenizer": "bytes", "batch_size": 4, "context": CONTEXT} | settings
    return TextFiles(str(texts), val_fraction=0.3, **options)


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    usual = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(default_root_dir=folder, **(usual | settings))  # pyright: ignore[reportArgumentType]


class Losses(pl.Callback):
    """Loss and samples of every micro-batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[int]]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append((float(outputs["loss"]).hex(), batch["sample"].tolist()))


class Bigram(pl.LightningModule):
    """A user's own module, which knows nothing of this package."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(symbols, symbols)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            self.table(batch["tokens"]).flatten(0, 1), batch["targets"].flatten()
        )

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=10.0)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_stock_loggers_and_callbacks_work_over_two_epochs(texts: Path, tmp_path: Path) -> None:
    corpus = data(texts)
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_top_k=2)
    callbacks = [
        best, EarlyStopping("val/loss"), LearningRateMonitor("step"), EMAWeightAveraging(decay=0.5),
        DeviceStatsMonitor(cpu_stats=False), RichProgressBar(),
    ]  # fmt: skip
    t = trainer(
        tmp_path, max_epochs=2, logger=loggers, callbacks=callbacks, log_every_n_steps=3,
        plugins=[VerifiedCheckpointIO()], enable_progress_bar=True,
    )  # fmt: skip
    model = module()
    t.fit(model, corpus)
    per_epoch = len(corpus.train_dataloader())
    assert t.global_step == 2 * per_epoch > 20
    assert {"train/loss", "val/loss", "val/bits_per_byte", "optim/lr", "optim/grad_norm"} <= set(
        t.callback_metrics
    )
    found = rows(Path(loggers[0].log_dir) / "metrics.csv")
    train = [row for row in found if row["train/loss"]]
    assert [int(row["step"]) for row in train] == list(range(3, 2 * per_epoch + 1, 3)), (
        "the n-th step stands at n"
    )
    assert [int(row["step"]) for row in found if row["val/loss"]] == [per_epoch, 2 * per_epoch]
    factors = {n: model.schedule.factor(n - 1, 2 * per_epoch) for n in range(1, 2 * per_epoch + 1)}
    for row in train:
        assert float(row["optim/lr"]) == 3e-3 * factors[int(row["step"])], "the horizon is both epochs"
    monitored = [row for row in found if row.get("lr-AdamW")]
    assert [float(row["lr-AdamW"]) for row in monitored] == pytest.approx(
        [3e-3 * factors[int(row["step"]) + 1] for row in monitored]
    ), "LearningRateMonitor counts steps from 0, as Lightning does"
    events = EventAccumulator(str(loggers[1].log_dir)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [int(row["step"]) for row in train]
    kept = sorted(file.name for file in (tmp_path / "best").iterdir())
    assert len(kept) == 4, f"2 checkpoints, each beside its checksum: {kept}"
    assert best.best_model_path in {str(tmp_path / "best" / name) for name in kept}

    again = T6Module.load_from_checkpoint(best.best_model_path)
    model_alone, tokenizer = t6_lightning.load(best.best_model_path, device="cpu")
    assert tokenizer.decode(tokenizer.encode("four words of text")) == "four words of text"
    for name, value in model_alone.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value), name
    (test,) = t.test(again, corpus, verbose=False)
    assert {"test/loss", "test/perplexity", "test/bits_per_byte"} <= set(test)
    (validated,) = t.validate(again, corpus, verbose=False)
    assert validated["val/loss"] != test["test/loss"], "other documents"


def test_early_stopping_ends_a_run_that_no_longer_falls(texts: Path, tmp_path: Path) -> None:
    stop = EarlyStopping("val/loss", min_delta=10.0, patience=1)
    t = trainer(
        tmp_path, max_steps=1000, val_check_interval=5, check_val_every_n_epoch=None, callbacks=[stop]
    )
    t.fit(module(), data(texts))
    assert t.global_step == 10, "the second validation is not better by 10 nats"


@pytest.mark.parametrize("resumed_by", ["steps", "epochs"])
def test_a_stock_trainer_goes_on_to_the_last_bit(texts: Path, tmp_path: Path, resumed_by: str) -> None:
    """Dropout, accumulation and loader workers included; through the end of an epoch."""
    last = {"max_steps": 20} if resumed_by == "steps" else {"max_epochs": 3, "max_steps": -1}
    usual: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_val_batches": 0, **last}

    def losses(folder: Path, ckpt_path: str | None = None, **settings: Any) -> Losses:
        seen = Losses()
        save = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        # The position of epochs that are over is kept too.
        at_ends = ModelCheckpoint(folder, save_on_train_epoch_end=True, save_top_k=-1, filename="end-{epoch}")
        t = trainer(folder, callbacks=[StepSeeds(1), seen, save, at_ends], **(usual | settings))
        t.fit(module(dropout=0.1), data(texts, num_workers=2), ckpt_path=ckpt_path)
        return seen

    through = losses(tmp_path / "through")
    assert len(through.seen) >= 34
    stopped = losses(tmp_path / "stopped", max_steps=13)
    for file in ("step=5.ckpt", "step=10.ckpt", "end-epoch=0.ckpt"):
        step = torch.load(tmp_path / "stopped" / file, weights_only=True)["global_step"]
        rest = losses(tmp_path / f"rest-{file}", str(tmp_path / "stopped" / file))
        if (
            resumed_by == "steps"
        ):  # the first leg has the whole run's schedule only where steps say how long it is
            continue
        assert len(rest.seen) == len(through.seen) - 2 * step
        assert [samples for _, samples in rest.seen] == [samples for _, samples in through.seen[2 * step :]]
    rest = losses(tmp_path / "rest", str(tmp_path / "through" / "step=10.ckpt"))
    assert rest.seen == through.seen[20:], "losses and samples, to the last bit"
    assert stopped.seen[:2][0][1] == through.seen[:2][0][1]


def test_another_rate_and_a_longer_run_take_hold_on_resuming(texts: Path, tmp_path: Path) -> None:
    """So they do from a checkpoint of version 0.1.0, which has no scheduler."""
    save = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer(tmp_path, max_steps=10, limit_val_batches=0, callbacks=[save]).fit(module(), data(texts))
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    state["lr_schedulers"] = []
    torch.save(state, tmp_path / "before.ckpt")
    for file in ("step=5.ckpt", "before.ckpt"):
        longer = T6Module(net(), AdamWConfig(lr=7e-3, weight_decay=0.3), Cosine(warmup_steps=2))
        logger = CSVLogger(tmp_path, name=f"after {file}")
        t = trainer(tmp_path, max_steps=30, limit_val_batches=0, logger=logger, log_every_n_steps=1)
        t.fit(longer, data(texts), ckpt_path=tmp_path / file)
        rates = {
            int(row["step"]): float(row["optim/lr"]) for row in rows(Path(logger.log_dir) / "metrics.csv")
        }
        assert rates == {n: 7e-3 * longer.schedule.factor(n - 1, 30) for n in range(6, 31)}
        assert t.optimizers[0].param_groups[0]["weight_decay"] == 0.3


def test_the_suggested_learning_rate_is_the_peak_of_the_next_fit(texts: Path, tmp_path: Path) -> None:
    model, corpus = module(), data(texts)
    t = trainer(tmp_path, max_steps=8, limit_val_batches=0)
    finder = Tuner(t).lr_find(model, corpus, num_training=30, early_stop_threshold=None)
    assert finder is not None
    suggested = finder.suggestion()
    assert suggested == model.lr != 3e-3
    seen, logger = Losses(), CSVLogger(tmp_path)
    t = trainer(
        tmp_path, max_steps=8, limit_val_batches=0, callbacks=[seen], logger=logger, log_every_n_steps=1
    )
    t.fit(model, corpus)
    first, *_, last = rows(Path(logger.log_dir) / "metrics.csv")
    assert float(first["optim/lr"]) == model.lr * model.schedule.factor(0, 8)
    assert float(last["optim/lr"]) == model.lr * model.schedule.factor(7, 8)
    assert seen.seen[0][1] == [0, 1, 2, 3], "from the beginning of the data"


def test_fast_dev_run_and_overfit_batches(texts: Path, tmp_path: Path) -> None:
    t = trainer(tmp_path, fast_dev_run=True)
    t.fit(module(), data(texts))
    assert t.global_step == 1
    seen = Losses()
    t = trainer(tmp_path, overfit_batches=2, max_epochs=30, callbacks=[seen])
    t.fit(module(), data(texts))
    assert {tuple(samples) for _, samples in seen.seen} == {(0, 1, 2, 3), (4, 5, 6, 7)}
    first, last = float.fromhex(seen.seen[0][0]), float.fromhex(seen.seen[-1][0])
    assert last < 0.8 * first


def test_batches_of_a_plain_loader(tmp_path: Path) -> None:
    """Tokens and targets alone; and micro-batches of other sizes weigh by their tokens."""
    tokens = torch.randint(257, (18, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    windows = [{"tokens": row[:-1], "targets": row[1:]} for row in tokens]
    logger = CSVLogger(tmp_path)
    t = trainer(tmp_path, max_epochs=1, logger=logger, log_every_n_steps=1, accumulate_grad_batches=5)
    t.fit(module(), DataLoader(windows, batch_size=4), DataLoader(windows, batch_size=4))
    assert t.global_step == 1
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(t.callback_metrics)
    assert "val/bits_per_byte" not in t.callback_metrics, "nobody has counted bytes"
    model = module()
    model.configure_model()
    loss = model.net.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    (row,) = [row for row in rows(Path(logger.log_dir) / "metrics.csv") if row["train/loss"]]
    assert float(row["train/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(row["optim/grad_norm"]) == pytest.approx(float(norm), rel=1e-4), (
        "5 micro-batches, the last of 2"
    )


def test_a_foreign_module_trains_on_our_data(home: Path, tmp_path: Path) -> None:
    corpus = PythonDocs(tokenizer="bytes", batch_size=4, context=CONTEXT, val_tokens=700)
    t = trainer(
        tmp_path, max_steps=40, val_check_interval=20, check_val_every_n_epoch=None,
        callbacks=[StepSeeds(0), Cadence(validate_every_tokens=None), Monitor(), TrainingProgress(), Checkpoints()],
        plugins=[VerifiedCheckpointIO(asynchronous=True)], enable_progress_bar=True,
    )  # fmt: skip
    t.fit(Bigram(257), corpus)
    assert float(t.callback_metrics["val/loss"]) < 5.5
    assert t.callback_metrics["data/tokens"] == 40 * 4 * CONTEXT
    (kept,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert kept.name == "step-00000040.ckpt"
    with pytest.raises(BadInput, match="SpikeGuard is not possible with Bigram: it guards a T6Module"):
        trainer(tmp_path, max_steps=1, callbacks=[SpikeGuard()]).fit(Bigram(257), corpus)


OURS = {
    "StepSeeds": lambda: StepSeeds(0),
    "Cadence": lambda: Cadence(tokens_per_step=256, validate_every_tokens=1024),
    "SpikeGuard": lambda: SpikeGuard("skip"),
    "Monitor": Monitor,
    "TrainingProgress": TrainingProgress,
    "Checkpoints": Checkpoints,
}


@pytest.mark.parametrize("name", OURS)
def test_each_callback_of_ours_works_alone(name: str, texts: Path, tmp_path: Path) -> None:
    progress: dict[str, Any] = {"enable_progress_bar": True} if name == "TrainingProgress" else {}
    t = trainer(tmp_path, max_steps=9, callbacks=[OURS[name]()], **progress)
    t.fit(module(), data(texts))
    assert t.global_step == 9
    if name == "Checkpoints":
        assert (tmp_path / "checkpoints" / "step-00000009.ckpt").exists()
    if name == "Cadence":
        assert t.accumulate_grad_batches == 2


def test_the_tracking_logger_works_alone(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t6_lightning.runs.tracking import MLflowTracking

    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    logger = MLflowTracking("alone")
    t = trainer(tmp_path, max_steps=6, logger=logger, log_every_n_steps=2)
    t.fit(module(), data(texts))
    assert [step for step, _ in logger.history("train/loss")] == [2, 4, 6]
    assert logger.experiment.get_run(logger.version or "").info.status == "FINISHED"


def test_what_a_writing_thread_meets_ends_the_run(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    io = VerifiedCheckpointIO(asynchronous=True)
    save = ModelCheckpoint(tmp_path / "good", every_n_train_steps=2, save_top_k=-1)
    real = io._write

    def failing(checkpoint: Any, path: Path) -> None:
        real(checkpoint, tmp_path / "file" / path.name)

    io._write = failing
    t = trainer(tmp_path, max_steps=20, callbacks=[save, Checkpoints(10**9)], plugins=[io])
    with pytest.raises(RuntimeError, match="could not be written"):
        t.fit(module(), data(texts))
    assert t.global_step <= 4, "at the next step, not at the end"


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda: StochasticWeightAveraging(1e-3), "StochasticWeightAveraging"),
        (lambda: EarlyStopping("val/loss", check_on_train_epoch_end=True), "EarlyStopping"),
    ],
)
def test_what_would_do_nothing_at_our_cadence_is_refused(
    callback: Any, said: str, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        trainer(tmp_path, max_steps=5, callbacks=[callback(), Cadence()]).fit(module(), data(texts))


def test_stock_callbacks_and_loggers_through_the_command_line(home: Path, tmp_path: Path) -> None:
    config = tmp_path / "stock.yaml"
    config.write_text(
        json.dumps(
            {
                "extends": "quickstart",
                "trainer": {
                    "logger": [
                        {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "csv"}},
                        {
                            "class_path": "TensorBoardLogger",
                            "init_args": {"save_dir": str(tmp_path), "name": "tb"},
                        },
                    ],
                    "callbacks": [
                        {
                            "class_path": "ModelCheckpoint",
                            "init_args": {"monitor": "val/loss", "dirpath": str(tmp_path / "best")},
                        },
                        {
                            "class_path": "EarlyStopping",
                            "init_args": {"monitor": "val/loss", "min_delta": 10.0, "patience": 1},
                        },
                        {"class_path": "LearningRateMonitor"},
                        {"class_path": "RichProgressBar"},
                        {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9}},
                    ],
                },
            }
        )
    )
    done = fit("stock", "--config", str(config), "--trainer.max_steps", "300")
    assert done.returncode == 0, done.stderr
    summary = json.loads(RunFolder("stock").summary_file.read_text())
    assert (summary["step"], summary["data/tokens"]) == (20, 20 * 256), (
        "what was trained, not what was asked for"
    )
    assert RunFolder("stock").record["status"] == "finished"
    found = rows(tmp_path / "csv" / "version_0" / "metrics.csv")
    assert [int(row["step"]) for row in found if row["val/loss"]] == [10, 20]
    assert [int(row["step"]) for row in found if row["train/loss"]] == [3, 6, 9, 12, 15, 18]
    assert list((tmp_path / "best").glob("*.ckpt"))
    assert list((tmp_path / "tb" / "version_0").glob("events*"))
    again = fit("stock", "--config", str(config), "--trainer.max_steps", "300")
    assert again.returncode == 0, again.stderr
    assert "is finished already" in again.stdout

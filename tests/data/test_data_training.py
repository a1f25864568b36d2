"""Streams inside Lightning: what a checkpoint holds, and that training goes on with the very next sample."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from loopback_hub import LoopbackHub
from stream_helpers import c4, fineweb_edu

from datamodules import C4, FineWebEdu, Mixture, pieces

COMMON = {"tokenizer": "bytes", "context": 32, "batch_size": 4, "val_tokens": 600}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pieces, "LINES_BYTES", 4000)
    with LoopbackHub() as served:
        served.add("HuggingFaceFW/fineweb-edu", fineweb_edu())
        served.add("allenai/c4", c4())
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


class Recorder(pl.LightningModule):
    """A model of one number that notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[int], int]] = []

    def training_step(self, batch, batch_idx):
        assert set(batch) == {"tokens", "targets", "documents", "n_bytes", "domain", "sample"}
        self.seen.append((batch["sample"].tolist(), int(batch["tokens"].sum())))
        return self.weight * batch["targets"].float().mean()

    def validation_step(self, batch, batch_idx):
        assert (batch["domain"] >= 0).all()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(data, steps, folder, ckpt_path=None, accumulate=1):
    model = Recorder()
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, val_check_interval=5,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, limit_val_batches=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return model.seen


def mixture(workers):
    sources = {"edu": FineWebEdu(), "c4": C4()}
    return Mixture(sources, {"edu": 0.7, "c4": 0.3}, **COMMON, num_workers=workers)


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 2)])
def test_training_goes_on_with_the_next_sample(workers, accumulate, tmp_path, monkeypatch):
    whole = fit(mixture(0), 20, tmp_path / "whole", accumulate=accumulate)
    assert [sample for samples, _ in whole for sample in samples] == list(range(80 * accumulate))
    seen, checkpoint = [], None
    for steps in (3, 9, 20):
        seen += fit(mixture(workers), steps, tmp_path, checkpoint, accumulate)
        checkpoint = tmp_path / f"{steps}.ckpt"
        saved = torch.load(checkpoint, weights_only=True)["Mixture"]
        assert saved["samples"] == steps * accumulate * 4
        assert set(saved["lanes"]) == {"0", "1"}
        assert all(len(mark) == 6 for marks in saved["lanes"].values() for mark in marks)
    assert seen == whole

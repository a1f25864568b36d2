"""Loaders in scripts: any LightningModule, a stock Trainer, stock checkpoints, with or without the data module."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
from data_helpers import many_texts, write_jsonl
from lightning.pytorch.callbacks import ModelCheckpoint
from loopback_hub import LoopbackHub
from stream_helpers import as_rank, fineweb_edu, tokens_of

from datamodules import BadInput, FineWebEdu, TextFiles
from datamodules.loaders import ENDLESS
from t6_lightning.common.errors import WorkerDied

ACCUMULATE = 2


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "data" / "a.jsonl", many_texts(80))
    return [str(tmp_path / "data")]


@pytest.fixture
def make(files):
    def make(**options):
        return TextFiles(
            files, **{"tokenizer": "bytes", "context": 64, "batch_size": 5, "val_fraction": 0.1} | options
        )

    return make


class Foreign(pl.LightningModule):
    """A module that knows nothing of these data modules; it notes the samples it is trained on."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.embedding, self.linear = torch.nn.Embedding(257, 4), torch.nn.Linear(4, 257)
        self.stop_after = stop_after
        self.seen: list[tuple[list[int], int]] = []
        self.epochs: list[int] = []

    def loss(self, batch):
        logits = self.linear(self.embedding(batch["tokens"]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

    def training_step(self, batch, batch_idx):
        assert set(batch) == {"tokens", "targets", "documents", "n_bytes", "domain", "sample"}
        self.seen.append((batch["sample"].tolist(), int(batch["tokens"].sum())))
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch["sample"].tolist()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.seen) == self.stop_after:
            raise Killed

    def on_train_epoch_end(self):
        self.epochs.append(len(self.seen))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def samples(self):
        return [sample for samples, _ in self.seen for sample in samples]


class Killed(Exception):
    """Stands for a kill: what was saved before is all that is left."""


def trainer_of(folder, callbacks=(), **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=bool(callbacks), devices=1,
        **quiet | options,
    )  # fmt: skip


def fit(data, folder, callbacks=(), ckpt_path=None, plain=False, stop_after=None, model=None, **options):
    model = model or Foreign(stop_after)
    trainer = trainer_of(folder, callbacks, **options)
    try:
        if plain:
            data.prepare_data()
            trainer.fit(model, data.train_dataloader(), data.val_dataloader(), ckpt_path=ckpt_path)
        else:
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    except Killed:
        pass
    return model


def test_an_epoch_is_one_pass(make, tmp_path):
    data = make(batch_size=4)
    model = fit(data, tmp_path, max_epochs=2)
    windows = data.train_loader.windows["text"].per_epoch
    length = windows // 4
    assert windows % 4, "a part of a batch is left"
    assert len(data.train_loader) == length
    assert model.epochs == [length, 2 * length]
    assert model.samples == list(range(2 * length * 4))
    assert data.samples == 2 * length * 4
    assert data.epochs() == {"text": 2 * length * 4 / windows}
    assert data.state_dict()["epoch_start"] == length * 4
    assert [len(list(data.train_loader)) for _ in range(2)] == [length, length]


def test_epochs_end_with_a_whole_optimizer_step(make, tmp_path):
    data = make()
    for k in (3, 7):
        model = fit(data, tmp_path, max_epochs=1, accumulate_grad_batches=k)
        assert len(model.seen) == data.train_loader.windows["text"].per_epoch // (5 * k) * k
    model = fit(data, tmp_path, max_epochs=1, accumulate_grad_batches=1000)
    assert len(model.seen) == len(data.train_loader) == 1000


SAVES = {
    "inside an epoch": {"every_n_train_steps": 4},
    "at the end of an epoch": {"save_on_train_epoch_end": True, "every_n_epochs": 1},
    "at the last batch of an epoch": {},  # every_n_train_steps, known from the epoch's length
}


@pytest.mark.parametrize("plain", [False, True], ids=["data module", "plain loaders"])
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(("workers", "accumulate"), [(0, ACCUMULATE), (2, ACCUMULATE), (0, 1)])
def test_a_stock_trainer_resumes_exactly(save, limit, plain, workers, accumulate, make, tmp_path):
    data = make()
    options = {"accumulate_grad_batches": accumulate, "plain": plain}
    options |= {"max_epochs": 3} if limit == "max_epochs" else {"max_steps": 40 // accumulate}
    whole = fit(data, tmp_path / "whole", **options)
    length = len(data.train_loader)
    assert length > 11
    stop_after = {"inside an epoch": length + 11, "at the end of an epoch": length + 5}.get(save, length + 1)
    saving = SAVES[save]
    if save == "at the last batch of an epoch":
        saving = {"every_n_train_steps": -(-length // accumulate)}

    def checkpoint():
        return ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **saving)

    killed = fit(make(num_workers=workers), tmp_path, [checkpoint()], stop_after=stop_after, **options)
    newest = max(tmp_path.glob("step=*.ckpt"), key=lambda file: int(file.stem[5:].partition("-")[0]))
    (state,) = torch.load(newest)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    saved = state["samples"] // 5
    assert 0 < saved <= len(killed.seen) == stop_after
    again = fit(make(num_workers=workers), tmp_path, [checkpoint()], ckpt_path=newest, **options)
    assert killed.seen[:saved] + again.seen == whole.seen
    if limit == "max_epochs":
        assert again.epochs[-1] == len(again.seen)


class Scheduled(Foreign):
    """Lightning makes its training loader before it restores its loops."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_a_schedule_that_asks_for_the_number_of_steps_resumes_too(make, tmp_path):
    whole = fit(make(), tmp_path / "whole", max_epochs=2, model=Scheduled())
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="last")
    fit(make(), tmp_path, [saver], max_epochs=2, model=Scheduled(stop_after=23))
    again = fit(make(), tmp_path, ckpt_path=tmp_path / "last.ckpt", max_epochs=2, model=Scheduled())
    assert again.seen == whole.seen[20:]


def test_resuming_an_epoch_of_limited_batches(make, tmp_path):
    options = {"max_epochs": 5, "limit_train_batches": 10}
    whole = fit(make(), tmp_path / "whole", **options)
    assert whole.samples == list(range(250)), "every epoch goes on where the one before it ended"
    assert whole.epochs == [10, 20, 30, 40, 50]
    for stop_after, at in ((23, 20), (37, 36)):
        saves = {20: {"save_on_train_epoch_end": True}, 36: {"every_n_train_steps": 4}}[at]
        folder = tmp_path / str(at)
        saver = ModelCheckpoint(folder, save_top_k=1, filename="last", monitor="step", mode="max", **saves)
        fit(make(), tmp_path, [saver], stop_after=stop_after, **options)
        again = fit(make(), tmp_path, [], ckpt_path=folder / "last.ckpt", **options)
        assert again.seen == whole.seen[at:]


def test_overfitting_repeats_the_first_batches(make, tmp_path, recwarn):
    whole = fit(make(), tmp_path, max_epochs=3, overfit_batches=2)
    assert whole.samples == list(range(10)) * 3
    assert not [warning for warning in recwarn if "shuffling" in str(warning.message)]


def test_reloading_goes_on(make, tmp_path):
    data = make()
    model = fit(data, tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1, limit_train_batches=4)
    assert model.samples == list(range(60))


def test_a_second_trainer_begins_again(make, tmp_path):
    data = make()
    one, two = (fit(data, tmp_path, max_steps=3) for _ in range(2))
    assert one.seen == two.seen


def test_states_of_other_settings_go_on_at_the_same_sample(make, caplog):
    rows = tokens_of(list(make(batch_size=1).train_dataloader()))
    data = make()
    loader = data.train_dataloader()
    list(itertools.islice(loader, 3))
    state = loader.state_dict()
    assert {name: state[name] for name in ("samples", "epoch_start", "batch", "length")} == {
        "samples": 15, "epoch_start": 0, "batch": 5, "length": len(loader)}  # fmt: skip
    before = {name: state[name] for name in ("samples", "seed", "context", "fingerprint")}
    for batch_size, given, epoch_start in ((5, state, 0), (3, state, 15), (5, before, 15)):
        other = make(batch_size=batch_size)
        other.load_state_dict(given)
        assert other.state_dict() == given
        assert other.samples == 15
        into_epoch = other.batches_into_epoch()
        taken_up = other.train_dataloader()
        assert other.samples == taken_up.samples == 15
        assert taken_up.epoch_start == epoch_start
        assert into_epoch == taken_up.batches_into_epoch == (15 - epoch_start) // batch_size
        assert tokens_of(list(itertools.islice(taken_up, 2))) == rows[15 : 15 + 2 * batch_size]
        assert len(list(taken_up)) == len(taken_up) - into_epoch - 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_state_may_be_loaded_twice_and_warns_once(make, caplog):
    state = {**make(seed=3, context=32).train_dataloader().state_dict(), "samples": 10}
    data = make()
    data.load_state_dict(state)
    loader = data.train_dataloader()
    loader.load_state_dict(dict(state))
    assert caplog.text.count("CONTEXT HAS CHANGED") == caplog.text.count("keeps the checkpoint's seed 3") == 1
    whole = list(itertools.islice(loader, 2))
    assert whole[0]["sample"][0] == 10
    alone = make().train_dataloader()  # without the data module's hook
    next(iter(alone))
    alone.load_state_dict(dict(state))
    assert tokens_of(list(itertools.islice(alone, 2))) == tokens_of(whole)


def test_rewind_goes_back_to_an_optimizer_step(make):
    loader = make().train_dataloader()
    whole = list(itertools.islice(loader, 7))
    loader.rewind(20)
    assert loader.state_dict()["samples"] == 20
    assert tokens_of(list(itertools.islice(loader, 3))) == tokens_of(whole[4:])
    with pytest.raises(ValueError, match="only 35 were handed out"):
        loader.rewind(36)


def test_what_worker_processes_are_given_can_be_pickled(make, tmp_path):
    data = make()
    data.trainer = trainer_of(tmp_path)
    data.hold_when_cut_off(lambda: False)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        sent = pickle.loads(pickle.dumps(loader.dataset))
        assert type(sent) is type(loader.dataset)


# Validation.


def test_validation_is_dealt_over_ranks(make):
    alone = list(make(val_fraction=0.7).val_dataloader())
    assert len(alone) > 3
    test = list(make(val_fraction=0.7).test_dataloader())
    assert tokens_of(test) != tokens_of(alone)
    for world in (2, 3, 50):
        dealt = [list(as_rank(make(val_fraction=0.7), rank, world).val_dataloader()) for rank in range(world)]
        for rank, batches in enumerate(dealt):
            expected = alone[rank::world]
            assert [b["sample"].tolist() for b in batches] == [b["sample"].tolist() for b in expected]
        tested = as_rank(make(val_fraction=0.7, num_workers=2), 1, world).test_dataloader()
        assert len(tested) == len(test[1::world])
        assert tokens_of(list(tested)) == tokens_of(test[1::world])
        assert len(list(as_rank(make(val_fraction=0.7), 1, world).predict_dataloader())) == len(alone)


def test_sharded_models_get_equally_many_batches(make):
    alone = list(make(val_fraction=0.7).val_dataloader())
    for world in (2, 3):
        dealt = []
        for rank in range(world):
            data = as_rank(make(val_fraction=0.7), rank, world)
            data.trainer.strategy = pl.strategies.FSDPStrategy(parallel_devices=[torch.device("cpu")])
            dealt.append(list(data.val_dataloader()))
            assert len(data.val_dataloader()) == len(dealt[-1]) == -(-len(alone) // world)
        together = [batch for step in zip(*dealt, strict=True) for batch in step]
        assert tokens_of(together[: len(alone)]) == tokens_of(alone)
        for batch in together[len(alone) :]:
            assert batch["tokens"].shape == (5, 64)
            assert (batch["targets"] == -100).all()
            assert batch["n_bytes"].sum() == 0
            assert (batch["domain"] == 0).all()


def test_a_stock_trainer_validates_tests_and_predicts(make, tmp_path):
    data, model = make(), Foreign()
    for options in ({"datamodule": data}, {"dataloaders": data.predict_dataloader()}):
        trainer = trainer_of(tmp_path)
        (validated,), (tested,) = trainer.validate(model, **options), trainer.test(model, **options)
        # By the data module the test split is read; a loader is read as it is.
        assert (validated == tested) is ("dataloaders" in options)
        samples = [sample for batch in trainer.predict(model, **options) for sample in batch]
        assert samples == list(range(len(data.validation_windows())))


def _gloo(rank, world, store, make, answers):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world
    )
    data = make(num_workers=rank)
    train, validation = data.train_dataloader(), data.val_dataloader()
    samples = [batch["sample"].tolist() for batch in train]
    answers.put((rank, samples, len(train), [batch["sample"].tolist() for batch in validation]))
    torch.distributed.destroy_process_group()


def test_a_script_of_several_processes_deals_without_a_trainer(make, tmp_path):
    data = make()
    data.prepare_data()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=_gloo, args=(rank, 2, str(tmp_path / "store"), make, answers))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = {rank: rest for rank, *rest in (answers.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join()
    windows = data.train_dataloader().windows["text"].per_epoch
    assert found[0][1] == found[1][1] == windows // 10
    together = [
        sample for pair in zip(found[0][0], found[1][0], strict=True) for part in pair for sample in part
    ]
    assert together == list(range(windows // 10 * 10))
    validation = sorted(sample for rank in (0, 1) for batch in found[rank][2] for sample in batch)
    assert validation == list(range(len(data.validation_windows())))


# Worker processes.


def test_a_killed_worker_is_told_in_one_sentence(make, monkeypatch):
    # A Trainer puts all signal handlers back when it ends; torch, which installs its own once, is asked to do so again.
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    for anywhere in (False, True):
        others = {process.pid for process in multiprocessing.active_children()}  # of tests before
        loader = make(num_workers=2).train_dataloader()
        batches = iter(loader)
        next(batches)
        victim = next(each for each in multiprocessing.active_children() if each.pid not in others)
        began = time.monotonic()
        with pytest.raises(WorkerDied) as raised:  # noqa: PT012
            os.kill(victim.pid, signal.SIGKILL)
            if anywhere:  # the signal finds the main process in the middle of a step
                time.sleep(60)
            list(batches)
        assert time.monotonic() - began < 50
        said = str(raised.value)
        assert f"worker process {victim.pid} of the data loader was killed by signal: Killed" in said
        assert "the same command goes on from the last checkpoint" in said
        assert "\n" not in said
        assert raised.value.__cause__ is None
        del batches, raised


# Streams.


@pytest.fixture
def stream(monkeypatch):
    with LoopbackHub() as hub:
        hub.add("HuggingFaceFW/fineweb-edu", fineweb_edu())
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield lambda **options: FineWebEdu(
            **{"tokenizer": "bytes", "context": 64, "batch_size": 4, "val_tokens": 600} | options
        )


def test_max_epochs_of_a_stream_is_refused(stream, tmp_path):
    sentence = (
        r"^trainer.max_epochs=2 is not possible: FineWebEdu is a stream of unknown length: "
        r"set trainer.max_steps \(max_epochs -1\)$"
    )
    with pytest.raises(BadInput, match=sentence):
        fit(stream(), tmp_path, max_epochs=2)
    assert len(stream().train_dataloader()) == ENDLESS
    model = fit(stream(), tmp_path, max_epochs=2, limit_train_batches=3, limit_val_batches=1)
    assert model.samples == list(range(24))
    model = fit(stream(), tmp_path, max_epochs=2, overfit_batches=3)
    assert model.samples == list(range(12)) * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stock_trainer_resumes_a_stream(stream, workers, tmp_path):
    options = {"max_steps": 12, "accumulate_grad_batches": 2, "limit_val_batches": 1}
    whole = fit(stream(), tmp_path / "whole", **options)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(stream(num_workers=workers), tmp_path, [saver], stop_after=15, **options)
    for plain in (False, True):
        again = fit(
            stream(num_workers=workers), tmp_path, ckpt_path=tmp_path / "step=6.ckpt", plain=plain, **options
        )
        assert again.seen == whole.seen[12:]


def test_rewinding_a_stream_keeps_the_marks_of_that_sample(stream):
    data = stream()
    data.trainer = None
    loader = data.train_dataloader()
    loader.accumulate = 3
    batches = iter(loader)
    whole, states = [], []
    for _ in range(20):
        states.append(loader.state_dict())
        whole.append(next(batches))
    for back in (1, 2, 3):
        loader.rewind((20 - back) * 4)
        assert loader.state_dict() == states[20 - back]
    assert tokens_of(list(itertools.islice(loader, 3))) == tokens_of(whole[17:])


def test_what_is_held_when_cut_off_is_not_counted(stream, monkeypatch):
    from t6_lightning.common.errors import SourceUnavailable

    for read_before in (0, 3):
        data = stream()
        loader = data.train_dataloader()
        batches = iter(loader)
        whole = [next(batches) for _ in range(read_before)]
        data.hold_when_cut_off(lambda: False)

        def fails(*_):
            raise SourceUnavailable("away")

        with monkeypatch.context() as patch:
            patch.setattr(type(loader.dataset), "_batch", fails)
            held = [next(batches) for _ in range(4)]
        assert loader.cut_off == "away"
        assert loader.samples == data.samples == read_before * 4
        expected = whole[-1] if whole else data.nothing()
        assert all(torch.equal(batch["targets"], expected["targets"]) for batch in held)
        if not whole:
            assert (held[0]["targets"] == -100).all()

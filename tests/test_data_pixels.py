"""Images as sequences of bytes behind a class token."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from data_helpers import real_data
from stream_helpers import first, tokens_of

from datamodules import BadData, Pixels


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))


@pytest.fixture
def digits(tmp_path):
    """Idx files of 40 training and 12 validation images of 4 x 3, the last of them also in training."""
    rng = np.random.default_rng(0)
    images = {"train": rng.integers(0, 256, (40, 4, 3), dtype=np.uint8)}
    images["test"] = rng.integers(0, 256, (12, 4, 3), dtype=np.uint8)
    images["test"][-1] = images["train"][5]
    settings = {}
    for side, field in (("train", ""), ("test", "val_")):
        n = len(images[side])
        labels = (np.arange(n) % 10).astype(np.uint8)
        for name, header, data in (
            ("images", struct.pack(">4i", 2051, n, 4, 3), images[side]),
            ("labels", struct.pack(">2i", 2049, n), labels),
        ):
            path = tmp_path / f"{side}-{name}.gz"
            path.write_bytes(gzip.compress(header + data.tobytes()))
            settings[field + name] = str(path)
    return settings, images


def test_a_window_is_one_image_behind_its_class(digits):
    settings, images = digits
    data = Pixels(**settings, context=12, batch_size=3)
    assert data.tokenizer.vocab_size == 256 + 10 + 1
    for i, row in enumerate(torch.cat([batch["tokens"] for batch in data.val_dataloader()]).tolist()):
        assert row == [256 + i % 10, *images["test"][i].reshape(-1)[:-1].tolist()]
    batch = next(iter(data.val_dataloader()))
    assert batch["targets"].tolist() == images["test"][:3].reshape(3, -1).tolist()
    assert batch["n_bytes"].tolist() == [12] * 3  # so bits per byte are bits per dimension
    assert batch["domain"].tolist() == [0] * 3
    assert (batch["documents"] == 0).all()


def test_an_epoch_holds_every_image_once_but_those_held_out(digits):
    settings, images = digits
    data = Pixels(**settings, context=12, batch_size=13)
    rows = torch.cat([batch["targets"] for batch in first(data, 6)]).tolist()
    held_out = images["train"][5].reshape(-1).tolist()
    expected = [image for image in images["train"].reshape(40, -1).tolist() if image != held_out]
    assert sorted(rows[:39]) == sorted(rows[39:]) == sorted(expected)
    assert rows[:39] != rows[39:]
    assert data.summary()["train_documents"] == 39
    again = Pixels(**settings, context=12, batch_size=13, num_workers=1)
    again.load_state_dict({**data.state_dict(), "samples": 26})
    assert tokens_of(first(again, 2)) == tokens_of(first(data, 4))[26:]


def test_mnist_and_cifar():
    mnist = {
        f"{side}{kind}": str(
            real_data(f"vision/mnist/{name}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz")
        )
        for side, name in (("", "train"), ("val_", "t10k"))
        for kind in ("images", "labels")
    }
    data = Pixels(**mnist, context=784)
    assert data.summary()["val_documents"] == 1000
    assert 1 < data.summary()["unigram_bits_per_byte"] < 3
    cifar = {
        "images": str(real_data("vision/cifar10/train-00000-of-00001.parquet")),
        "val_images": str(next(real_data("vision/cifar10").glob("test-*.parquet"))),
    }
    data = Pixels(**cifar, context=1024, grey=True, val_count=50)
    assert next(iter(data.train_dataloader()))["tokens"].shape == (8, 1024)


def test_bad_settings_are_said(digits, tmp_path):
    settings, _ = digits
    with pytest.raises(BadData, match="context: 512 is not allowed; allowed: 12, the bytes of an image"):
        Pixels(**settings).prepare_data()
    with pytest.raises(BadData, match="labels: null is not allowed with idx files"):
        Pixels(**settings | {"labels": None}, context=12).prepare_data()
    with pytest.raises(BadData, match="val_images: null is not allowed with a local file"):
        Pixels(**settings | {"val_images": None}, context=12).prepare_data()
    with pytest.raises(BadData, match="val_count: 0 is not allowed"):
        Pixels(**settings, val_count=0)
    (tmp_path / "cut").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(BadData, match="cut is no idx file of images, or is cut"):
        Pixels(**settings | {"images": str(tmp_path / "cut")}, context=12).prepare_data()

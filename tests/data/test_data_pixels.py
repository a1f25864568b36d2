"""Images as sequences of bytes behind a class token."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from data_helpers import real_data
from loopback_hub import LoopbackHub
from stream_helpers import first, tokens_of

from datamodules import BadInput, Pixels


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
    for side, windows in enumerate((data.validation_windows(), data.test_windows())):
        rows = windows.batch(0, 12)["tokens"].tolist()
        assert len(rows) == 6
        for row, i in zip(rows, range(side, 12, 2), strict=True):
            assert row == [256 + i % 10, *images["test"][i].reshape(-1)[:-1].tolist()]
    batch = next(iter(data.val_dataloader()))
    assert batch["targets"].tolist() == images["test"][:6:2].reshape(3, -1).tolist()
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


def test_each_side_is_capped_and_none_of_the_held_out_images_trains(digits):
    settings, images = digits
    few = Pixels(**settings, context=12, val_count=2)
    whole = Pixels(**settings, context=12, val_count=None)
    assert few.summary()["val_documents"] == few.summary()["test_documents"] == 2
    assert few.test_windows().batch(0, 9)["targets"].tolist() == images["test"][1:4:2].reshape(2, -1).tolist()
    assert few.fingerprint == whole.fingerprint
    assert tokens_of(first(few, 5)) == tokens_of(first(whole, 5))
    assert (
        few.summary()["train_documents"] == 39
    )  # the last held-out image, beyond the cap, is in training too


def test_without_a_second_held_out_image_there_is_nothing_to_test_on(digits, tmp_path):
    settings, images = digits
    for n, name in ((1, "one"), (2, "twice")):  # the second is the first one again
        same = np.repeat(images["test"][:1], n, axis=0)
        (tmp_path / name).write_bytes(struct.pack(">4i", 2051, n, 4, 3) + same.tobytes())
        (tmp_path / f"{name}-labels").write_bytes(struct.pack(">2i", 2049, n) + bytes(n))
        held_out = {"val_images": str(tmp_path / name), "val_labels": str(tmp_path / f"{name}-labels")}
        data = Pixels(**settings | held_out, context=12)
        assert data.summary()["test_documents"] == 0
        with pytest.raises(BadInput, match="val_images: they hold no second image to test on"):
            data.test_windows()


def test_mnist_and_cifar():
    mnist = {
        f"{side}{kind}": str(
            real_data(f"vision/mnist/{name}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz")
        )
        for side, name in (("", "train"), ("val_", "t10k"))
        for kind in ("images", "labels")
    }
    data = Pixels(**mnist, context=784)
    assert data.summary()["val_documents"] == data.summary()["test_documents"] == 500  # of the 1000 at hand
    assert 1 < data.summary()["unigram_bits_per_byte"] < 3
    cifar = {
        "images": str(real_data("vision/cifar10/train-00000-of-00001.parquet")),
        "val_images": str(next(real_data("vision/cifar10").glob("test-*.parquet"))),
    }
    data = Pixels(**cifar, context=1024, grey=True, val_count=50)
    assert next(iter(data.train_dataloader()))["tokens"].shape == (8, 1024)


def test_bad_settings_are_said(digits, tmp_path):
    settings, _ = digits
    with pytest.raises(BadInput, match="context: 512 is not allowed; allowed: 12, the bytes of an image"):
        Pixels(**settings).prepare_data()
    with pytest.raises(BadInput, match="labels: null is not allowed with idx files"):
        Pixels(**settings | {"labels": None}, context=12).prepare_data()
    with pytest.raises(BadInput, match="val_images: null is not allowed with a local file"):
        Pixels(**settings | {"val_images": None}, context=12).prepare_data()
    with pytest.raises(BadInput, match="val_count: 0 is not allowed"):
        Pixels(**settings, val_count=0)
    (tmp_path / "cut").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(BadInput, match="cut is no idx file of images, or is cut"):
        Pixels(**settings | {"images": str(tmp_path / "cut")}, context=12).prepare_data()


def color_images(n: int = 20) -> tuple[np.ndarray, bytes]:
    """Random images of 3 x 2 in colour, and a parquet file of them as `datasets` writes it."""
    images = np.random.default_rng(1).integers(0, 256, (n, 3, 2, 3), dtype=np.uint8)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"img": [PIL.Image.fromarray(image) for image in images], "label": [i % 2 for i in range(n)]}
    written = io.BytesIO()
    datasets.Dataset.from_dict(columns, features).to_parquet(written)
    return images, written.getvalue()


def test_colour_images_of_a_parquet_file_run_pixel_by_pixel(tmp_path):
    images, content = color_images()
    (tmp_path / "val.parquet").write_bytes(content)
    (tmp_path / "train.parquet").write_bytes(color_images(50)[1])
    files = {"images": str(tmp_path / "train.parquet"), "val_images": str(tmp_path / "val.parquet")}
    data = Pixels(**files, context=18, batch_size=4)
    targets = torch.cat([batch["targets"] for batch in data.val_dataloader()]).tolist()
    assert targets == images[::2].reshape(10, -1).tolist()
    assert data.tokenizer.vocab_size == 256 + 2 + 1
    grey = Pixels(**files, grey=True, context=6, batch_size=4)
    assert next(iter(grey.val_dataloader()))["targets"].shape == (4, 6)


def test_images_of_a_data_set_on_the_hub(tmp_path, monkeypatch):
    images, content = color_images()
    code = (
        "import torch\n"
        "from datamodules import Pixels\n"
        "data = Pixels('some/images', context=18, batch_size=4)\n"
        "print(data.summary()['revision'])\n"
        "print(torch.cat([batch['targets'] for batch in data.val_dataloader()]).tolist())\n"
    )
    with LoopbackHub() as hub:
        parts = {"train": color_images(30)[1], "test": content}
        repository = hub.add(
            "some/images", {f"data/{split}-00000-of-00001.parquet": file for split, file in parts.items()}
        )
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    revision, targets = done.stdout.splitlines()[-2:]
    assert json.loads(targets) == images[::2].reshape(10, -1).tolist()
    assert revision == repository.commit()

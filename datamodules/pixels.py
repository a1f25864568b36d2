"""Images as text: each is its bytes in raster order behind a token for its class. Nothing else is new.

A window is one image: its inputs are the class token and all bytes but the last, its targets the bytes. So bits per
byte are bits per dimension, and the class itself is never predicted.
"""

import gzip
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import TokenData
from datamodules.documents import Document
from datamodules.packing import Batch, FixedWindows, Mark, Rows, Windows
from datamodules.stores import Hub
from datamodules.tokenizer import RAW_BYTES, Tokenizer
from t6_lightning.common.errors import BadInput, first_line

IDX_IMAGES, IDX_LABELS = 2051, 2049
"""First numbers of MNIST's idx files."""

ImageSet = tuple[np.ndarray, np.ndarray]
"""Images uint8 (N, D), classes int64 (N,)."""


class Pixels(TokenData):
    """Images as sequences of byte tokens, with bits per dimension as bits per byte.

    The context is height * width * channels, or the run is refused. Ids: 0-255 the bytes, then a class each.

    Args:
        images: MNIST's idx file (plain or .gz), a parquet file, or the name of a `datasets` image set.
        labels: The idx file of the classes; for the others null: the column is found by itself.
        val_images, val_labels: The same for the held-out images; for a `datasets` name the split (null: test). The
            first, third, ... validates, the second, fourth, ... tests; none of them trains.
        val_count: At most so many images to validate on, and as many to test on, the first ones; null: all.
        grey: Make colour images grey.
        revision: Branch, tag or commit of a `datasets` name. The commit is kept in T6_HOME, as for text.
    """

    def __init__(
        self,
        images: str,
        val_images: str | None = None,
        labels: str | None = None,
        val_labels: str | None = None,
        val_count: int | None = 1000,
        grey: bool = False,
        revision: str = "main",
        **common: Any,
    ):
        super().__init__(**common)
        if val_count is not None and val_count < 1:
            raise BadInput(f"val_count: {val_count} is not allowed; allowed: 1 or more, or null for all.")
        self.images, self.labels = images, labels
        self.val_images, self.val_labels, self.val_count, self.grey = val_images, val_labels, val_count, grey
        self.revision = revision

    @cached_property
    def _sets(self) -> tuple[ImageSet, ImageSet]:
        """What trains and what is held out."""
        train = self._read(self.images, self.labels, "train", "images")
        if self.val_images is None and Path(self.images).expanduser().exists():
            raise BadInput(
                "val_images: null is not allowed with a local file; name the file of the test images."
            )
        named = self.val_images or self.images
        if not Path(named).expanduser().exists() and self.val_images:
            named, split = self.images, self.val_images
        else:
            split = "test"
        validation = self._read(named, self.val_labels, split, "val_images")
        if train[0].shape[1] != validation[0].shape[1]:
            raise BadInput(f"val_images: {named} has images of another size than {self.images}.")
        if train[0].shape[1] != self.context:
            raise BadInput(
                f"context: {self.context} is not allowed; allowed: {train[0].shape[1]}, the bytes of an image."
            )
        held = {image.tobytes() for image in validation[0]}
        keep = np.array([image.tobytes() not in held for image in train[0]])
        if not keep.any():
            raise BadInput(f"val_images: {named} holds every image of {self.images}; allowed: others.")
        return (train[0][keep], train[1][keep]), validation

    @property
    def _validation(self) -> ImageSet:
        images, labels = self._sets[1]
        return images[::2][: self.val_count], labels[::2][: self.val_count]

    @property
    def _test(self) -> ImageSet:
        """Maybe none. An image that also validates is left out."""
        images, labels = self._sets[1]
        seen = {image.tobytes() for image in images[::2]}
        keep = np.array([image.tobytes() not in seen for image in images[1::2]], dtype=bool)
        return images[1::2][keep][: self.val_count], labels[1::2][keep][: self.val_count]

    def _read(self, name: str, labels: str | None, split: str, field: str) -> tuple[np.ndarray, np.ndarray]:
        path = Path(name).expanduser()
        try:
            if path.exists() and path.suffix != ".parquet":
                images = _idx(path, IDX_IMAGES)
                if labels is None:
                    raise BadInput(
                        f"{field.replace('images', 'labels')}: null is not allowed with idx files."
                    )
                return images.reshape(len(images), -1), _idx(Path(labels).expanduser(), IDX_LABELS).astype(
                    np.int64
                )
            return self._image_set(path if path.exists() else None, name, split)
        except BadInput:
            raise
        except Exception as error:  # of datasets, pyarrow, Pillow, gzip
            raise BadInput(f"{field}: {name} cannot be read: {first_line(error)}.") from error

    def _image_set(self, path: Path | None, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        import datasets

        loaded: Any = (
            datasets.load_dataset("parquet", data_files=[str(path)], split="train")
            if path is not None
            else datasets.load_dataset(name, split=split, revision=Hub(name, self.revision).revision)
        )
        kinds = {column: type(feature).__name__ for column, feature in loaded.features.items()}
        image = next((column for column, kind in kinds.items() if kind == "Image"), None)
        label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
        if image is None or label is None:
            raise BadInput(f"images: {name} has no column of images and of classes; present: {kinds}.")
        mode = "L" if self.grey else "RGB"
        rows = [
            np.asarray(each.convert(mode) if each.mode != "L" else each).reshape(-1) for each in loaded[image]
        ]
        return np.stack(rows), np.array(loaded[label], dtype=np.int64)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        # The classes have ids behind the 256 bytes; the last one of all stands for the separator, which never comes.
        classes = max(int(labels.max()) for _, labels in self._sets) + 1
        return Tokenizer(RAW_BYTES, eot=256 + classes)

    @property
    def domains(self) -> list[str]:
        _ = self._sets
        return ["pixels"]

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for images, labels in self._sets:
            digest.update(json.dumps(images.shape).encode() + images.tobytes() + labels.tobytes())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        return self._digest

    def summary(self) -> dict[str, Any]:
        (train, _), (validation, _), (test, _) = self._sets[0], self._validation, self._test
        counts = np.bincount(train.reshape(-1), minlength=256) + 1
        bits = -np.log2(counts / counts.sum())
        domain = {
            "val_documents": len(validation),
            "val_tokens": validation.size,
            "val_bytes": validation.size,
            "test_documents": len(test),
            "test_tokens": test.size,
            "test_bytes": test.size,
        }
        local = Path(self.images).expanduser().exists()
        read = {} if local else {"source": self.images, "revision": Hub(self.images, self.revision).revision}
        return read | {
            "train_documents": len(train),
            "train_tokens": train.size,
            "train_bytes": train.size,
            **domain,
            "domains": {"pixels": domain},
            "unigram_bits_per_byte": float(bits[validation.reshape(-1)].mean()),
        }

    def training_windows(self, left_out: np.ndarray) -> dict[str, Windows]:
        return {"pixels": ImageWindows(*self._sets[0], self.seed)}

    def validation_windows(self) -> FixedWindows:
        return ImageValidation(*self._validation)

    def test_windows(self) -> FixedWindows:
        """The test images. Raises BadInput where there are none."""
        if len(self._test[0]) == 0:
            raise BadInput("val_images: they hold no second image to test on; name more.")
        return ImageValidation(*self._test)

    def validation_keys(self) -> np.ndarray:
        return np.zeros(0, dtype=np.uint64)  # images are compared when they are read

    def corpus_identity(self) -> str:
        return self._digest

    def tokenizer_texts(self) -> Iterator[str]:
        return iter(())

    def example_documents(self, number: int) -> Iterator[Document]:
        images, labels = self._sets[0]
        for image, label in zip(images[:number], labels, strict=False):
            yield Document(f"class {label}: {image[:40].tolist()} ...", "pixels", int(label))


class ImageWindows:
    """The endless sequence of images: every epoch holds each once, in an order drawn for (seed, epoch)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int):
        self.images, self.labels, self.seed = images, labels, seed
        self.per_epoch = len(images)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def reader(self, marks: Mapping[int, Mark]) -> "ImageWindows":
        return self

    def prepare(self, windows: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self, rows: Rows, row: int, window: int) -> None:
        epoch, index = divmod(window, self.per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = epoch, rng.permutation(len(self.images))
        _fill(rows, row, self.images, self.labels, int(self._order[1][index]))


class ImageValidation:
    """The validation or test images in their order."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, first: int, size: int) -> Batch:
        samples = np.arange(first, min(first + size, len(self)))
        rows = Rows(len(samples), self.images.shape[1])
        for row, sample in enumerate(samples):
            _fill(rows, row, self.images, self.labels, int(sample))
        return rows.batch(np.zeros(len(samples), dtype=np.int64), samples)


def _fill(rows: Rows, row: int, images: np.ndarray, labels: np.ndarray, image: int) -> None:
    tokens, opened, n_bytes = rows.row(row)
    tokens[0], tokens[1:] = 256 + labels[image], images[image]
    opened[0] = True
    n_bytes[1:] = 1


def _idx(path: Path, magic: int) -> np.ndarray:
    """The array in an idx file: a big-endian header of magic number and sizes, then bytes."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    n_sizes = magic & 0xFF
    begin = 4 + 4 * n_sizes
    header = np.frombuffer(data[:begin].ljust(begin, b"\0"), dtype=">i4").tolist()
    if header[0] != magic or len(data) != begin + math.prod(header[1:]):
        what = "images" if magic == IDX_IMAGES else "labels"
        raise BadInput(f"{path} is no idx file of {what}, or is cut.")
    return np.frombuffer(data, dtype=np.uint8, offset=begin).reshape(header[1:])

"""Small repositories with the published layouts, and what the tests of streams share."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from data_helpers import many_texts

from datamodules.base import TokenData

SUBSETS = ("Pile-CC", "Github", "ArXiv")


def parquet(texts: list[str], row_group: int = 12) -> bytes:
    """A FineWeb-Edu file: the text column among others."""
    columns = {"text": texts, "id": [str(i) for i in range(len(texts))], "score": [3.0] * len(texts)}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=row_group)
    return buffer.getvalue()


def json_lines(texts: list[str], **columns: Any) -> bytes:
    rows = [json.dumps({"text": text, "url": "u", **columns}, ensure_ascii=False) for text in texts]
    return ("\n".join(rows) + "\n").encode()


def pile_lines(texts: list[str]) -> bytes:
    rows = [{"text": text, "meta": {"pile_set_name": SUBSETS[i % 3]}} for i, text in enumerate(texts)]
    return "\n".join(json.dumps(row) for row in rows).encode()


def fineweb_edu(files: int = 5, documents: int = 60) -> dict[str, bytes]:
    return {
        "README.md": b"---\n",
        **{
            f"sample/10BT/{i:03}_00000.parquet": parquet(many_texts(documents, f"edu{i}-"))
            for i in range(files)
        },
        "data/CC-MAIN-2024-10/train-00000.parquet": parquet(many_texts(30, "crawl-")),
    }


def c4(files: int = 6, documents: int = 80) -> dict[str, bytes]:
    train = {
        f"en/c4-train.{i:05}-of-{files:05}.json.gz": gzip.compress(
            json_lines(many_texts(documents, f"c4-{i}-"))
        )
        for i in range(files)
    }
    validation = gzip.compress(json_lines(many_texts(40, "c4val-")))
    return train | {
        "en/c4-validation.00000-of-00001.json.gz": validation,
        "realnewslike/c4-train.00000-of-00001.json.gz": gzip.compress(json_lines(["other"])),
    }


def pile(files: int = 4, documents: int = 90) -> dict[str, bytes]:
    compress = zstandard.ZstdCompressor().compress
    train = {
        f"train/{i:02}.jsonl.zst": compress(pile_lines(many_texts(documents, f"pile{i}-")))
        for i in range(files)
    }
    return train | {
        "val.jsonl.zst": compress(pile_lines(many_texts(60, "pileval-"))),
        "test.jsonl.zst": compress(pile_lines(many_texts(60, "piletest-"))),
    }


def first(data: TokenData, n: int) -> list[dict[str, Any]]:
    """The next n batches; the data's position stays where it is."""
    state = data.state_dict()
    batches = list(itertools.islice(data.train_dataloader(), n))
    data.load_state_dict(state)
    return batches


def tokens_of(batches: list[dict[str, Any]]) -> list[list[int]]:
    return torch.cat([batch["tokens"] for batch in batches]).tolist()


def consume(data: TokenData, batches: list[dict[str, Any]]) -> None:
    """Read on over batches, which must be the ones that come next."""
    if not batches:
        return
    samples = data.samples
    loader = data.train_loader if data.train_loader and not data._pending else data.train_dataloader()
    for expected, batch in zip(batches, loader, strict=False):
        assert batch["sample"].tolist() == expected["sample"].tolist()
        assert torch.equal(batch["tokens"], expected["tokens"])
        samples += loader.batch
        assert data.samples == samples
        if batch["sample"].tolist() == batches[-1]["sample"].tolist():
            return


def as_rank(data: TokenData, rank: int, world: int) -> TokenData:
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world,
        strategy=DDPStrategy([torch.device("cpu")]) if world > 1 else SingleDeviceStrategy(),
        accumulate_grad_batches=1,
        overfit_batches=0,
        max_epochs=-1,
    )
    return data


def lane_documents(data: TokenData, windows: int) -> list[list[str]]:
    """The documents of each lane in the order in which its first windows hold them."""
    (lanes,) = data.training_windows(data.validation_keys()).values()
    n = len(lanes)  # type: ignore[arg-type]
    rows = torch.cat([batch["tokens"] for batch in first(data, -(-windows * n // data.batch_size))])
    eot = data.tokenizer.eot
    found = []
    for lane in range(n):
        ids = rows[lane::n][:windows].flatten().tolist()
        assert ids[0] == eot
        documents = [list(group) for is_eot, group in itertools.groupby(ids, eot.__eq__) if not is_eot]
        found.append([data.tokenizer.decode(document) for document in documents[:-1]])
    return found

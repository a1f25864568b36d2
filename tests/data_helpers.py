"""What the tests of datamodules share: where the real text is, small files, small tokenizers."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import zstandard

REPOSITORY = Path(__file__).resolve().parent.parent

# Text with every width of UTF-8, blanks of all kinds, quotes, digits, and what looks like a special token.
TEXTS = [
    "Hello world, it's 1234 o'clock.\n\n\tindented   blanks  \n",
    "Grüße aus Köln – „naïve“ façade, çedille, Ærø",
    "日本語の文章です。中文字符，標點。 한국어 문장입니다.",
    "emoji 🙂🚀👩‍👩‍👧 and 𝒎𝒂𝒕𝒉 ∑∫√, Ελληνικά, עברית, العربية",
    "a literal <|endoftext|> and [SEP] </s> stay text",
    "x" * 700 + " " * 50 + "\u00a0\u2003end ",
    "def f(x):\n    return x ** 2  # squared\n\n\nclass A:\n    pass\n",
    "\r\nwindows\r\nlines\r\n",
]


def real_data(path: str) -> Path:
    """A file or folder of the test data (T6_TEST_DATA, else ../shared/data); skips the test without it."""
    root = Path(os.environ.get("T6_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (root / path).exists():
        pytest.skip(f"no test data at {root / path} (set T6_TEST_DATA)")
    return root / path


def write(path: Path, data: str | bytes) -> Path:
    """Write a file, compressed as its suffix says."""
    raw = data.encode() if isinstance(data, str) else data
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".xz":
        raw = lzma.compress(raw)
    elif path.suffix == ".bz2":
        raw = bz2.compress(raw)
    elif path.suffix == ".zst":
        raw = zstandard.ZstdCompressor().compress(raw)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def write_jsonl(path: Path, texts: Iterable[str], **columns: str) -> Path:
    rows = [json.dumps({"text": text, **columns}, ensure_ascii=False) for text in texts]
    return write(path, "\n".join(rows) + "\n")


def many_texts(n: int, salt: str = "") -> list[str]:
    """n different documents of 1 to a few hundred characters, some with wide characters."""
    return [f"{salt}{i} " + TEXTS[i % len(TEXTS)][: 1 + (i * 37) % 200] for i in range(n)]

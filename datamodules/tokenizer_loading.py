"""Where a tokenizer's definition comes from: training, a local folder, or the Hugging Face hub.

A definition is (tokenizer.json as text, id of the document separator or None).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from t6_lightning.common.errors import BadInput, first_line
from t6_lightning.common.files import write_atomically
from t6_lightning.common.home import t6_home

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)

Definition = tuple[str, int | None]

END_OF_TEXT = "<|endoftext|>"
# What other tokenizers call the end of a document, asked in this order when their config names none.
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

TRAINING_BYTES = 32 << 20
"""BPE is trained on this many bytes of text: more moves few merges and costs memory."""
TRAINING_RECIPE = 1
"""Part of the cache key: raise it whenever training would give another result."""

HUB_FILES = ["tokenizer*", "vocab*", "merges.txt", "*_tokens*.json", "config.json", "*.model"]
"""What of a hub repository is fetched: no weights."""


def load_definition(
    spec: str, vocab_size: int, texts: Callable[[], Iterable[str]], corpus: str | None
) -> Definition:
    """See `tokenizer.load_tokenizer`, which this does for everything but raw bytes."""
    if spec == "bpe":
        return _trained(vocab_size, texts, corpus)
    folder = Path(spec).expanduser()
    if spec and folder.is_dir():
        return _from_folder(folder)
    if folder.is_file():
        raise BadInput(
            f"tokenizer: {spec} is a file; name the folder that holds tokenizer.json or vocab.json."
        )
    if not spec or spec[0] in "./~" or spec.count("/") > 1:
        raise BadInput(f"tokenizer: there is no folder {spec!r}; allowed: bpe, bytes, a folder, a hub name.")
    return _from_hub(spec)


def _trained(vocab_size: int, texts: Callable[[], Iterable[str]], corpus: str | None) -> Definition:
    if vocab_size < 257:
        raise BadInput(
            f"vocab_size: {vocab_size} is too small for bpe; allowed: 257 (bytes and separator) or more."
        )
    if corpus is None:
        return train_bpe(texts(), vocab_size)
    key = hashlib.sha256(f"{TRAINING_RECIPE} {corpus}".encode()).hexdigest()[:24]
    path = t6_home() / "tokenizers" / f"bpe-{vocab_size}-{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # two runs that start together train once
        if path.exists():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                return saved["definition"], saved["eot"]
            except (ValueError, KeyError, TypeError):
                log.warning("The tokenizer in %s is damaged and is trained again.", path)
        definition, eot = train_bpe(texts(), vocab_size)
        write_atomically(path, json.dumps({"definition": definition, "eot": eot}))
    return definition, eot


def train_bpe(texts: Iterable[str], vocab_size: int) -> Definition:
    """Byte-level BPE with GPT-2's pre-tokenizer on the first 32 MiB of `texts`; deterministic."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    log.info("Training a byte-level BPE of %d symbols.", vocab_size)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_first_bytes(texts, TRAINING_BYTES), trainer)
    return bpe.to_str(), bpe.token_to_id(END_OF_TEXT)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for text in texts:
        total += len(text)
        yield text
        if total >= limit:
            return


def _from_folder(folder: Path) -> Definition:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if (folder / "tokenizer.json").is_file():
        try:
            loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise BadInput(
                f"tokenizer: {folder / 'tokenizer.json'} cannot be read: {first_line(error)}."
            ) from error
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        try:
            model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        except Exception as error:
            reason = f"vocab.json and merges.txt in {folder} cannot be read: {first_line(error)}"
            raise BadInput(f"tokenizer: {reason}.") from error
        loaded = tokenizers.Tokenizer(model)
        loaded.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        loaded.decoder = decoders.ByteLevel()
        if loaded.token_to_id(END_OF_TEXT) is not None:
            loaded.add_special_tokens([END_OF_TEXT])
    else:
        loaded = _from_transformers(folder)
    return loaded.to_str(), _separator(folder, loaded)


def _from_transformers(folder: Path) -> "tokenizers.Tokenizer":
    """Sentencepiece models, WordPiece word lists and whatever else transformers knows how to convert."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:
        raise BadInput(
            f"tokenizer: {folder} has neither tokenizer.json nor vocab.json with merges.txt, and "
            f"transformers cannot read it: {first_line(error)}."
        ) from error


def _from_hub(name: str) -> Definition:
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise BadInput(
            f"tokenizer: {name!r} is neither bpe nor bytes nor a folder, and {hub} did not give it: "
            f"{first_line(error)}."
        ) from error
    return _from_folder(folder)


def _separator(folder: Path, loaded: "tokenizers.Tokenizer") -> int | None:
    candidates = list(SEPARATORS)
    config = folder / "tokenizer_config.json"
    if config.is_file():
        try:
            eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except ValueError as error:
            raise BadInput(f"tokenizer: {config} is not JSON: {error}.") from error
        candidates.insert(0, eos["content"] if isinstance(eos, dict) else eos or END_OF_TEXT)
    ids = (loaded.token_to_id(token) for token in candidates)
    return next((id for id in ids if id is not None), None)

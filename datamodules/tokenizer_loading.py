"""Where a tokenizer's definition comes from: training, a local folder, or the Hugging Face hub.

A definition is (tokenizer.json as text, id of the document separator or None).
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from datamodules.byte_level import gpt2_ranks
from datamodules.system_faults import named, written
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
LONG_WORD = re.compile(r"[^\W\d_]{129,}+|\d{129,}+|(?:[^\w\s]|_){129,}+|\s{129,}+")
"""What the pre-tokenizer takes for one word: a run of letters, of digits, of other characters, or of blanks."""
LONG_WORDS_CHARACTERS = 1 << 18
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
            with named(str(path)):
                contents = path.read_bytes()
            if (saved := _kept_definition(contents)) is not None:
                return saved
            log.warning("The tokenizer in %s is damaged and is trained again.", path)
        definition, eot = train_bpe(texts(), vocab_size)
        with written(path):
            kept = {"definition": definition, "eot": eot, "sha256": _digest(definition, eot)}
            write_atomically(path, json.dumps(kept))
    return definition, eot


def _kept_definition(contents: bytes) -> Definition | None:
    """A trained tokenizer as it was written; None of a damaged one."""
    try:
        saved = json.loads(contents)
        definition, eot = saved["definition"], saved["eot"]
        if "sha256" in saved:
            whole = saved["sha256"] == _digest(definition, eot)
        else:  # of the time before there was a sum: training leaves ids that rise with the merges
            spec = json.loads(definition)
            whole = gpt2_ranks(spec) is not None and spec["model"]["vocab"].get(END_OF_TEXT) == eot == 0
        return (definition, eot) if whole else None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def _digest(definition: str, eot: int | None) -> str:
    return hashlib.sha256(json.dumps([definition, eot]).encode()).hexdigest()


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
    """The first texts, up to `limit` characters. Long words are left out once they have used up their budget.

    A merge costs the trainer the length of every word that holds the pair, so that a few megabytes of base64 on one
    line would take it hours.
    """
    total, budget = 0, LONG_WORDS_CHARACTERS
    for text in texts:
        text = text[:limit]
        total += len(text)
        kept, at = [], 0
        for word in LONG_WORD.finditer(text):
            budget -= word.end() - word.start()
            if budget < 0:
                kept.append(text[at : word.start()])
                at = word.end()
        yield "".join([*kept, text[at:]]) if kept else text
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
    loaded = _with_added_tokens(folder, loaded)
    return loaded.to_str(), _separator(folder, loaded)


def _with_added_tokens(folder: Path, loaded: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """The tokenizer with the tokens that files beside its vocabulary add to it, as transformers reads them."""
    added = _added_tokens(folder)

    def has_all(tokenizer: "tokenizers.Tokenizer") -> bool:
        known = {id: str(token.content) for id, token in tokenizer.get_added_tokens_decoder().items()}
        return added.items() <= known.items()

    if has_all(loaded):
        return loaded
    loaded = _from_transformers(folder)
    if not has_all(loaded):
        raise BadInput(
            f"tokenizer: {folder} is not possible: transformers gives the tokens of added_tokens.json or "
            "tokenizer_config.json other ids than these files."
        )
    return loaded


def _added_tokens(folder: Path) -> dict[int, str]:
    """id -> token of added_tokens.json and of `added_tokens_decoder` in tokenizer_config.json. Raises BadInput."""
    added = {}
    try:
        for token, id in _json(folder / "added_tokens.json").items():
            added[int(id)] = token
        decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for id, token in decoder.items():
            added[int(id)] = token["content"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"tokenizer: added_tokens.json or tokenizer_config.json in {folder} does not give each token an id."
        ) from error
    return added


def _json(file: Path) -> dict[str, Any]:
    """A file with a JSON object; an empty one where there is none. Raises BadInput."""
    if not file.is_file():
        return {}
    try:
        with named(str(file)):
            read = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"tokenizer: {file} is not JSON: {first_line(error)}.") from error
    if not isinstance(read, dict):
        raise BadInput(f"tokenizer: {file} holds a JSON {type(read).__name__}, not an object.")
    return read


def _from_transformers(folder: Path) -> "tokenizers.Tokenizer":
    """Sentencepiece models, WordPiece word lists and whatever else transformers knows how to convert. Code that a
    folder brings along is never run."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return found.backend_tokenizer
    except Exception as error:
        if "trust_remote_code" in str(error):
            reason = (
                "it needs Python code of its own (auto_map), which is never run; save it as tokenizer.json"
            )
        else:
            reason = f"transformers cannot read it: {first_line(error)}"
        raise BadInput(f"tokenizer: {folder} is not possible: {reason}.") from error


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
    eos = _json(folder / "tokenizer_config.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    candidates = [eos if isinstance(eos, str) else END_OF_TEXT, *SEPARATORS]
    ids = (loaded.token_to_id(token) for token in candidates)
    return next((id for id in ids if id is not None), None)

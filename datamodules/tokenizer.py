"""Text to token ids and back: byte-level BPE, raw bytes, and any Hugging Face tokenizer."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from datamodules.byte_level import gpt2_ranks, tiktoken_encoding, token_to_bytes
from datamodules.tokenizer_loading import load_definition

RAW_BYTES = "bytes"

LONG_BLANK = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{65536,}+")
"""A run of what Unicode calls white space, as tiktoken's pattern understands it."""


class Tokenizer:
    """Encodes text to ids (int32 arrays) and back, and knows the UTF-8 bytes behind each id.

    Special tokens are never made from text: a literal "<|endoftext|>" in a document is encoded as its
    characters. `definition` is "bytes", or a tokenizer.json as `tokenizers` writes it; `eot` is the id of the
    document separator (None: one id is added behind the vocabulary).
    """

    vocab_size: int
    """Every id is below it."""
    eot: int
    """The document separator's id."""
    fingerprint: str
    """sha256 (hex) of what defines the tokenizer."""
    token_bytes: np.ndarray | None
    """uint16 (vocab_size,): UTF-8 bytes that each id stands for, 0 for specials; None when not byte-level."""

    def __init__(self, definition: str, eot: int | None = None):
        self._definition, self._eot = definition, eot
        self.fingerprint = hashlib.sha256(self.to_json().encode()).hexdigest()
        self._tiktoken = self._tokenizers = self._unknown = None
        spec = None if definition == RAW_BYTES else json.loads(definition)
        if spec is None:
            pieces: dict[int, bytes] | None = {byte: bytes([byte]) for byte in range(256)}
            largest = 255
        elif ranks := gpt2_ranks(spec):
            self._tiktoken = tiktoken_encoding(ranks)
            pieces = {id: data for data, id in ranks.items()}
            largest = max([*pieces, *(token["id"] for token in spec["added_tokens"])])
        else:
            import tokenizers

            self._tokenizers = tokenizers.Tokenizer.from_str(definition)
            self._tokenizers.encode_special_tokens = True
            self._tokenizers.no_truncation()
            self._tokenizers.no_padding()
            vocab = self._tokenizers.get_vocab(with_added_tokens=True)
            model = spec["model"]
            self._unknown = vocab.get(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
            pieces = _byte_level_pieces(spec, vocab)
            largest = max(vocab.values())
        self.eot = largest + 1 if eot is None else eot
        self.vocab_size = max(largest, self.eot) + 1
        self._pieces = None
        self.token_bytes = None
        if pieces is not None:
            self._pieces = [pieces.get(id, b"") for id in range(self.vocab_size)]
            self.token_bytes = np.array([len(piece) for piece in self._pieces], dtype=np.uint16)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 (n,). Lone surrogates, which UTF-8 cannot hold, become '?'."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 (n,) each. Releases the interpreter lock for the most part."""
        texts = [_valid_utf8(text) for text in texts]
        if self._tiktoken is not None:
            return [self._byte_level_ids(text) for text in texts]
        if self._tokenizers is not None:
            encodings = self._tokenizers.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def _byte_level_ids(self, text: str) -> np.ndarray:
        assert self._tiktoken is not None
        try:
            return self._tiktoken.encode_to_numpy(text, disallowed_special=()).view(np.int32)
        except ValueError:  # its pattern gives up on a run of a million blanks
            parts, at = [], 0
            for run in LONG_BLANK.finditer(text):
                # All of them are one word at the end of the text, else all but the last, which begins the next word.
                end = run.end() - (run.end() < len(text))
                parts += [text[at : run.start()], text[run.start() : end]]
                at = end
            if not parts:
                raise
            parts.append(text[at:])
            encode = self._tiktoken.encode_to_numpy
            return np.concatenate([encode(part, disallowed_special=()).view(np.int32) for part in parts])

    def lost_bytes(self, text: str, ids: np.ndarray) -> int:
        """UTF-8 bytes of characters that the ids do not give back, as [UNK] and lower-casing leave none or others.

        A lower bound: characters are counted, not compared place by place.
        """
        if self._tokenizers is None:
            return 0
        known = [id for id in ids.tolist() if id != self._unknown]
        if (decoded := self._tokenizers.decode(known, skip_special_tokens=False)) == text:
            return 0
        lost = Counter(text) - Counter(decoded)
        return sum(times * len(character.encode("utf-8", "replace")) for character, times in lost.items())

    def encode_batch_with_bytes(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, UTF-8 bytes each id covers, uint16 or uint32) of each text; they add up to the text's, exactly."""
        if self.token_bytes is not None:
            return [(ids, self.token_bytes[ids]) for ids in self.encode_batch(texts)]
        assert self._tokenizers is not None
        texts = [_valid_utf8(text) for text in texts]
        encodings = self._tokenizers.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(encoding.ids, dtype=np.int32), _bytes_covered(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; specials are left out, bytes that are no UTF-8 become U+FFFD."""
        if self._pieces is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        assert self._tokenizers is not None
        known = self._tokenizers.get_vocab_size(with_added_tokens=True)
        return self._tokenizers.decode([int(id) for id in ids if int(id) < known], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of the ids without specials; exactly the text's for byte-level tokenizers.

        Ids beyond the vocabulary, which a model with padded rows may draw, stand for nothing.
        """
        if self._pieces is not None:
            return b"".join([self._pieces[int(id)] for id in ids if int(id) < len(self._pieces)])
        return self.decode(ids).encode()

    def to_json(self) -> str:
        """All that `from_json` needs: no file, no network."""
        return json.dumps({"definition": self._definition, "eot": self._eot})

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        return cls(**json.loads(text))


def load_tokenizer(
    spec: str, vocab_size: int, texts: Callable[[], Iterable[str]], corpus: str | None = None
) -> Tokenizer:
    """The tokenizer that `spec` names.

    "bpe": byte-level BPE of `vocab_size` symbols (specials included), trained on the first 32 MiB of
    `texts()` and kept under T6_HOME/tokenizers by (`corpus`, vocab_size); with `corpus` None it is trained at
    each call. "bytes": the 256 bytes and a separator. Anything else: a local folder with tokenizer.json, or
    vocab.json and merges.txt, else a name on the Hugging Face hub.
    Raises BadInput when it cannot be had.
    """
    if spec == RAW_BYTES:
        return Tokenizer(RAW_BYTES)
    return Tokenizer(*load_definition(spec, vocab_size, texts, corpus))


def _valid_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _byte_level_pieces(spec: dict, vocab: dict[str, int]) -> dict[int, bytes] | None:
    """Bytes of each id of a byte-level tokenizer not of GPT-2's form; None where bytes can get lost."""
    stages = [spec["pre_tokenizer"] or {}, *(spec["pre_tokenizer"] or {}).get("pretokenizers", [])]
    byte_level = [stage for stage in stages if stage.get("type") == "ByteLevel"]
    added = {token["content"]: token for token in spec["added_tokens"]}
    if (
        not byte_level
        or any(stage["add_prefix_space"] for stage in byte_level)
        or spec["normalizer"] is not None
        or any(token["lstrip"] or token["rstrip"] for token in added.values() if not token["special"])
    ):
        return None
    pieces = {}
    for token, id in vocab.items():
        if token in added:
            pieces[id] = b"" if added[token]["special"] else token.encode()
        elif (data := token_to_bytes(token)) is not None:
            pieces[id] = data
        else:
            return None
    return pieces


def _bytes_covered(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes that each token covers, uint32 (n,), from character offsets.

    A token answers for everything since the end of the one before (blanks that the tokenizer skips count with
    the token behind them), the last one also for what follows it, so that the sum is the text's length.
    """
    if not offsets:
        return np.zeros(0, dtype=np.uint32)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(np.array(offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(text)
    return np.diff(bytes_before[ends], prepend=0).astype(np.uint32)

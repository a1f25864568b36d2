"""The documents of all sources under one numbering, split into training and validation."""

import hashlib
import json
import logging
import lzma
import zlib
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import numpy as np

from datamodules.documents import held_out, is_test
from datamodules.limits import MAX_DOMAINS
from datamodules.token_cache import Shard
from datamodules.tokenizer import Tokenizer
from t6_lightning.common.errors import BadInput

log = logging.getLogger(__name__)

COMPRESSED_BYTES = 32 << 20
"""Validation text up to this size is compressed by gzip and xz for comparison."""
ANNOUNCED_BYTES = 4 << 20
"""Validation text from this size on takes some seconds."""


class DocumentTable:
    """All documents of some shards, numbered through in the shards' order; every array has one entry each."""

    def __init__(self, shards: list[Shard], domains: list[str]):
        self.shards = shards
        self.shard = np.repeat(
            np.arange(len(shards), dtype=np.int32), [len(shard.n_bytes) for shard in shards]
        )
        self.begin = _joined([shard.offsets[:-1] for shard in shards], np.int64)
        """Position of the document's first id in its shard's tokens."""
        self.length = _joined([np.diff(shard.offsets) for shard in shards], np.int64)
        """Ids, without separator."""
        self.n_bytes = _joined([shard.n_bytes for shard in shards], np.int64)
        self.lost = _joined(
            [np.zeros(len(shard.key)) if shard.lost is None else shard.lost for shard in shards], np.int64
        )
        """UTF-8 bytes that the document's ids do not give back."""
        self.key = _joined([shard.key for shard in shards], np.uint64)
        index = {name: i for i, name in enumerate(domains)}
        numbers = [np.array([index[name] for name in shard.domains])[shard.domain] for shard in shards]
        self.domain = _joined(numbers, np.int64)
        """Index into the list of domains."""

    def __len__(self) -> int:
        return len(self.length)

    def tokens(self, document: int) -> np.ndarray:
        begin = self.begin[document]
        return self.shards[self.shard[document]].tokens[begin : begin + self.length[document]]


Side = tuple[DocumentTable, dict[str, np.ndarray]]
"""Documents to validate or to test on: domain -> their numbers in a table, int64, in a fixed order."""


class Corpus:
    """Training, validation and test documents, their fingerprint and their statistics.

    `training`: shards of which `val_fraction` of the documents (by hash) is held out, under the domains they
    name. Of a domain's held-out documents those that `is_test` chooses test and the others validate; where none
    would be left to validate on, all of them validate. `validation`: domain -> shards that only validate: they
    are named as validation text, so their domains have no test documents. A training or test document whose
    hash occurs on the validation side is left out. `val_tokens`: at most so many tokens per domain of either side,
    in whole documents (None: all); which documents are held out does not depend on it.
    Raises BadInput where there is nothing to train or to validate on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        training: list[Shard],
        validation: dict[str, list[Shard]],
        val_fraction: float,
        val_tokens: int | None,
    ):
        self.tokenizer = tokenizer
        named = sorted({name for shard in training for name in shard.domains})
        if clash := set(named) & set(validation):
            raise BadInput(
                f"val_files: {min(clash)!r} is already a domain of the training files; choose another name."
            )
        all_domains = [*named, *validation]
        shards = [*training, *(shard for shards in validation.values() for shard in shards)]
        self.table = DocumentTable(shards, all_domains)
        only_validates = self.table.shard >= len(training)
        validates = only_validates | held_out(self.table.key, val_fraction)
        repeated = ~validates & np.isin(self.table.key, self.table.key[only_validates])
        if repeated.any():
            log.info("%d training documents occur in val_files and are left out of training.", repeated.sum())
        self.training_documents = np.flatnonzero(~validates & ~repeated)
        """Numbers of the training documents, int64."""
        if len(self.training_documents) == 0 and repeated.any():
            raise BadInput(
                f"val_files: they hold all {repeated.sum()} documents that there are to train on; name other files."
            )
        if len(self.training_documents) == 0:
            raise BadInput(
                f"val_fraction: {val_fraction} of {len(self.table)} documents leaves none to train on."
            )

        self.held_out_documents = self._by_domain(np.flatnonzero(validates), all_domains)
        """domain -> numbers of all its held-out documents, int64; `val_tokens` does not cap them."""
        if not self.held_out_documents:
            raise BadInput(
                f"val_fraction: {val_fraction} of {len(self.table)} documents leaves none to validate on; "
                "raise it, cut .txt files into lines or paragraphs (txt_documents), or name val_files."
            )
        self.domains = list(self.held_out_documents)
        tests = {
            name: is_test(self.table.key[documents]) & (name not in validation)
            for name, documents in self.held_out_documents.items()
        }
        tests = {name: chosen & ~chosen.all() for name, chosen in tests.items()}
        validating = {name: chosen[~tests[name]] for name, chosen in self.held_out_documents.items()}
        seen = self.table.key[np.concatenate(list(validating.values()))]
        self.validation_documents = {
            name: self._capped(documents, val_tokens) for name, documents in validating.items()
        }
        """domain -> numbers of its validation documents in their fixed order, int64."""
        self.test_documents = {
            name: self._capped(documents[tests[name] & ~np.isin(self.table.key[documents], seen)], val_tokens)
            for name, documents in self.held_out_documents.items()
        }
        """domain -> numbers of its test documents, maybe none, in their fixed order, int64."""

    def _by_domain(self, documents: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
        """Documents by domain, in the order of `names` and then of their hashes, so that a cap leaves a sample."""
        domain = self.table.domain[documents]
        order = np.lexsort((self.table.key[documents], domain))
        present, begins = np.unique(domain[order], return_index=True)
        check_domains([names[i] for i in present.tolist()])
        parts = np.split(documents[order], begins[1:]) if len(present) else []
        return {names[i]: part for i, part in zip(present.tolist(), parts, strict=True)}

    def _capped(self, documents: np.ndarray, val_tokens: int | None) -> np.ndarray:
        if val_tokens is None:
            return documents
        fits = np.cumsum(self.table.length[documents] + 1) <= val_tokens
        return documents[: max(1, int(fits.sum()))]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of tokenizer, tokens, byte counts, domains, and which documents train and which are held out.

        Equal data, equal everywhere. It does not depend on `val_tokens`, as training does not.
        """
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        digest.update(json.dumps([[shard.checksum for shard in self.table.shards], self.domains]).encode())
        for documents in (self.training_documents, *self.held_out_documents.values()):
            digest.update(np.ascontiguousarray(documents, dtype="<i8").tobytes() + b"|")
        return digest.hexdigest()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Counts of all sides and what simple models reach on the validation text, in bits per UTF-8 byte.

        See `held_out_summary`. `unigram_bits_per_byte`: add-one unigram model of the training tokens on all
        validation targets.
        """
        table, tokenizer = self.table, self.tokenizer
        summary = counts_of(table, self.training_documents, "train")
        sides = (table, self.validation_documents), (table, self.test_documents)
        held_out = held_out_summary(*sides, tokenizer)
        validation = np.concatenate(list(self.validation_documents.values()))
        train_counts, val_counts = self._training_counts(), self._counts(validation)
        val_counts[tokenizer.eot] += len(validation)
        bits = -np.log2((train_counts + 1) / (train_counts.sum() + len(train_counts)))
        unigram = float((bits * val_counts).sum() / held_out["val_bytes"])
        return summary | held_out | {"unigram_bits_per_byte": unigram}

    def _training_counts(self) -> np.ndarray:
        """How often each id occurs in the training stream, int64 (vocab_size,)."""
        counts = np.sum([shard.counts for shard in self.table.shards if shard.counts is not None], axis=0)
        left_out = np.setdiff1d(np.arange(len(self.table)), self.training_documents)
        counts = counts - self._counts(left_out)
        counts[self.tokenizer.eot] += len(self.training_documents)
        return counts

    def _counts(self, documents: Iterable[int]) -> np.ndarray:
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for document in documents:
            np.add.at(counts, self.table.tokens(document), 1)
        return counts


def counts_of(table: DocumentTable, documents: np.ndarray, side: str) -> dict[str, int]:
    """Documents, tokens and bytes, named by side. A document has one token more than ids: its separator."""
    return {
        f"{side}_documents": len(documents),
        f"{side}_tokens": int((table.length[documents] + 1).sum()),
        f"{side}_bytes": int(table.n_bytes[documents].sum()),
    }


def check_domains(names: Collection[str]) -> None:
    """Refuse more validation domains than there may be. Raises BadInput."""
    if len(names) > MAX_DOMAINS:
        raise BadInput(
            f"domain_field: it gives {len(names):,} validation domains, such as {min(names)!r}; allowed: up to "
            f"{MAX_DOMAINS:,}; name a column with fewer values, or null for one domain."
        )


def held_out_summary(validation: Side, test: Side, tokenizer: Tokenizer) -> dict[str, Any]:
    """Counts of validation and test documents, in all and of each validation domain, and what compressors reach.

    `gzip_` and `xz_bits_per_byte` (-9): of each domain's validation text as one stream, left out when the
    tokenizer does not keep every byte, or when the text has more than COMPRESSED_BYTES.
    `val_lost_share`, of a tokenizer that may lose text: the share of the validation bytes that it loses, with which
    bits per byte cannot be compared with that of other tokenizers.
    """
    table, documents = validation
    domains = {
        name: counts_of(table, chosen, "val") | counts_of(test[0], test[1][name], "test")
        for name, chosen in documents.items()
    }
    summary: dict[str, Any] = total(domains.values()) | {"domains": domains}
    if tokenizer.token_bytes is None:
        summary["val_lost_share"] = lost_share(table, np.concatenate(list(documents.values())))
    elif summary["val_bytes"] <= COMPRESSED_BYTES:
        gz = xz = 0
        if summary["val_bytes"] > ANNOUNCED_BYTES:
            log.info("Compressing %.0f MB of validation text, to compare with.", summary["val_bytes"] / 1e6)
        for chosen in documents.values():
            text = b"".join(tokenizer.decode_bytes(table.tokens(document)) for document in chosen)
            gz += _gzip_size(text)
            xz += _xz_size(text)
        summary["gzip_bits_per_byte"] = 8 * gz / summary["val_bytes"]
        summary["xz_bits_per_byte"] = 8 * xz / summary["val_bytes"]
    return summary


def lost_share(table: DocumentTable, documents: np.ndarray) -> float:
    """The share of the documents' UTF-8 bytes that the tokenizer loses; warns where it is not 0."""
    share = float(table.lost[documents].sum() / max(table.n_bytes[documents].sum(), 1))
    if share > 0:
        log.warning(
            "tokenizer: it loses %.2g %% of the bytes of the validation text, which its tokens do not give back; bits "
            "per byte cannot be compared with other tokenizers.",
            100 * share,
        )
    return share


def total(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts of validation and test documents of several domains or corpora together."""
    parts = list(counts)
    keys = [f"{side}_{what}" for side in ("val", "test") for what in ("documents", "tokens", "bytes")]
    return {key: sum(part[key] for part in parts) for key in keys}


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts])


def _gzip_size(text: bytes) -> int:
    """Bytes that `gzip -9` writes for the text, its 18 bytes of header and trailer included."""
    return _written(zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS), text) + 18


def _xz_size(text: bytes) -> int:
    """Bytes that `xz -9` writes for the text."""
    # A dictionary as large as the text finds all that the preset's 64 MiB do, which take 0.1 s to set up.
    dictionary = max(len(text), 4096)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]
    return _written(lzma.LZMACompressor(filters=filters), text)


def _written(compressor: Any, text: bytes) -> int:
    """Bytes that a compressor writes. It is fed in parts: signals are handled between them."""
    parts = (text[begin : begin + (1 << 18)] for begin in range(0, len(text), 1 << 18))
    return sum(len(compressor.compress(part)) for part in parts) + len(compressor.flush())

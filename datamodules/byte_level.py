"""Byte-level BPE in GPT-2's form, run by tiktoken (4-6 times as fast as `tokenizers` on one core).

GPT-2 writes the 256 bytes as printable characters: the printable ones stand for themselves, the rest are
moved to U+0100 and up (Radford et al. 2019, `encoder.py: bytes_to_unicode`).
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tiktoken

# GPT-2's pre-tokenizer, with possessive quantifiers where they change nothing but the speed.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _byte_characters() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()


def token_to_bytes(token: str) -> bytes | None:
    """The bytes that a vocabulary entry stands for; None where it is not written in GPT-2's alphabet."""
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return None


def gpt2_ranks(spec: dict[str, Any]) -> dict[bytes, int] | None:
    """bytes -> id of a tokenizer.json (parsed), or None where tiktoken would not give exactly its ids.

    tiktoken joins the neighbours whose *union* has the lowest id; `tokenizers` joins by the list of merges.
    Both agree when every merge makes a new token and ids rise in the order of the merges, as training leaves
    them.
    """
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"] or {}
    in_form = (
        model["type"] == "BPE"
        and not any(
            model.get(option)
            for option in (
                "dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"
            )
        )
        and spec["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and not pre_tokenizer["add_prefix_space"]
        and pre_tokenizer.get("use_regex", True)
        and all(token["special"] for token in spec["added_tokens"])
    )  # fmt: skip
    if not in_form:
        return None
    vocab: dict[str, int] = model["vocab"]
    special = {token["content"] for token in spec["added_tokens"]}
    ids_made = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ids_made.append(vocab[left + right])
    rising = all(before < after for before, after in pairwise(ids_made))
    ranks = {token_to_bytes(token): id for token, id in vocab.items() if token not in special}
    if not rising or None in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
        return None
    if len(ranks) != 256 + len(ids_made):  # entries that no merge reaches
        return None
    return {data: id for data, id in ranks.items() if data is not None}


def tiktoken_encoding(ranks: dict[bytes, int]) -> "tiktoken.Encoding":
    """tiktoken's encoder over these ranks, without special tokens: all text is ordinary text."""
    import tiktoken

    return tiktoken.Encoding("gpt2-form", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})

"""Tokenizers: ids, exact bytes, the folder forms, training, and what is said when one cannot be had."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from data_helpers import TEXTS, many_texts, real_data
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from datamodules import tokenizer as tokenizer_module
from datamodules import tokenizer_loading
from datamodules.text_files import read_documents
from datamodules.tokenizer import LONG_BLANK, Tokenizer, load_tokenizer
from t6_lightning.common.errors import BadInput


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))


def trained(vocab_size=600, corpus=None):
    return load_tokenizer("bpe", vocab_size, lambda: TEXTS + many_texts(200), corpus)


def hugging_face(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same definition run by `tokenizers`, text as ordinary text."""
    loaded = tokenizers.Tokenizer.from_str(json.loads(tokenizer.to_json())["definition"])
    loaded.encode_special_tokens = True
    return loaded


def wordpiece(folder: Path) -> Path:
    """A WordPiece tokenizer that lowercases, drops blanks and adds [CLS] ... [SEP]: nothing byte-level in it."""
    loaded = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    loaded.normalizer = normalizers.BertNormalizer()
    loaded.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    loaded.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    loaded.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    ends = [(token, loaded.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    loaded.post_processor = processors.BertProcessing(ends[1], ends[0])
    loaded.enable_truncation(8)
    folder.mkdir(parents=True, exist_ok=True)
    loaded.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece_like(folder: Path) -> Path:
    """BPE over characters with the ▁ blank and byte fallback, as Llama 2 has it."""
    loaded = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    loaded.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    loaded.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Only ASCII is learned: the rest goes through byte fallback, several tokens for one character.
    ascii_only = [text.encode("ascii", "ignore").decode() for text in TEXTS]
    loaded.train_from_iterator(ascii_only, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    folder.mkdir(parents=True, exist_ok=True)
    loaded.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return folder


def test_trained_bpe_gives_the_ids_of_tokenizers_on_real_text():
    files = ["text/multilingual/wiki-sentences-zh-dev.jsonl.gz", "text/tinystories/train.jsonl.gz"]
    texts = [*read_documents([str(real_data(file)) for file in files]), *TEXTS]
    tokenizer = load_tokenizer("bpe", 2000, lambda: texts)
    reference = hugging_face(tokenizer).encode_batch(texts, add_special_tokens=False)
    for ids, expected in zip(tokenizer.encode_batch(texts), reference, strict=True):
        assert ids.tolist() == expected.ids


def test_gpt2_gives_the_ids_of_tokenizers_on_real_text():
    tokenizer = load_tokenizer(str(real_data("tokenizer/gpt2")), 0, list)
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    texts = [*read_documents([str(real_data("text/c4"))]), *TEXTS]
    reference = hugging_face(tokenizer).encode_batch(texts, add_special_tokens=False)
    for ids, expected in zip(tokenizer.encode_batch(texts), reference, strict=True):
        assert ids.tolist() == expected.ids


@pytest.mark.parametrize("spec", ["bpe", "bytes"])
def test_byte_level_tokenizers_keep_every_byte(spec):
    tokenizer = load_tokenizer(spec, 400, lambda: TEXTS)
    assert tokenizer.token_bytes is not None
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.eot] == 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes([tokenizer.eot, *ids]) == text.encode()
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.eot not in ids
        assert ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize("build", [wordpiece, sentencepiece_like])
def test_other_tokenizers_count_bytes_exactly(build, tmp_path):
    tokenizer = load_tokenizer(str(build(tmp_path / "t")), 0, list)
    assert tokenizer.token_bytes is None
    texts = [*TEXTS, "", "  "]
    for text, (ids, n_bytes) in zip(texts, tokenizer.encode_batch_with_bytes(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert len(n_bytes) == len(ids)
        assert n_bytes.sum() == (len(text.encode()) if len(ids) else 0)
        assert tokenizer.eot not in ids
    assert len(tokenizer.encode("many words " * 50)) > 50  # the file's truncation is off


def test_separator_is_the_one_that_the_tokenizer_names(tmp_path):
    llama, bert = sentencepiece_like(tmp_path / "llama"), wordpiece(tmp_path / "bert")
    assert load_tokenizer(str(llama), 0, list).eot == 2
    assert load_tokenizer(str(bert), 0, list).eot == 3


def test_byte_level_tokenizer_with_another_pattern_keeps_every_byte(tmp_path):
    """Llama 3's and Qwen's form: a regex of their own, then bytes; run by `tokenizers`."""
    loaded = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated")
    loaded.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    loaded.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    loaded.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    loaded.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path), 0, list)
    assert tokenizer.eot == tokenizer.vocab_size - 1  # it has no separator: one is added
    assert tokenizer.token_bytes is not None
    for text in TEXTS:
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def gpt2_files(folder: Path, added: dict[str, int] | None = None, **config) -> Path:
    """vocab.json and merges.txt with what transformers keeps beside them."""
    loaded = hugging_face(trained(400))
    folder.mkdir(parents=True)
    loaded.model.save(str(folder))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


ADDED = {"    ": 400, "<|user|>": 401}
DECODER = {str(id): {"content": token, "special": token != "    "} for token, id in ADDED.items()}


@pytest.mark.parametrize(
    ("added", "config"),
    [(ADDED, {}), (None, {"added_tokens_decoder": DECODER}), (ADDED, {"added_tokens_decoder": DECODER})],
)
def test_added_tokens_have_the_ids_of_auto_tokenizer(added, config, tmp_path):
    from transformers import AutoTokenizer

    folder = gpt2_files(tmp_path / "t", added, **config)
    tokenizer = load_tokenizer(str(folder), 0, list)
    assert tokenizer.vocab_size == 402
    reference = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for text in [*TEXTS, "def f():\n        return 1\n    # four", "say <|user|> twice <|user|>"]:
        expected = reference(text, split_special_tokens=True).input_ids
        assert tokenizer.encode(text).tolist() == expected, text
        if "<|" not in text:
            assert tokenizer.encode(text).tolist() == reference(text).input_ids
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [("[1, 2]", "holds a JSON list, not an object"), ('{"a": "x"}', "does not give each token an id"),
     ("{", "is not JSON"), ('{"a": 9000}', "other ids than these files"), ("[" * 50_000, "is not JSON")],
)  # fmt: skip
def test_a_damaged_list_of_added_tokens_is_said(content, says, tmp_path):
    folder = gpt2_files(tmp_path / "t")
    (folder / "added_tokens.json").write_text(content)
    with pytest.raises(BadInput, match=says) as raised:
        load_tokenizer(str(folder), 0, list)
    assert "\n" not in str(raised.value)


def test_the_code_of_a_tokenizer_folder_is_never_run_and_nothing_is_asked(tmp_path, monkeypatch):
    (folder := tmp_path / "t").mkdir()
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizer as Own\n"
    )
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "own.Own"}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    says = r"it needs Python code of its own \(auto_map\), which is never run; save it as tokenizer.json"
    with pytest.raises(BadInput, match=says) as raised:
        load_tokenizer(str(folder), 0, list)
    assert "\n" not in str(raised.value)
    assert not ran.exists()


def swapped(spec):
    vocab = spec["model"]["vocab"]
    first, second = (token for token, id in vocab.items() if id in (300, 301))
    vocab[first], vocab[second] = vocab[second], vocab[first]


def reversed_merges(spec):
    spec["model"]["merges"].reverse()


@pytest.mark.parametrize("change", [swapped, reversed_merges])
@pytest.mark.parametrize("of_before", [False, True])
def test_a_changed_tokenizer_of_the_cache_is_found_and_trained_again(change, of_before, tmp_path, caplog):
    first = trained(500, "a")
    (file,) = (tmp_path / "home" / "tokenizers").glob("bpe-500-*.json")
    kept = json.loads(file.read_text())
    spec = json.loads(kept["definition"])
    change(spec)
    kept["definition"] = json.dumps(spec)
    if of_before:  # when no sum was kept
        del kept["sha256"]
    file.write_text(json.dumps(kept))
    assert trained(500, "a").fingerprint == first.fingerprint
    assert caplog.text.count("is damaged and is trained again") == 1
    assert trained(500, "a").fingerprint == first.fingerprint
    assert caplog.text.count("is damaged and is trained again") == 1


def test_a_tokenizer_kept_before_there_was_a_sum_is_used(tmp_path, caplog):
    first = trained(500, "a")
    (file,) = (tmp_path / "home" / "tokenizers").glob("bpe-500-*.json")
    kept = json.loads(file.read_text())
    del kept["sha256"]
    file.write_text(json.dumps(kept))
    assert load_tokenizer("bpe", 500, lambda: pytest.fail("read"), "a").fingerprint == first.fingerprint
    assert "damaged" not in caplog.text


def test_runs_of_blanks_of_any_length_are_encoded(monkeypatch):
    tokenizer = trained()
    text = "ab" + " " * 1_100_000 + "x y" + "\n" * 1_100_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # The parts give the ids of the whole, where the whole can be encoded.
    monkeypatch.setattr(tokenizer_module, "LONG_BLANK", re.compile(LONG_BLANK.pattern.replace("65536", "5")))
    whole = tokenizer._tiktoken
    assert whole is not None

    class GivesUpOnce:
        asked = 0

        def encode_to_numpy(self, text, **options):
            self.asked += 1
            if self.asked == 1:
                raise ValueError("Max stack size exceeded for backtracking")
            return whole.encode_to_numpy(text, **options)

    for text in [
        "a     b",
        "a" + "\n " * 5 + "b" + "\t" * 6,
        "\u3000" * 7 + "q   " + "\x85" * 6,
        "x" + " " * 40,
        " " * 9,
    ]:
        expected = tokenizer.encode(text).tolist()
        monkeypatch.setattr(tokenizer, "_tiktoken", GivesUpOnce())
        assert tokenizer.encode(text).tolist() == expected
        monkeypatch.setattr(tokenizer, "_tiktoken", whole)


def test_training_is_not_held_up_by_endless_words():
    budget = tokenizer_loading.LONG_WORDS_CHARACTERS
    natural = [f"some words {i} here\n" for i in range(2000)]
    blob = "".join(random.Random(0).choices("abcdefgh", k=budget))
    assert list(tokenizer_loading._first_bytes([*natural, blob], 1 << 25)) == [*natural, blob]
    texts = list(tokenizer_loading._first_bytes([blob, f"before {blob} behind", *natural], 1 << 25))
    assert texts == [blob, "before  behind", *natural]


def test_bytes_that_a_tokenizer_loses_are_counted(tmp_path):
    lossy = load_tokenizer(str(wordpiece(tmp_path / "w")), 0, list)
    for text, lost in [("hello", 0), ("Hello", 1), ("a ⛄ b", 4), ("日", 0), ("", 0)]:
        assert lossy.lost_bytes(text, lossy.encode(text)) == lost, text
    whole = load_tokenizer(str(sentencepiece_like(tmp_path / "s")), 0, list)
    for text in TEXTS:
        assert whole.lost_bytes(text, whole.encode(text)) == 0


def test_json_holds_the_whole_tokenizer(tmp_path):
    for tokenizer in (
        trained(),
        load_tokenizer("bytes", 0, list),
        load_tokenizer(str(wordpiece(tmp_path / "w")), 0, list),
    ):
        again = Tokenizer.from_json(tokenizer.to_json())
        assert (again.fingerprint, again.vocab_size, again.eot) == (
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.eot,
        )
        assert all(again.encode(text).tolist() == tokenizer.encode(text).tolist() for text in TEXTS)


def test_training_is_kept_by_corpus_and_size_and_survives_damage(tmp_path):
    def untouched():
        raise AssertionError("the texts were read again")

    first = trained(500, "a")
    assert first.vocab_size == 500
    assert load_tokenizer("bpe", 500, untouched, "a").fingerprint == first.fingerprint
    assert trained(450, "a").vocab_size == 450
    assert load_tokenizer("bpe", 500, lambda: many_texts(50), "b").fingerprint != first.fingerprint
    for file in (tmp_path / "home" / "tokenizers").glob("bpe-500-*.json"):
        file.write_text(file.read_text()[:1000])
    assert trained(500, "a").fingerprint == first.fingerprint


def test_two_processes_train_at_once(tmp_path):
    code = (
        "from datamodules.tokenizer import load_tokenizer;"
        "print(load_tokenizer('bpe', 400, lambda: (f'text {i} word{i % 50}' for i in range(3000)), 'c').fingerprint)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate(timeout=60)[0] for process in both]
    assert printed[0] == printed[1] != ""
    assert len(list((tmp_path / "home" / "tokenizers").glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("spec", "vocab_size", "says"),
    [
        ("./nowhere", 0, "no folder './nowhere'"),
        ("", 0, "no folder ''"),
        ("bpe", 100, "vocab_size: 100 .* 257"),
    ],
)
def test_bad_settings_are_said(spec, vocab_size, says):
    with pytest.raises(BadInput, match=says):
        load_tokenizer(spec, vocab_size, list)


def test_bad_folders_are_said(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match=r"broken/tokenizer.json cannot be read"):
        load_tokenizer(str(tmp_path / "broken"), 0, list)
    with pytest.raises(BadInput, match="is a file"):
        load_tokenizer(str(tmp_path / "broken" / "tokenizer.json"), 0, list)


def test_unreachable_hub_is_said():
    code = (
        "from datamodules.tokenizer import load_tokenizer\n"
        "from t6_lightning.common.errors import BadInput\n"
        "try: load_tokenizer('nobody/nothing', 0, list)\n"
        "except BadInput as error: print(error)"
    )
    offline = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=offline, capture_output=True, text=True, timeout=120
    )
    assert "'nobody/nothing' is neither bpe nor bytes nor a folder" in said.stdout
    assert said.stdout.count("\n") == 1

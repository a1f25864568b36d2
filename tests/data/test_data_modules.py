"""The data modules as the training side meets them."""

import gzip
import itertools
import logging
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch
from data_helpers import many_texts, real_data, write, write_jsonl
from tokenizers import models, pre_tokenizers

from datamodules import C4, BadInput, Mixture, PythonDocs, TextFiles
from datamodules.__main__ import main


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "data" / "a.jsonl", many_texts(300))
    return [str(tmp_path / "data")]


def text_files(files, **options):
    common = {"tokenizer": "bytes", "context": 32, "batch_size": 4, "val_fraction": 0.1}
    return TextFiles(files, **(common | options))


def first(loader, n):
    return list(itertools.islice(loader, n))


def tokens_of(batches):
    return torch.cat([batch["tokens"] for batch in batches]).tolist()


def test_batches_have_the_promised_form(files):
    data = text_files(files)
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        kinds = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()}
        assert kinds == {
            "tokens": (torch.int64, (4, 32)),
            "targets": (torch.int64, (4, 32)),
            "documents": (torch.int32, (4, 32)),
            "n_bytes": (torch.int64, (4,)),
            "domain": (torch.int64, (4,)),
            "sample": (torch.int64, (4,)),
        }


def test_order_does_not_depend_on_workers_or_on_where_it_was_resumed(files):
    whole = tokens_of(first(text_files(files).train_dataloader(), 40))
    with_workers = text_files(files, num_workers=2)
    assert tokens_of(first(with_workers.train_dataloader(), 40)) == whole
    for workers in (0, 2):
        resumed = text_files(files, num_workers=workers)
        resumed.load_state_dict({**text_files(files).state_dict(), "samples": 52})
        assert tokens_of(first(resumed.train_dataloader(), 10)) == whole[52 : 52 + 40]
    # A loader iterated again goes on where it was.
    loader = with_workers.train_dataloader()
    assert tokens_of(first(loader, 2)) == whole[:8]
    assert tokens_of(first(loader, 2)) == whole[8:16]


def test_batch_size_does_not_change_the_order(files):
    whole = tokens_of(first(text_files(files).train_dataloader(), 12))
    assert tokens_of(first(text_files(files, batch_size=12).train_dataloader(), 4)) == whole


def test_validation_is_whole_and_the_same_with_workers(files):
    alone, workers = (list(text_files(files, num_workers=n).val_dataloader()) for n in (0, 2))
    assert tokens_of(alone) == tokens_of(workers)
    data = text_files(files)
    assert len(data.val_dataloader()) == len(alone)
    assert sum(int(batch["n_bytes"].sum()) for batch in alone) == data.summary()["val_bytes"]


def test_loaders_have_a_length_and_leave_the_global_generators_alone(files):
    data = text_files(files)
    data.prepare_data()
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    windows = data.train_dataloader().windows["text"].per_epoch
    assert len(data.train_dataloader()) == windows // 4
    for _ in range(2):
        first(data.train_dataloader(), 3)
        list(data.val_dataloader())
        first(text_files(files, num_workers=2).train_dataloader(), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_other_data_at_resume_is_warned_of_once(files, tmp_path, caplog):
    state = text_files(files).state_dict()
    names = {"samples", "epoch", "epoch_start", "batch", "length", "seed", "context", "fingerprint"}
    assert set(state) == names
    data = text_files(files)
    data.load_state_dict(state)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    write_jsonl(tmp_path / "data" / "b.jsonl", ["one more"])
    changed = text_files(files)
    changed.load_state_dict(state)
    assert caplog.text.count("THE DATA HAS CHANGED") == 1


def test_fingerprint_knows_content_not_place(files, tmp_path):
    write(tmp_path / "elsewhere" / "a.jsonl.gz", (tmp_path / "data" / "a.jsonl").read_bytes())
    here, there = text_files(files), text_files([str(tmp_path / "elsewhere")])
    assert here.fingerprint == there.fingerprint
    assert len({here.fingerprint, text_files(files, val_fraction=0.2).fingerprint,
                text_files(files, tokenizer="bpe", vocab_size=300).fingerprint}) == 3  # fmt: skip
    assert text_files(files, seed=5).fingerprint == here.fingerprint


def test_one_path_needs_no_list(files, tmp_path):
    (tmp_path / "left-out.jsonl").write_text('{"text": "no"}\n')
    folder = text_files(str(tmp_path), exclude="left-*")
    assert [source.name for source in folder.sources()] == ["a.jsonl"]
    assert folder.fingerprint == text_files(files).fingerprint


def test_second_run_tokenizes_nothing(files, caplog):
    caplog.set_level(logging.INFO)
    text_files(files, tokenizer="bpe", vocab_size=300).prepare_data()
    assert "Training a byte-level BPE" in caplog.text
    caplog.clear()
    text_files(files, tokenizer="bpe", vocab_size=300, context=16, seed=9).prepare_data()
    assert "Training" not in caplog.text
    assert "nothing is tokenized" in caplog.text


def test_validation_files_are_domains_and_leave_training(files, tmp_path):
    write_jsonl(tmp_path / "v" / "v.jsonl", many_texts(20))  # all of them are in the training file, too
    data = text_files(
        files, val_files={"held": str(tmp_path / "v"), "more": [str(tmp_path / "v" / "*.jsonl")]}
    )
    assert data.domains == ["text", "held", "more"]
    corpus = data.corpus
    held = corpus.table.key[corpus.validation_documents["held"]]
    assert len(held) == 20
    assert not np.isin(corpus.table.key[corpus.training_documents], held).any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size: 0 is not allowed; allowed: 1 to 1,048,576"),
        ({"context": -1}, "context: -1"),
        ({"num_workers": -1}, "num_workers: -1"),
        ({"val_tokens": 0}, "val_tokens: 0"),
        ({"val_fraction": 1.0}, "val_fraction: 1.0"),
        ({"txt_documents": "page"}, "txt_documents: 'page'"),
    ],
)
def test_bad_settings_are_said(options, says):
    with pytest.raises(BadInput, match=says):
        text_files(["x"], **options)


@pytest.fixture(scope="module")
def python_docs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T6_HOME", str(tmp_path_factory.mktemp("home")))
        data = PythonDocs()
        data.prepare_data()
        yield data


def test_python_docs_with_its_own_bpe(python_docs):
    assert python_docs.domains == ["code", "prose"]
    assert python_docs.tokenizer.vocab_size == 8192
    summary = python_docs.summary()
    assert summary["train_tokens"] > 2_000_000
    held_out = summary["val_bytes"] + summary["test_bytes"]
    assert 0.03 < held_out / (summary["train_bytes"] + held_out) < 0.06
    assert all(domain["test_documents"] > 5 for domain in summary["domains"].values())
    assert (
        0.5
        < summary["xz_bits_per_byte"]
        < summary["gzip_bits_per_byte"]
        < summary["unigram_bits_per_byte"]
        < 4
    )


def test_gzip_figure_is_what_gzip_reaches(python_docs):
    corpus = python_docs.corpus
    size = 0
    for documents in corpus.validation_documents.values():
        text = "".join(python_docs.tokenizer.decode(corpus.table.tokens(document)) for document in documents)
        size += len(gzip.compress(text.encode(), 9))
    assert python_docs.summary()["gzip_bits_per_byte"] == pytest.approx(
        8 * size / python_docs.summary()["val_bytes"]
    )


def test_real_files_with_gpt2(tmp_path):
    data = TextFiles(
        [str(real_data("text/tinystories/train.jsonl.gz"))],
        val_files={"wikitext-2": str(real_data("text/wikitext-2/valid.txt"))},
        tokenizer=str(real_data("tokenizer/gpt2")),
        val_fraction=0.05,
    )
    domains = data.summary()["domains"]
    assert domains["wikitext-2"]["val_bytes"] == real_data("text/wikitext-2/valid.txt").stat().st_size
    assert next(iter(data.train_dataloader()))["tokens"].shape == (8, 512)


def test_command_line(files, tmp_path, capsys):
    arguments = ["--files", *files, "--tokenizer", "bytes", "--context", "32", "--val_fraction", "0.1"]
    assert main(["prepare", *arguments]) == 0
    assert main(["inspect", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "fingerprint" in printed
    assert [line.split()[0] for line in printed.splitlines()[3:8]] == ["train", "val", "text", "test", "text"]
    assert "read + tokenize + pack" in printed
    assert main(["inspect", "--files", str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.strip().endswith("none.jsonl' does not exist.")


def test_validation_files_that_hold_all_training_text_are_named(files, home):
    data = TextFiles(files, val_files={"v": files}, tokenizer="bytes", val_fraction=0.0)
    with pytest.raises(BadInput, match=r"^val_files: they hold all \d+ documents that there are to train on"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--data", "PythonDocs", "--tokenizer", "bytes"],
            "--tokenizer: beside --data or --config it is --data.tokenizer.",
        ),
        (["--val_fraction", "0.1"], "--val_fraction: it belongs to --files, which is missing."),
        (["--files", ""], "files: '' is no path; name a file, a folder or a glob."),
        (
            ["--data", "TextFiles", "--data.files", "a", "--files", "b"],
            "--files: beside --data or --config it is --data.files.",
        ),
        (
            ["--data", "FineWebEdu", "--val_files", "v=b"],
            "--val_files: beside --data or --config it is --data.val_files.",
        ),
        (["--tokens", "50"], "--tokens: it belongs to streams; PythonDocs is read whole."),
        (
            ["--files", "a", "--val_files", "v=b", "w=b", "v=c"],
            "--val_files: 'v=c' names 'v' again; allowed: each DOMAIN once.",
        ),
        (["--samples", "-3"], "--samples: '-3' is not allowed; allowed: whole numbers from 0 on."),
        (["--tokens", "-5"], "--tokens: '-5' is not allowed; allowed: whole numbers from 0 on."),
        (["--nosuch", "3"], "--nosuch: there is no such flag here; --help lists those there are."),
        (["--val_tokens", "many"], "--val_tokens: invalid int value: 'many'."),
        (["--config", "nosuch.yaml"], "--config: nosuch.yaml cannot be read (No such file or directory)."),
    ],
)
def test_what_does_not_fit_is_refused(home, arguments, sentence, capsys):
    assert main(["inspect", *arguments]) == 2
    assert capsys.readouterr().err.strip() == f"error: {sentence}"


def test_importing_the_package_is_light():
    code = (
        "import sys, datamodules, datamodules.text_files, datamodules.tokenizer, datamodules.token_cache\n"
        "heavy = {'torch', 'lightning', 'datasets', 'transformers', 'tiktoken', 'tokenizers', 'pyarrow', 'mlflow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert printed.stdout == "[]\n"


@pytest.mark.parametrize("form", ["files", "stream", "mixture"])
def test_a_tokenizer_that_loses_validation_text_is_named_with_the_share(form, tmp_path, caplog):
    """What was lost is known from the cache too; bits per byte of such text are not comparable."""
    loaded = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "known": 1, "word": 2}, unk_token="[UNK]"))
    loaded.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    loaded.save(str(tmp_path / "tokenizer.json"))
    texts = [f"known word known ⛄{i}" for i in range(1000)]
    write_jsonl(tmp_path / "mirror" / "a.jsonl", texts)
    common = {"tokenizer": str(tmp_path), "context": 16, "batch_size": 2}

    def build():
        if form == "files":
            return TextFiles(str(tmp_path / "mirror"), val_fraction=0.3, **common)
        streamed = C4(path=str(tmp_path / "mirror"), **common)
        return streamed if form == "stream" else Mixture({"c4": streamed}, {"c4": 1.0}, **common)

    for _ in range(2):
        caplog.clear()
        data = build()
        data.prepare_data()
        summary = data.summary()
        # "⛄123" of 6 bytes and the blank before it, of 23; fewer digits weigh less.
        assert 0.25 < summary["val_lost_share"] < 0.32
        assert "gzip_bits_per_byte" not in summary
        if form == "files":
            assert "it loses 30 % of the bytes of the validation text" in caplog.text
            assert "cannot be compared with other tokenizers" in caplog.text
    assert (
        "val_lost_share"
        not in TextFiles(
            str(tmp_path / "mirror"), val_fraction=0.3, **common | {"tokenizer": "bytes"}
        ).summary()
    )

"""Local files: every form is read, everything wrong is said in one sentence."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import TEXTS, real_data, write, write_jsonl

from datamodules import TextFiles, text_reading
from datamodules.stores import Folder
from datamodules.text_files import file_source, find_files, read_documents
from t6_lightning.common.errors import BadInput


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz"])
def test_json_lines(tmp_path, name):
    assert list(read_documents(str(write_jsonl(tmp_path / name, TEXTS)))) == TEXTS


def test_json_array(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert list(read_documents(str(path))) == TEXTS


def test_other_forms_of_json(tmp_path):
    def texts(content):
        return list(read_documents(str(write(tmp_path / "a.json", content))))

    assert texts(json.dumps(TEXTS)) == TEXTS
    assert texts("\n\n" + "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS)) == TEXTS
    assert texts(
        '\ufeff{"text": "a"}\n\n{"id": 5}\n{"text": null}\n{"text": "", "id": "x"}\n{"text": "b"}'
    ) == [
        "a",
        "b",
    ]


def test_texts_and_labels_are_what_is_written_whatever_other_rows_hold(tmp_path):
    """Also far into a file, and where other columns change their type from row to row."""
    many = [{"text": '"quoted"', "d": "web", "meta": {"d": "web"}, "other": i} for i in range(3000)]
    odd = {"text": "2020-01-01", "d": 5, "meta": {"d": 5, "more": []}, "other": ["list"]}
    for rows in ([odd, *many], [*many, odd]):
        for name in ("a.jsonl", "a.jsonl.zst"):
            path = write(tmp_path / name, "\n".join(json.dumps(row) for row in rows))
            for field in ("d", "meta.d"):
                documents = list(file_source(path, "text", field, "text", "file").documents())
                assert {(document.text, document.domain) for document in documents} == {
                    ('"quoted"', "web"),
                    ("2020-01-01", "5"),
                }


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_document_without_a_label_is_of_the_usual_domain(tmp_path, name):
    rows = [{"text": "labelled", "d": "web"}, {"text": "bare", "d": None}]
    if name == "a.jsonl":
        write(tmp_path / name, "\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    documents = file_source(tmp_path / name, "text", "d", "text", "file").documents()
    assert [document.domain for document in documents] == ["web", "text"]


def test_parquet(tmp_path):
    pq.write_table(pa.table({"id": range(len(TEXTS)), "body": TEXTS}), tmp_path / "a.parquet")
    assert list(read_documents(str(tmp_path / "a.parquet"), text_field="body")) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_txt_is_cut_as_asked(tmp_path, name):
    path = str(write(tmp_path / name, "one\ntwo\n\nthree ü\n"))
    assert list(read_documents(path)) == ["one\ntwo\n\nthree ü\n"]
    assert list(read_documents(path, txt="line")) == ["one", "two", "three ü"]
    assert [text.strip() for text in read_documents(path, txt="paragraph")] == ["one\ntwo", "three ü"]


@pytest.mark.parametrize("txt", ["file", "line", "paragraph"])
def test_a_byte_order_mark_is_no_text(tmp_path, txt):
    path = write(tmp_path / "a.txt", "\ufeffone \ufeff")
    assert [text.strip() for text in read_documents(str(path), txt=txt)] == ["one \ufeff"]


def test_parquet_without_rows(tmp_path):
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(BadInput, match=r"empty.parquet holds no text: no row of it has a non-empty 'text'\."):
        list(read_documents(str(tmp_path / "empty.parquet")))
    with pq.ParquetWriter(tmp_path / "a.parquet", empty.schema) as writer:
        writer.write_table(empty)
        writer.write_table(pa.table({"text": TEXTS}))
    assert list(read_documents(str(tmp_path / "a.parquet"))) == TEXTS


def test_several_compressed_frames_are_one_file(tmp_path):
    one = gzip.compress(b'{"text": "one"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(one + one)
    assert list(read_documents(str(tmp_path / "a.jsonl.gz"))) == ["one", "one"]


def test_folders_globs_and_exclusions(tmp_path):
    for name in ("b/c4-00.jsonl", "b/books-00.jsonl.zst", "a.txt"):
        write(tmp_path / name, '{"text": "x"}\n')
    write(tmp_path / "b" / "readme.md", "not data")

    def names(patterns, exclude=()):
        return [path.name for path in find_files(patterns, exclude)]

    assert names(str(tmp_path)) == ["a.txt", "books-00.jsonl.zst", "c4-00.jsonl"]
    assert names([str(tmp_path / "**" / "*.jsonl*"), str(tmp_path / "b")]) == [
        "books-00.jsonl.zst",
        "c4-00.jsonl",
    ]
    assert names(str(tmp_path), ["c4-*"]) == ["a.txt", "books-00.jsonl.zst"]
    with pytest.raises(BadInput, match=r"exclude: \['\*'\] leaves none"):
        names(str(tmp_path), ["*"])


ENDINGS = "one\r\ntwo\rthree\n\r\nfour\r\n\r\nfive\u2028six\n\nlast\r"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.txt.xz", "a.txt.bz2"])
@pytest.mark.parametrize("at_once", [1, 2, 7, 1 << 20])
def test_line_ends_of_a_text_stay_as_they_are(name, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(text_reading, "READ_AT_ONCE", at_once)
    path = str(write(tmp_path / name, ENDINGS))
    assert list(read_documents(path)) == [ENDINGS]
    assert list(read_documents(path, txt="line")) == ["one", "two", "three", "four", "five\u2028six", "last"]
    assert list(read_documents(path, txt="paragraph")) == [
        "one\r\ntwo\rthree",
        "four",
        "five\u2028six",
        "last\r",
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_bits_per_byte_are_counted_on_the_bytes_of_the_file(ending, tmp_path, monkeypatch):
    monkeypatch.setenv("T6_HOME", str(tmp_path / "home"))
    text = ending.join(["first line", "", "second line of the file"]) + ending
    (tmp_path / "val.txt").write_text(text, newline="")
    write_jsonl(tmp_path / "train.jsonl", TEXTS * 3)
    data = TextFiles(
        str(tmp_path / "train.jsonl"),
        val_files={"own": str(tmp_path / "val.txt")},
        val_fraction=0,
        tokenizer="bytes",
        context=16,
        batch_size=2,
    )
    assert data.summary()["val_bytes"] == len(text.encode()) == (tmp_path / "val.txt").stat().st_size
    assert sum(int(batch["n_bytes"].sum()) for batch in data.val_dataloader()) == len(text.encode())


def test_linked_folders_are_searched_and_a_circle_of_links_ends(tmp_path):
    write_jsonl(tmp_path / "elsewhere" / "deep" / "b.jsonl", ["linked"])
    write_jsonl(tmp_path / "texts" / "real" / "a.jsonl", ["real"])
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "itself").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "again").symlink_to(tmp_path / "texts" / "real")
    (tmp_path / "texts" / "nowhere").symlink_to(tmp_path / "gone")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(str(tmp_path / "texts"))]
    assert found == ["texts/link/deep/b.jsonl", "texts/real/a.jsonl"]
    assert list(read_documents(str(tmp_path / "texts"))) == ["linked", "real"]
    mirrored = [file.path for file in Folder(str(tmp_path / "texts")).files(["*"])]
    assert mirrored == ["link/deep/b.jsonl", "real/a.jsonl"]


def test_arrays_are_read_element_by_element_wherever_the_text_is_cut(tmp_path, monkeypatch):
    rows = [{"text": text, "n": [1.5, -20, {"deep": [text]}]} for text in TEXTS]
    mixed = [*rows, "a string", {"text": None}, {"text": "]"}, {"text": "\\"}]
    contents = {
        "array.json": json.dumps(mixed, ensure_ascii=False),
        "indented.json": json.dumps(mixed, indent=2),
        "objects.json": " \n".join(json.dumps(row, indent=1) for row in rows),
    }
    for name, content in contents.items():
        path = write(tmp_path / name, content)
        expected = TEXTS if name == "objects.json" else [*TEXTS, "a string", "]", "\\"]
        for at_once in (1, 3, 64, 1 << 20):
            monkeypatch.setattr(text_reading, "READ_AT_ONCE", at_once)
            assert list(read_documents(str(path))) == expected, (name, at_once)


def test_names_with_brackets_are_no_patterns(tmp_path):
    assert list(read_documents(str(write_jsonl(tmp_path / "a[1]*.jsonl", ["x"])))) == ["x"]


def test_domains_come_from_a_column_or_inside_an_object(tmp_path):
    rows = [{"text": "a", "meta": {"set": "web"}}, {"text": "b", "meta": {"set": "books", "n": 1}}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))

    def domains(field):
        return [document.domain for document in file_source(path, "text", field, "text", "file").documents()]

    assert domains("meta.set") == ["web", "books"]
    assert domains(None) == ["text", "text"]
    with pytest.raises(BadInput, match=r"domain_field: .* has no column 'subset'; present: text, meta\."):
        domains("subset")


def test_published_layouts_are_read():
    pile = file_source(
        real_data("text/pile/train-00.jsonl.zst"), "text", "meta.pile_set_name", "text", "file"
    )
    assert len({document.domain for document in pile.documents()}) == 20
    assert len(list(read_documents(str(real_data("text/c4"))))) == 849


BAD_FILES = {
    "empty.jsonl": (b"", r"empty.jsonl is empty\."),
    "blank.txt": (b"", r"blank.txt is empty\."),
    "no_text.jsonl": (b'{"text": ""}\n{"text": null}\n', "no_text.jsonl holds no text"),
    "corrupt.jsonl": (b'{"text": "a"}\n{"text": "b"}\n{"text": \n', "corrupt.jsonl: line 3 is not JSON"),
    "corrupt.jsonl.gz": (b'{"text": "a"}\nnonsense\n', "corrupt.jsonl.gz: line 2 is not JSON"),
    "corrupt.jsonl.zst": (b'{"text": "a"}\n{"text" "b"}\n', "corrupt.jsonl.zst: line 2 is not JSON"),
    "latin1.jsonl": (
        b'{"text": "a"}\n{"text": "caf\xe9"}\n',
        r"latin1.jsonl: line 2, byte 14 of it \(0xe9\) is not UTF-8",
    ),
    "latin1.txt": (b"one\ntwo\nna\xefve\n", r"latin1.txt: line 3, byte 3 of it \(0xef\) is not UTF-8"),
    "column.jsonl": (
        b'{"body": "a", "id": 1}\n',
        r"text_field: .*column.jsonl has no column 'text'; present: body, id",
    ),
    "number.jsonl": (b'{"text": 5}\n', "number.jsonl: line 1: column 'text' holds int, not text"),
    "one_number.jsonl": (
        b'{"text": "a"}\n\n{"text": 5}\n{"text": "b"}\n',
        "one_number.jsonl: line 3: column 'text' holds int, not text",
    ),
    "one_object.jsonl.gz": (
        b'{"text": "a"}\n' * 20_000 + b'{"text": {"a": "b"}}\n',
        "one_object.jsonl.gz: line 20001: column 'text' holds dict, not text",
    ),
    "one_number.json": (
        b'[{"text": "a"},\n{"text": null}, {"text": 5.5}]',
        "one_number.json: row 3: column 'text' holds float, not text",
    ),
    "open.json": (b'[{"text": "a"},\n{"text": "b"}', "open.json: line 2 is not JSON"),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', "comma.json: line 1 is not JSON .*column 16"),
    "behind.json": (b'[{"text": "a"}]\n5', "behind.json: line 2 is a JSON int, not an object"),
    "deep.jsonl": (b'{"text": "a"}\n{"text": ' + b"[" * 100_000, "deep.jsonl: line 2 is not JSON"),
    "deep.json": (b"[" * 200_000, "deep.json: line 1 is not JSON"),
    "bent.txt.gz": (b"", r"bent.txt.gz is empty\."),
    "array.json": (b'[{"text": "a"},\n{"text": "b"]\n', "array.json: line 2 is not JSON"),
    "mixed_rows.json": (b'[{"text": "a"}, 5]', "mixed_rows.json: row 2 is a JSON int, not an object"),
    "surrogate.jsonl": (
        b'{"text": "a"}\n{"text": "b \\ud83d c"}\n',
        "surrogate.jsonl: line 2: column 'text' holds half of a surrogate pair",
    ),
    "list.jsonl": (b'{"text": "a"}\n["b"]\n', "list.jsonl: line 2 is a JSON list, not an object"),
    "fake.parquet": (b"this is no parquet", "fake.parquet: "),
    "word.docx": (b"x", r"word.docx: the suffix '.docx' is not supported; allowed: .jsonl, .json, .parquet, .txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_said_in_one_sentence(tmp_path, name):
    data, says = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(b"") if not data else write(path, data)
    with pytest.raises(BadInput, match=says) as raised:
        list(read_documents(str(path)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.jsonl.bz2"])
def test_cut_and_damaged_archives_are_said(tmp_path, name):
    path = write_jsonl(tmp_path / name, [f"{i} {hash(str(i))}" for i in range(5000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(
        BadInput, match=rf"{name}: the compressed data is cut off; fetch or make the file again"
    ):
        list(read_documents(str(path)))
    path.write_bytes(whole + b"no member follows")
    said = rf"{name}: the compressed data is damaged near byte [\d,]+ of the file"
    with pytest.raises(BadInput, match=said) as raised:
        list(read_documents(str(path)))
    assert int(str(raised.value).split("byte ")[1].split(" ")[0].replace(",", "")) <= len(whole)


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_zeros_behind_a_compressed_file_are_padding(suffix, tmp_path):
    path = write_jsonl(tmp_path / f"a.jsonl.{suffix}", TEXTS)
    path.write_bytes(path.read_bytes() + b"\0" * 4096)
    assert list(read_documents(str(path))) == TEXTS


def test_missing_files_are_said(tmp_path):
    with pytest.raises(BadInput, match=r"files: '.*/no.jsonl' does not exist\."):
        find_files([str(tmp_path / "no.jsonl")])
    with pytest.raises(BadInput, match=r"val_files.c4: '.*\*.jsonl' matches no file\."):
        find_files([str(tmp_path / "*.jsonl")], field="val_files.c4")
    with pytest.raises(BadInput, match="holds no file that can be read"):
        find_files([str(tmp_path)])
    with pytest.raises(BadInput, match="files: the list is empty"):
        find_files([])

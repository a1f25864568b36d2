"""The operation benchmark: JSON, table, bad input, and a light --help."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels
from kernels.bench import files, operations, plan, report
from kernels.bench.__main__ import main
from kernels.bench.plot import main as plot
from kernels.contract import bench as contract_bench
from kernels.loss import bench as loss_bench

TINY = {
    "decode": ["--batch", "1", "--context", "33", "--heads", "3", "--head-dim", "8", "--rank", "2"],
    "contract": ["--batch", "1", "--context", "33", "--heads", "3", "--head-dim", "8", "--rank", "2"],
    "attention": ["--batch", "1", "--context", "33", "--heads", "6", "--head-dim", "8", "--kv-heads", "2"],
    "linear": ["--batch", "3", "--inputs", "24", "--outputs", "40"],
    "swiglu": ["--batch", "1", "--context", "5", "--hidden", "24"],
    "loss": ["--batch", "1", "--context", "33", "--d-model", "8", "--vocabulary", "65"],
}
RECORDED = Path(__file__).parents[2] / "kernels/results/decode.json"
QUICK = ["--seconds", "0", "--device", "cpu"]


def check(result: dict, operation: str, backends: set[str]) -> None:
    assert result["operation"] == operation
    assert {row["backend"] for row in result["rows"]} >= backends
    assert result["copy_bytes_per_second"] > 1e8
    assert {"device", "torch", "git_commit", "date", "dtype", "sizes"} <= result.keys()
    for row in result["rows"]:
        low, high = row["quartiles_s"]
        assert 0 < low <= row["median_s"] <= high
        baseline = next(
            other
            for other in result["rows"]
            if other["mode"] == row["mode"] and other["backend"] == row["ratio_to"]
        )
        assert row["ratio"] == pytest.approx(baseline["median_s"] / row["median_s"])


@pytest.mark.parametrize(
    ("operation", "backends"),
    [
        ("contract", {"plain", "plain, Q K V of 2, 2, 2", "separate passes"}),
        ("attention", {"plain", "sdpa"}),
        ("swiglu", {"plain"}),
        ("loss", {"plain (chunks)", "all logits"}),
    ],
)
def test_json_on_standard_output(operation, backends, capsys):
    assert main([operation, *TINY[operation], *QUICK, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    check(result, operation, backends)
    assert {row["mode"] for row in result["rows"]} == {"forward", "forward+backward"}


def test_linear_layers_of_few_rows(capsys):
    assert main(["linear", *TINY["linear"], *QUICK, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    check(result, "linear", {"plain", "plain, residual", "plain, norm and SwiGLU"})
    # The weight, 3 rows in and 3 rows out, 4 bytes each; the residual; a second weight.
    alone = 4 * (24 * 40 + 3 * 24 + 3 * 40)
    assert [row["least_bytes"] for row in result["rows"]] == [alone, alone + 4 * 3 * 40, alone + 4 * 24 * 40]


def test_the_papers_sizes(capsys, monkeypatch):
    assert [sizes["heads"] for sizes in contract_bench.PAPER_SIZES] == [34, 34, 47, 47, 61, 61, 78, 78]
    small = [{**sizes, "batch": 1, "context": 3} for sizes in contract_bench.PAPER_SIZES[:2]]
    monkeypatch.setattr(contract_bench, "PAPER_SIZES", small)
    assert main(["contract", "--paper", *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [case["sizes"]["rank"] for case in found["cases"]] == [6, 2]
    for case in found["cases"]:
        rank = case["sizes"]["rank"]
        check(case, "contract", {"plain", f"plain, Q K V of {rank}, 2, 2", "separate passes"})
    # Forward: a 34·6, b 64·6 and the result 34·64 of 3 tokens, 4 bytes each; both passes: factors 3 times, 2 results.
    factors, result = 4 * 3 * 6 * (34 + 64), 4 * 3 * 34 * 64
    assert [row["least_bytes"] for row in found["cases"][0]["rows"][:2]] == [
        factors + result,
        3 * factors + 2 * result,
    ]


def test_the_papers_sizes_without_memory_are_one_sentence(capsys, monkeypatch):
    one = {"batch": 1, "context": 3, "d_model": 8, "vocabulary": 65}
    monkeypatch.setattr(loss_bench, "PAPER_SIZES", [one, {**one, "context": 10**14}])
    with pytest.raises(SystemExit) as left:
        main(["loss", "--paper", *QUICK])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "python -m kernels.bench: --paper (--batch 1 --context 100000000000000 --d-model 8 --vocabulary 65):"
        " there is no memory for these sizes here\n"
    )


def test_as_a_command_with_json_in_a_file(tmp_path):
    file = tmp_path / "decode.json"
    done = subprocess.run(
        [sys.executable, "-m", "kernels.bench", "decode", *TINY["decode"], *QUICK, "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    check(result, "decode", {"plain", "sdpa", "MHA over a full cache"})
    assert result["sizes"] == {"batch": 1, "context": 33, "queries": 1, "heads": 3, "head_dim": 8, "rank": 2}
    # q and o: 3·8; a: 2·33·2·3; b: 2·33·2·8 elements of 4 bytes.
    assert result["rows"][0]["least_bytes"] == 4 * (2 * 24 + 2 * 198 + 2 * 528)
    assert "median ms" in done.stdout
    assert "MHA over a full cache" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["decode", "--rank", "0"], "--rank: must be a whole number of at least 1, got '0'"),
        (["attention", "--heads", "6", "--kv-heads", "4"], "--kv-heads 4 must divide --heads 6"),
        (["contract", "--head-dim", "7"], "--head-dim must be even for RoPE, got 7"),
        (["loss", "--seconds", "soon"], "--seconds: must be a number of seconds, got 'soon'"),
        (["loss", "--json", "/no/such/folder/x.json"], "there is no such folder"),
        (["loss", "--paper", "--d-model", "8"], "--paper has its own sizes: leave out --d-model"),
        (["decode", "--paper"], "unrecognized arguments: --paper"),
        (["decode", "--table"], "--table times the Triton kernel: it needs a CUDA device"),
        (["decode", "--launches"], "--launches times the Triton kernel: it needs a CUDA device"),
        (
            ["decode", "--launches", "--table"],
            "--launches has its own sizes, dtype and repetitions: leave out --table",
        ),
        (["decode", "--launches", "--reference", "."], "dtype and repetitions: leave out --reference"),
        (
            ["decode", "--table", "--head-dim", "8"],
            "its own sizes, dtype and repetitions: leave out --head-dim",
        ),
        (["decode", "--table", "--dtype", "float16"], "dtype and repetitions: leave out --dtype"),
        (["decode", "--table", "--seconds", "0"], "dtype and repetitions: leave out --seconds"),
        (["train"], "invalid choice: 'train'"),
        (
            ["decode", "--context", "1" + 14 * "0"],
            "--context 100000000000000: there is no memory for these sizes",
        ),
        (["loss", "--d-model", "1" + 20 * "0"], "--d-model 100000000000000000000: there is no memory"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *(["--device", "cpu"] if arguments != ["train"] else [])])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_help_does_not_import_torch():
    script = (
        "import sys, contextlib\n"
        "from kernels.bench.__main__ import main\n"
        "with contextlib.suppress(SystemExit): main(['decode', '--help'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--rank N" in done.stdout


def test_operations_are_found_by_their_bench_file():
    found = operations.find()
    assert found.keys() >= {"attention", "contract", "decode", "linear", "loss", "swiglu"}
    for name, operation in found.items():
        bench = importlib.import_module(f"kernels.{name}.bench")
        assert operation.options.keys() == bench.CPU_SIZES.keys() == bench.GPU_SIZES.keys()
        assert operation.has_paper_sizes == hasattr(bench, "PAPER_SIZES")
        for run in operation.long_runs:
            assert callable(importlib.import_module(f"kernels.{name}.bench_{run}").run)
    assert found["decode"].long_runs.keys() == {"launches", "table"}


OPERATION = """
from kernels.bench.plan import Row, n_bytes
import torch

WHAT = "twice a number"
OPTIONS = {"size": "numbers", "copies": "of them"}
FOLDERS = {"their_code": "a clone of somebody's code"}
CPU_SIZES = {"size": 3, "copies": "size"}
GPU_SIZES = {"size": 3, "copies": "size"}


def rows(sizes, dtype, *, their_code=None):
    x = torch.randn(sizes["copies"], sizes["size"], dtype=dtype)
    found = [Row("plain", "forward", lambda: 2 * x, 2 * n_bytes(x))]
    return found + [Row(f"theirs {their_code}", "forward", lambda: x + x)] * (their_code is not None)
"""


@pytest.fixture
def doubled(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """The folder of an operation that nothing but its own files knows of."""
    folder = tmp_path / "doubled"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "bench.py").write_text(OPERATION)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    yield folder
    for name in [name for name in sys.modules if name.startswith("kernels.doubled")]:
        del sys.modules[name]


def test_a_new_operation_needs_no_other_file(doubled: Path, capsys):
    assert main(["doubled", *QUICK, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    check(result, "doubled", {"plain"})
    assert result["sizes"] == {"size": 3, "copies": 3}
    assert main(["doubled", "--size", "5", "--copies", "2", "--their-code", "F", *QUICK, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sizes"] == {"size": 5, "copies": 2}
    assert [row["backend"] for row in result["rows"]] == ["plain", "theirs F"]
    with pytest.raises(SystemExit):
        main(["doubled", "--help"])
    said = capsys.readouterr().out
    assert "Times twice a number." in said
    assert "--their-code DIR" in said
    assert "--paper" not in said


LONG_RUN = """
HELP = "many numbers"
FOLDERS = ("their_code",)


def run(device, *, save, their_code=None):
    result = {"complete": False, "their_code": str(their_code), "rows": []}
    for row in range(3):
        result["rows"].append(row)
        save(result)
        if their_code is None and row == 1:
            raise KeyboardInterrupt
    return result | {"complete": True}


def table(result):
    return f"{len(result['rows'])} rows"
"""


def test_a_long_run_writes_its_rows_as_they_come(doubled: Path, tmp_path: Path, capsys, monkeypatch):
    (doubled / "bench_many.py").write_text(LONG_RUN)
    (doubled / "bench_helper.py").write_text("")
    assert operations.find()["doubled"].long_runs.keys() == {"many"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("kernels.place.TRITON_IS_INSTALLED", True)
    file = tmp_path / "x.json"
    file.write_text("older")
    with pytest.raises(SystemExit) as left:
        main(["doubled", "--many", "--json", str(file)])
    assert left.value.code == 130
    assert capsys.readouterr().err == (
        f"python -m kernels.bench: interrupted; the finished rows are in {file}\n"
    )
    assert json.loads(file.read_text()) == {"complete": False, "their_code": "None", "rows": [0, 1]}
    assert main(["doubled", "--many", "--their-code", "F", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == {"complete": True, "their_code": "F", "rows": [0, 1, 2]}
    assert capsys.readouterr().out == "3 rows\n"
    # Standard output and pipes take one document.
    assert main(["doubled", "--many", "--their-code", "F", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    with pytest.raises(SystemExit):
        main(["doubled", "--many", "--size", "3"])
    assert "--many has its own sizes, dtype and repetitions: leave out --size" in capsys.readouterr().err


def test_rows_go_into_no_pipe_before_the_end(tmp_path: Path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    assert files.is_regular(str(tmp_path / "new"))
    assert files.is_regular(str(tmp_path / "file"))
    assert not files.is_regular(str(tmp_path / "pipe"))
    assert not files.is_regular("/dev/null")


def test_a_declaration_that_cannot_be_read_names_its_file(doubled: Path):
    for wrong in (OPERATION.replace('"twice a number"', "str(2)"), OPERATION.replace("WHAT", "THAT")):
        (doubled / "bench.py").write_text(wrong)
        with pytest.raises(TypeError, match=r"doubled/bench\.py: WHAT must be there, as a literal"):
            operations.find()


def test_operations_do_not_import_their_benchmark():
    script = (
        "import sys, kernels.attention, kernels.contract, kernels.decode, kernels.linear, kernels.loss\n"
        "import kernels.factors, kernels.rope, kernels.swiglu\n"
        "print([name for name in sys.modules if name.startswith('kernels.') and '.bench' in name])\n"
        "print([name for name in sys.modules if name.startswith('t6_lightning')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


def test_help_says_what_the_command_does(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "Times one operation of the kernels" in said
    assert "torch" not in said


def test_a_picture_of_the_table(tmp_path: Path):
    assert plot([str(RECORDED), str(tmp_path / "decode.png")]) == 0
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    # One of the cases is enough.
    table = json.loads(RECORDED.read_text())
    table["rows"] = [row for row in table["rows"] if row["heads"] == 47]
    (tmp_path / "some.json").write_text(json.dumps(table))
    assert plot([str(tmp_path / "some.json"), str(tmp_path / "some.svg")]) == 0
    assert (tmp_path / "some.svg").read_text().startswith("<?xml")
    for kind, start in (("pdf", b"%PDF"), ("jpg", b"\xff\xd8"), ("webp", b"RIFF")):
        assert plot([str(tmp_path / "some.json"), str(tmp_path / f"some.{kind}")]) == 0
        assert (tmp_path / f"some.{kind}").read_bytes().startswith(start)


@pytest.mark.parametrize("value", ["0.9", [1], math.nan, 10**400], ids=lambda value: str(value)[:5])
@pytest.mark.parametrize("name", ["gqa8_s", "median_s", "tokens", "share_of_copy_bandwidth"])
def test_a_picture_of_what_is_no_number_is_one_sentence(name, value, tmp_path: Path, capsys):
    table = json.loads(RECORDED.read_text())
    [place, *_] = [i for i, row in enumerate(table["rows"]) if row["gqa8_s"] is not None]
    table["rows"][place][name] = value
    (tmp_path / "x.json").write_text(json.dumps(table))
    assert plot([str(tmp_path / "x.json"), str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert f"x.json: rows[{place}].{name} must be a number, got {value!r}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "holds no table of decode cases"),
        (b"3", "holds no table of decode cases"),
        (b'{"rows": [1], "dtype": 1, "device": 1, "copy_bytes_per_second": 1}', "holds no table"),
        (b'{"rows": [{}], "dtype": 1, "device": 1, "copy_bytes_per_second": 1}', "holds no table"),
        (b'{"rows": [], "dtype": 1, "device": 1, "copy_bytes_per_second": 1}', "none of the cases that are"),
    ],
)
def test_a_picture_of_something_else_is_one_sentence(content, sentence, tmp_path: Path, capsys):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    assert plot([str(tmp_path / "x.json"), str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("x", "allowed endings: ."),
        ("x.json", "allowed endings: ."),
        ("x.pgf", ", .pdf, .png, .ps"),
        ("no/x.png", "there is no such folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_one_sentence(name, sentence, tmp_path: Path, capsys):
    assert plot([str(RECORDED), str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "plan", lambda *_, **__: pytest.fail("something was timed"))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name, sentence in (
        (str(loop), "it cannot be written (Too many levels of symbolic links)"),
        (str(tmp_path / (300 * "x")), "it cannot be written (File name too long)"),
        (str(tmp_path), "it is a folder"),
        ("", "it names no file"),
        (str(tmp_path / "absent" / "x.json"), "there is no such folder"),
        ("/proc/x.json", "it cannot be written"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["loss", *QUICK, "--json", name])
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert f"--json {name!r}: {sentence}" in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [loop]


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("older")
    assert files.why_not_writable(str(file)) is None
    assert file.read_text() == "older"
    with pytest.raises(UnicodeEncodeError):
        files.write(str(file), "newer \ud800")
    assert file.read_text() == "older"
    files.write(str(file), "newer")
    assert file.read_text() == "newer"
    assert [found.name for found in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(ValueError, match="/dev/full cannot be written: No space left on device"):
        files.write("/dev/full", "x")


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    assert files.why_not_writable(str(link)) is None
    files.write(str(link), "x")
    assert link.is_symlink()
    assert file.read_text() == "x"


def test_json_goes_through_a_pipe():
    """The one behind /dev/stdout has no path of its own."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kernels.bench", "linear"),
            *TINY["linear"],
            *QUICK,
            "--json",
            "/dev/stdout",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"operation": "linear"' in done.stdout
    assert "median ms" in done.stdout


def test_an_interrupted_run_says_so(capsys, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run", interrupt)
    with pytest.raises(SystemExit) as left:
        main(["linear", *TINY["linear"], *QUICK, "--json", str(tmp_path / "x.json")])
    assert left.value.code == 130
    assert capsys.readouterr().err == "python -m kernels.bench: interrupted\n"
    assert not list(tmp_path.iterdir())

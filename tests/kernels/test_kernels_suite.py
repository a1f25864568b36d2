"""The run of all kernel benchmarks, and the table of what is meant to be reached beside what was."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kernels.bench import suite, targets
from kernels.decode import bench_cases

RECORDED = Path(__file__).parents[2] / "kernels" / "results"


def lines(results: targets.Results) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in targets.table(results).splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def decode_row(**changes: Any) -> dict[str, Any]:
    """A row of the decode table, as `kernels.bench decode --table` writes it."""
    case = bench_cases.Case(32, 64, 1, 16, 65_536)
    row = {**asdict(case), "layout": "padded", "cache_bytes": case.n_bytes, "group": "256 MB and more"}
    measured = {"median_s": 1e-4, "share_of_copy_bandwidth": 0.96, "times_one_dense_query": None}
    others = {"gqa8_s": 5.126e-4, "mqa_s": 5e-5, "reference_s": None}
    return row | measured | others | changes


def results() -> targets.Results:
    """Figures made up so that some targets are reached, one is missed, and one is missed in part."""
    generated = {"paper/medium-tpa": 1.0, "paper/medium-mha": 1.7, "paper/medium-mla-as-released": 1.2}
    return {
        "decode": {
            "recompilations": 0,
            "rows": [
                decode_row(),
                decode_row(head_dim=128, share_of_copy_bandwidth=0.95),
                decode_row(batch=1, tokens=4096, group="one row, 4,096 tokens", median_s=5e-6),
                decode_row(group="odd head counts", heads=47, share_of_copy_bandwidth=0.9042),
                decode_row(group="odd head counts", heads=34, share_of_copy_bandwidth=0.942),
                *(
                    decode_row(group="query tokens", queries=4, times_one_dense_query=times)
                    for times in (1.11, 1.15, 1.46)
                ),
            ],
            "others": [{"what": targets.MLA, "batch": 16, "median_s": 2.98e-4}],
        },
        "train": {
            "models": [
                {"preset": "paper/medium-tpa", "tokens_per_second": 144_500.0, "peak_memory_bytes": 2**34}
            ]
        },
        "generate": [
            {"preset": preset, "seconds_per_token": seconds, "share_of_floor": 0.8 / seconds}
            for preset, seconds in generated.items()
        ],
        "cache": [{"padding_bytes": 1, "logical_bytes": 100, "predicted_bytes": 100}],
    }


def test_results_are_judged_by_their_goals():
    found = lines(results())
    assert found["34, 47, 61, 78 heads, rank 2, padded"] == ["≥ 90.0 %", "90.4 % to 94.2 %", "reached"]
    assert found["the same, head_dim 128"] == ["≥ 95.0 %", "95.0 %", "reached"]
    assert found["SDPA with 8 KV heads, rank 1"] == ["≥ 4.80×", "5.13×", "reached"]
    assert found["4 query tokens over one"] == ["≤ 1.15×", "1.11× to 1.46×", "missed, 2 of 3 reach it"]
    assert found["training, medium T6"] == ["≥ 145,000 tokens/s", "144,500 tokens/s", "missed"]
    assert found["– over the paper's public code"] == ["≥ 1.50×", "1.501×", "reached"]
    assert found["generation, medium T6: share of the floor"] == ["≥ 80.0 %", "80.0 %", "reached"]
    assert found["– MHA and MLA of as many parameters"] == ["≥ 1.00×", "1.20× to 1.70×", "reached"]
    assert found["cache bytes, apart from padding: off the formula"] == ["≤ 0.0 %", "0.0 %", "reached"]
    assert found["FlashInfer's MLA, 16 rows of 65,536 tokens, rank 1"] == ["≥ 2.80×", "2.98×", "reached"]


def test_what_was_not_run_is_not_measured_and_a_change_changes_the_verdict():
    changed = results()
    changed["train"]["models"][0]["tokens_per_second"] = 145_000
    changed["decode"]["recompilations"] = 1
    found = lines(changed | {"cache": [{"padding_bytes": 6, "logical_bytes": 100, "predicted_bytes": 100}]})
    assert found["training, medium T6"] == ["≥ 145,000 tokens/s", "145,000 tokens/s", "reached"]
    assert found["kernels compiled again"] == ["≤ 0", "1", "missed"]
    assert found["declared padding of the cache"] == ["≤ 5.0 %", "6.0 %", "missed"]
    without = lines({"cache": []})
    assert {row[1] for row in without.values()} == {"not measured"}


def test_every_target_finds_its_rows_in_the_results_of_this_repository():
    """A target whose names no longer fit the files would read "not measured"."""
    recorded = targets.read(RECORDED)
    for row in recorded["decode"]["rows"]:
        row["reference_s"] = row["median_s"]  # the paper's kernel is timed only where there is a clone of it
    found = lines(recorded)
    assert [what for what, row in found.items() if row[1] == "not measured"] == []


def test_every_result_that_is_judged_comes_from_a_part():
    named = suite.parts(Path("F"), None)
    assert set(targets.SOURCES) <= set(named)
    for name in targets.SOURCES:
        assert named[name][-2:] == ["--json", f"F/{name}.json.new"]
    assert any(word.endswith("test_kernels_gpu_decode.py") for word in named["checks"])
    assert suite.parts(Path("F"), Path("R"))["decode"][-2:] == ["--reference", "R"]


def test_a_part_that_fails_leaves_the_others_and_its_older_result(tmp_path):
    def write(name: str, then: str = "") -> list[str]:
        target, profile = tmp_path / f"{name}.json.new", tmp_path / f"{name}-profile.txt.new"
        wrote = f"open({str(target)!r}, 'w').write('[1]'); open({str(profile)!r}, 'a').write('new')"
        return [sys.executable, "-c", f"{wrote}; print({name!r}); {then}"]

    (tmp_path / "broken.json").write_text("[0]")
    (tmp_path / "slow.json").write_text("[0]")
    for name in ("broken", "good"):
        (tmp_path / f"{name}-profile.txt").write_text("old")
    commands = {
        "broken": write("broken", "raise SystemExit(3)"),
        "slow": write("slow", "import time; time.sleep(60)"),
        "good": write("good"),
    }
    ended = suite.run(commands, tmp_path, limit=5)
    assert ended["broken"].startswith("exit code 3, see ")
    assert ended["slow"].startswith("stopped after 5 s, see ")
    assert ended["good"] == "done"
    kept = {name: (tmp_path / f"{name}.json").read_text() for name in commands}
    assert kept == {"broken": "[0]", "slow": "[0]", "good": "[1]"}
    partial = {file.name: file.read_text() for file in tmp_path.glob("*.partial")}
    assert partial == {"broken.json.partial": "[1]", "slow.json.partial": "[1]"}
    assert (tmp_path / "good.txt").read_text() == "good\n"
    assert (tmp_path / "broken-profile.txt").read_text() == "old"
    assert (tmp_path / "good-profile.txt").read_text() == "new"
    assert not list(tmp_path.glob("*.new"))
    suite.run({"slow": write("slow")}, tmp_path, limit=60)
    assert [file.name for file in tmp_path.glob("*.partial")] == ["broken.json.partial"]


def test_a_part_that_really_runs_here_is_judged(tmp_path):
    """The measured cache, which needs no GPU."""
    commands = {"cache": suite.parts(tmp_path, None)["cache"]}
    assert suite.run(commands, tmp_path, limit=300) == {"cache": "done"}
    found = lines(targets.read(tmp_path))
    assert found["cache bytes, apart from padding: off the formula"] == ["≤ 0.0 %", "0.0 %", "reached"]
    assert found["declared padding of the cache"] == ["≤ 5.0 %", "0.9 %", "reached"]


def test_bad_input_is_one_sentence(tmp_path, capsys):
    for arguments, said in (
        (["F", "--only", "nothing"], "--only nothing: allowed: checks, train, generate, decode"),
        (["F", "--limit", "0"], "--limit must be above 0, got 0"),
        (["F", "--limit", "nan"], "--limit: must be a number of seconds, got 'nan'"),
        (["F", "--reference", str(tmp_path)], "flashtpa_decode_triton.py is not there; name a clone"),
        ([], "the following arguments are required: FOLDER"),
    ):
        with pytest.raises(SystemExit) as ended:
            suite.main(arguments)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not Path("F").exists()
    assert targets.main([str(tmp_path)]) == 2
    assert "has none of decode.json, train.json" in capsys.readouterr().err
    (tmp_path / "decode.json").write_text("{")
    assert targets.main([str(tmp_path)]) == 2
    assert "decode.json is no JSON" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"rows": 3}', '{"rows": [1]}'])
def test_a_result_that_is_something_else_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "decode.json").write_text(content)
    assert targets.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"python -m kernels.bench.targets: {tmp_path}/decode.json holds no results of 'decode', whose rows stand"
        " under 'rows'\n"
    )


def test_zeros_are_not_measured(tmp_path, capsys):
    (tmp_path / "cache.json").write_text('[{"padding_bytes": 0, "logical_bytes": 0, "predicted_bytes": 0}]')
    assert targets.main([str(tmp_path)]) == 0
    assert "declared padding of the cache | ≤ 5.0 % | not measured" in capsys.readouterr().out


@pytest.mark.parametrize("value", [None, "29.1", [1], math.nan, 10**400], ids=lambda value: str(value)[:5])
def test_what_is_no_number_is_not_measured(value):
    """`bench train` on a CPU writes null for the peak memory."""
    named = (
        "training, medium T6",
        "– peak memory, the public code's MHA",
        "kernels compiled again",
        "the same, head_dim 128",
        "one row, 4,096 tokens",
        "SDPA with 8 KV heads, rank 1",
    )
    changed = results()
    assert all(lines(changed)[name][1] != "not measured" for name in named)
    changed["train"]["models"][0]["peak_memory_bytes"] = value
    changed["train"]["models"][0]["tokens_per_second"] = value
    changed["decode"]["recompilations"] = value
    for row in changed["decode"]["rows"]:
        row["share_of_copy_bandwidth"] = row["median_s"] = value
    found = lines(changed)
    assert {name: found[name][1] for name in named} == dict.fromkeys(named, "not measured")
    assert found["generation, medium T6: share of the floor"][2] == "reached"


def test_a_folder_that_cannot_be_made_and_an_interrupt_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (tmp_path / "file").touch()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run", interrupt)
    for folder, code, said in (("file", 2, "file cannot be made: File exists"), ("made", 130, "interrupted")):
        with pytest.raises(SystemExit) as ended:
            suite.main([str(tmp_path / folder)])
        assert ended.value.code == code
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1

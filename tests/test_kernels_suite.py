"""The run of all kernel benchmarks, and the table of what is meant to be reached beside what was."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from kernels.bench import suite, targets

RECORDED = Path(__file__).parent.parent / "kernels" / "results"


def lines(results: targets.Results) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in targets.table(results).splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def recorded() -> targets.Results:
    return targets.read(RECORDED)


def test_the_recorded_results_are_judged_as_the_pages_say():
    found = lines(recorded())
    assert found["34, 47, 61, 78 heads, rank 2, padded"] == [
        "≥ 90.0 %",
        "90.4 % to 94.2 %",
        "reached",
    ]
    assert found["SDPA with 8 KV heads, rank 1"] == ["≥ 4.80×", "5.13×", "reached"]
    assert found["4 query tokens over one"] == ["≤ 1.15×", "1.11× to 1.46×", "missed, 2 of 3 reach it"]
    assert found["training, medium T6"] == ["≥ 145,000 tokens/s", "149,476.3 tokens/s", "reached"]
    assert found["– over the paper's public code"] == ["≥ 1.50×", "1.55×", "reached"]
    assert found["generation, medium T6: share of the floor"] == ["≥ 80.0 %", "82.1 %", "reached"]
    assert found["cache bytes, apart from padding: off the formula"] == ["≤ 0.0 %", "0.0 %", "reached"]
    assert found["– MHA and MLA of as many parameters"][2] == "reached"
    assert found["FlashInfer's MLA, 16 rows of 65,536 tokens, rank 1"] == ["≥ 2.80×", "2.98×", "reached"]


def test_what_was_not_run_is_not_measured_and_a_change_changes_the_verdict():
    results = recorded()
    results["train"]["models"][0]["tokens_per_second"] = 144_999
    results["decode"]["recompilations"] = 1
    found = lines(results | {"cache": [{"padding_bytes": 6, "logical_bytes": 100, "predicted_bytes": 100}]})
    assert found["training, medium T6"] == ["≥ 145,000 tokens/s", "144,999 tokens/s", "missed"]
    assert found["kernels compiled again"] == ["≤ 0", "1", "missed"]
    assert found["declared padding of the cache"] == ["≤ 5.0 %", "6.0 %", "missed"]
    without = lines({"cache": []})
    assert {row[1] for row in without.values()} == {"not measured"}


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
    results = recorded()
    results["train"]["models"][0]["peak_memory_bytes"] = value
    results["train"]["models"][0]["tokens_per_second"] = value
    results["decode"]["recompilations"] = value
    for row in results["decode"]["rows"]:
        row["share_of_copy_bandwidth"] = row["median_s"] = value
    found = lines(results)
    for name in (
        "training, medium T6",
        "– peak memory, the public code's MHA",
        "kernels compiled again",
        "the same, head_dim 128",
        "one row, 4,096 tokens",
        "SDPA with 8 KV heads, rank 1",
    ):
        assert found[name][1] == "not measured"
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


def test_the_page_about_decoding_says_what_its_table_holds():
    page = (RECORDED.parents[1] / "docs" / "flashtpa-decode.md").read_text()
    rows = recorded()["decode"]["rows"]
    groups = {
        group: [row for row in rows if row["group"] == group] for group in {row["group"] for row in rows}
    }
    to_one = [row["times_one_dense_query"] for row in groups["ragged and paged"]]
    furthest = max(abs(ratio - 1) for ratio in to_one)
    verdict = "reached" if furthest <= 0.05 else "missed"
    assert f"| within {100 * furthest:.1f} % | {verdict} |" in page
    large = groups["256 MB and more"]
    to_mqa = {
        rank: [row["median_s"] / row["mqa_s"] for row in large if row["rank"] == rank] for rank in (1, 2, 4)
    }
    said = [f"{min(ratios):.1f} to {max(ratios):.1f}" for ratios in to_mqa.values()]
    low, high = said[0].split(" to ")
    assert (
        f"takes {low} to\n{high} times its time at rank 1, {said[1]} at rank 2, {said[2]} at rank 4" in page
    )
    several = {
        row["queries"]: row["times_one_dense_query"] for row in groups["query tokens"] if row["heads"] == 32
    }
    assert f"8 and 16 queries cost {several[8]:.2f}× and {several[16]:.2f}× one" in page
    [whole] = [row for row in large if (row["heads"], row["head_dim"], row["rank"]) == (32, 64, 1)]
    assert f"403 MB take {1e6 * whole['median_s']:.0f} µs" in page

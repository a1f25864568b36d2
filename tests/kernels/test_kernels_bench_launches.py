"""Every launch of the decode kernel beside the one that is taken."""

from dataclasses import asdict

import torch
from interpreter import needs_interpreter

from kernels.decode import bench_cases, bench_launches
from kernels.decode.launch import Launch, choose_launch


@needs_interpreter
def test_launches_of_a_case_are_timed_beside_the_one_that_is_taken(monkeypatch):
    """By Triton's interpreter in place of a graph: the fastest is found, one that fails says why."""
    monkeypatch.setattr(bench_cases, "ROTATED_BYTES", 0)
    monkeypatch.setattr(bench_cases, "FEWEST_CALLS", 1)
    monkeypatch.setattr(bench_launches, "FEWEST_BYTES", 150_000)
    used: list[Launch] = []
    launched = bench_launches._launched
    monkeypatch.setattr(
        bench_launches, "_launched", lambda pick: launched(lambda work: used.append(pick(work)) or used[-1])
    )

    def graph_times(calls: list) -> list[float]:
        assert torch.isfinite(calls[0]()).all()
        if used[-1].stages == 4:
            raise RuntimeError("out of resources\nand more")
        return [used[-1].tile + used[-1].programs + used[-1].warps + used[-1].stages / 10]

    monkeypatch.setattr(bench_launches, "graph_times", graph_times)
    given = [
        bench_cases.Case(8, 64, 1, 2, 64),
        bench_cases.Case(24, 32, 2, 2, 64, queries=2, shared_b=True),
    ]
    saved: list[int] = []
    result = bench_launches.run(
        torch.device("cpu"), chosen=given, save=lambda result: saved.append(len(result["rows"]))
    )
    assert saved == [1, 2]
    assert result["complete"]
    for case, row in zip(given, result["rows"], strict=True):
        taken = choose_launch(bench_launches._work(case, torch.device("cpu")))
        assert asdict(taken).items() <= row["launches"][0].items()
        failed = [launch for launch in row["launches"] if launch["stages"] == 4]
        assert failed
        assert {launch.get("why_not") for launch in failed} == {"RuntimeError: out of resources"}
        timed = [launch for launch in row["launches"] if launch["stages"] < 4]
        assert row["best"] == min(timed, key=lambda launch: launch["median_s"])
        assert len({tuple(launch.values())[:6] for launch in row["launches"]}) == len(row["launches"]) > 3
    lines = bench_launches.table(result).splitlines()
    assert len(lines) == 4 + len(given)
    assert lines[4].startswith("| 8, 64, 1 | 1 | padded | ")
    assert lines[-1].count("|") == lines[2].count("|")


def test_cases_of_launches_are_of_one_size_and_none_is_twice():
    listed = bench_launches.cases()
    assert len(set(listed)) == len(listed)
    assert all(2.5e8 <= case.n_bytes <= 2.7e8 for case in listed)

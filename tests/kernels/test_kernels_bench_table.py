"""The decode kernel over a table of cases, beside the paper's kernel and other baselines."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from interpreter import needs_interpreter

from kernels.bench import operations, others
from kernels.bench.__main__ import main
from kernels.bench.others import REFERENCE_FILES, Reference, TuningLimit
from kernels.decode import bench_baselines, bench_cases, bench_table, decode

TINY = ["--batch", "1", "--context", "33", "--heads", "3", "--head-dim", "8", "--rank", "2"]
QUICK = ["--seconds", "0", "--device", "cpu"]


def test_the_decode_table_covers_its_groups_and_renders():
    listed = bench_cases.cases()
    assert len(set(listed)) == len(listed)
    assert {(c.heads, c.head_dim, c.rank) for c in listed} >= set(
        product((16, 32, 48, 64), (64, 128), (1, 2, 4))
    )
    assert all(c.n_bytes >= 2.56e8 for c in listed if c.group == "256 MB and more")
    assert all(1.6e7 <= c.n_bytes < 2.56e8 for c in listed if c.group == "16 to 256 MB")
    row = {
        **asdict(listed[0]),
        "cache_bytes": listed[0].n_bytes,
        "median_s": 1e-4,
        "share_of_copy_bandwidth": 0.9,
        "plain_s": 1e-3,
        "gqa8_s": None,
        "mqa_s": 5e-5,
        "reference_s": 1.5e-4,
        "times_one_dense_query": None,
    }
    result = {
        "device": "D",
        "torch": "2",
        "triton": "3",
        "dtype": "bfloat16",
        "git_commit": None,
        "date": "today",
    }
    other = {"what": "MLA", "batch": 16, "tokens": 4096, "cache_bytes": 75e6}
    others = [
        other | {"median_s": 5e-5, "share_of_copy_bandwidth": 0.5},
        other | {"why_not": "RuntimeError: no nvcc"},
    ]
    result |= {"copy_bytes_per_second": 3e12, "recompilations": 0, "rows": [row], "others": others}
    text = bench_table.table(result)
    assert (
        "| 16, 64, 1 | 16 | 65,536 | 1 | padded | 336 | 100.0 | 90.0% | 10.00× |  | 0.50× | 1.50× |  |"
        in text
    )
    assert "copy 3000 GB/s; 0 recompilations" in text
    assert "| MLA | 16 | 4,096 | 75 | 50.0 | 50.0% |" in text
    assert "| MLA | 16 | 4,096 | | RuntimeError: no nvcc | |" in text


def test_lengths_of_the_decode_table_grow_by_one_within_the_capacity():
    for case in bench_cases.cases():
        lengths, capacity = bench_cases.lengths_of_calls(case, 4, torch.device("cpu"))
        assert all((later - earlier <= 1).all() for earlier, later in pairwise(lengths))
        assert capacity >= lengths[-1].max()
        assert lengths[0].min() >= case.queries


@needs_interpreter
@pytest.mark.parametrize(
    "changes", [{"further": 4}, {"shared_b": True}, {"pages": 64}, {"queries": 3}], ids=str
)
def test_each_kind_of_call_of_the_decode_table_runs(changes, monkeypatch):
    """By Triton's interpreter in place of a graph; the cache's bytes are those of its tensors."""
    monkeypatch.setattr(bench_cases, "ROTATED_BYTES", 0)
    monkeypatch.setattr(bench_cases, "FEWEST_CALLS", 4)
    case = bench_cases.Case(8, 16, 2, 2, 128, **changes)
    results = [call().sum().item() for call in bench_cases.tpa_calls(case, torch.device("cpu"))]
    assert len(results) == 4
    assert all(math.isfinite(result) for result in results)
    tensors = {x.data_ptr(): x for x in bench_cases.factors(case, torch.device("cpu"), 2, 128)}
    assert sum(x.nbytes for x in tensors.values()) == case.n_bytes
    said = {"further": "padded order 3 (4 × 4)", "shared_b": "padded shared b", "pages": "padded paged"}
    assert case.how == said.get(next(iter(changes)), "padded")


def test_baselines_are_measured_once_for_all_that_they_are_the_same_for(monkeypatch):
    """Each has seconds of its own here, so that a case which gets another's figure is seen."""
    measured: list[tuple] = []

    def measure(name: str):
        def seconds(case: bench_cases.Case, device: torch.device, **options: object) -> float:
            measured.append((name, case, tuple(options.values())))
            return float(len(measured))

        return seconds

    for name in ("_plain_seconds", "_sdpa_seconds", "_reference_seconds"):
        monkeypatch.setattr(bench_baselines, name, measure(name))
    tuning = SimpleNamespace(left_out=0)
    baselines = bench_baselines.Baselines(torch.device("cpu"), SimpleNamespace(tuning=tuning))

    def seconds_of(case: bench_cases.Case) -> dict[str, float | None]:
        return {name: value for name, value in baselines.of(case).items() if name.endswith("_s")}

    case = bench_cases.Case(32, 64, 1, 16, 1024)
    first = seconds_of(case)
    assert None not in first.values()
    assert len(measured) == len(set(first.values())) == 4
    for same in ({"layout": "record"}, {"lengths": "ragged"}, {"pages": 64}, {"group": "odd head counts"}):
        assert seconds_of(replace(case, **same)) == first
    assert len(measured) == 4
    # SDPA knows no rank, the plain twin and the paper's kernel do.
    other_rank = seconds_of(replace(case, rank=2))
    assert {name for name in first if first[name] != other_rank[name]} == {"plain_s", "reference_s"}
    for change in ({"heads": 16}, {"head_dim": 128}, {"batch": 1}, {"tokens": 2048}):
        assert not set(seconds_of(replace(case, **change)).values()) & set(first.values())
    assert set(seconds_of(replace(case, queries=2)).values()) == {None}
    assert seconds_of(replace(case, heads=47))["gqa8_s"] is None
    tuning.left_out = 3
    assert baselines.of(case)["reference_settings_left_out"] == 0
    assert baselines.of(replace(case, tokens=9))["reference_settings_left_out"] == 3


def test_whether_the_plain_twin_runs_does_not_depend_on_what_ran_before(monkeypatch):
    for name in ("_plain_seconds", "_sdpa_seconds"):
        monkeypatch.setattr(bench_baselines, name, lambda *_, **__: 1.0)
    for groups in (("256 MB and more", "by length"), ("by length", "256 MB and more")):
        baselines = bench_baselines.Baselines(torch.device("cpu"), None)
        found = {
            group: baselines.of(bench_cases.Case(32, 64, 1, 16, 1024, group=group))["plain_s"]
            for group in groups
        }
        assert found == {"256 MB and more": 1.0, "by length": None}


def test_each_baseline_runs(monkeypatch):
    """On the clock of a CPU in place of a graph."""
    monkeypatch.setattr(bench_baselines, "ROTATED_BYTES", 0)
    monkeypatch.setattr(bench_baselines, "graph_times", lambda calls: [calls[0]().float().sum().item()])
    monkeypatch.setattr(bench_baselines, "event_seconds", lambda run: run().float().sum().item())
    found = bench_baselines.Baselines(torch.device("cpu"), None).of(bench_cases.Case(8, 16, 2, 2, 64))
    assert {name for name, value in found.items() if value is not None} == {"plain_s", "gqa8_s", "mqa_s"}


@needs_interpreter
def test_a_stopped_table_has_given_its_finished_rows_away(monkeypatch):
    """By Triton's interpreter in place of a graph, which the third case does not come to."""
    monkeypatch.setattr(bench_cases, "ROTATED_BYTES", 0)
    monkeypatch.setattr(bench_cases, "FEWEST_CALLS", 1)
    monkeypatch.setattr(bench_table, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench_table, "_recompilations", lambda device: 0)
    times = iter([[2e-3], [3e-3], [4e-3]])
    monkeypatch.setattr(bench_table, "graph_times", lambda calls: calls[0]() is not None and next(times))
    monkeypatch.setattr(bench_baselines.Baselines, "of", lambda *_: dict.fromkeys(bench_baselines.NAMES))
    one = bench_cases.Case(8, 16, 1, 1, 64)
    saved: list[str] = []
    given = [one, replace(one, queries=2)]
    result = bench_table.run(
        torch.device("cpu"), chosen=given, save=lambda result: saved.append(json.dumps(result))
    )
    assert [len(json.loads(text)["rows"]) for text in saved] == [1, 2]
    assert not json.loads(saved[-1])["complete"]
    assert result == json.loads(saved[-1]) | {"complete": True}
    assert [row["times_one_dense_query"] for row in result["rows"]] == [None, 1.5]
    assert "| 8, 16, 1 | 1 | 64 | 2 | padded |" in bench_table.table(json.loads(saved[-1]))

    def stop(calls: list) -> list[float]:
        raise KeyboardInterrupt

    saved.clear()
    times = iter([[2e-3]])
    monkeypatch.setattr(bench_table, "graph_times", lambda calls: stop(calls) if saved else next(times))
    with pytest.raises(KeyboardInterrupt):
        bench_table.run(
            torch.device("cpu"), chosen=given, save=lambda result: saved.append(json.dumps(result))
        )
    [kept] = saved
    assert [row["median_s"] for row in json.loads(kept)["rows"]] == [2e-3]


STAND_IN = """
import torch
from xopes.utils import generate_configs
configs = generate_configs({"num_warps": [2, 4], "BLOCK": [128]})
calls = []

def tpa_decode_parallel_bn_triton(aq, ak, av, bq, bk, bv):
    calls.append((aq, ak, av, bq, bk, bv))
    if ak.dim() == 3:
        ak, av, bk, bv = (x.unsqueeze(-1) for x in (ak, av, bk, bv))
    q = torch.einsum("bthr,btrd->bthd", aq, bq) / aq.shape[-1]
    k = torch.einsum("bmhs,bmds->bmhd", ak, bk) / ak.shape[-1]
    v = torch.einsum("bmhs,bmds->bmhd", av, bv) / ak.shape[-1]
    p = (torch.einsum("bthd,bmhd->bthm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bthm,bmhd->bthd", p, v)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder laid out as the paper's public code, with functions of the same arguments."""
    for name in REFERENCE_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(STAND_IN)
    return tmp_path


@pytest.mark.parametrize("rank", [1, 2])
def test_the_reference_is_called_in_its_own_layout(clone: Path, rank: int):
    """What it returns is what our kernel makes of the same factors."""
    pytest.importorskip("triton")
    paper = Reference(clone)
    got = paper.call(2, 9, 3, 8, rank, torch.device("cpu"))()
    [(aq, ak, av, bq, bk, bv)] = (paper._single if rank == 1 else paper._several).calls
    q = torch.einsum("bthr,btrd->bthd", aq, bq) / aq.shape[-1]
    ours = [x.unsqueeze(2) if rank == 1 else x.transpose(-1, -2) for x in (ak, bk, av, bv)]
    expected = decode(q.float(), *(x.float() for x in ours), scale=8**-0.5, backend="plain")
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)


def test_a_reference_that_is_not_there_or_cannot_run_is_one_sentence(clone: Path, capsys, tmp_path_factory):
    for folder, sentence in (
        (tmp_path_factory.mktemp("empty"), "flashtpa_decode_triton.py is not there; name a clone"),
        (clone, "the paper's kernel is timed on a CUDA device, in bfloat16, on one query"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["decode", *TINY, *QUICK, "--reference", str(folder)])
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1


def test_the_autotuning_of_the_reference_is_bounded(monkeypatch):
    """Triton's own autotuner, with settings that take 4 s each on a clock of their own."""
    triton = pytest.importorskip("triton")
    clock = [0.0]
    monkeypatch.setattr(others.time, "monotonic", lambda: clock[0])
    tried: list[int] = []
    broken: set[int] = set()

    def bench(*args: object, config: "triton.Config", **options: object) -> list[float]:
        block = config.kwargs["BLOCK"]
        tried.append(block)
        clock[0] += 4
        return [math.inf if block in broken else 10.0 - block] * 3

    def kernel(N, BLOCK): ...

    tuner = triton.autotune([triton.Config({"BLOCK": block}) for block in range(6)], key=["N"])(
        triton.jit(kernel)
    )
    tuner._bench = bench
    tuner.fn = SimpleNamespace(run=lambda *args, **options: options["BLOCK"])
    theirs = ModuleType("theirs")
    theirs.kernel = tuner
    limit = TuningLimit([theirs], 10)

    def size(N: int) -> int:
        """The setting that is taken."""
        tried.clear()
        limit.begin()
        return tuner.run(N=N)

    # Three settings begin within 10 s.
    assert size(1) == 2
    assert tried == [0, 1, 2]
    assert limit.left_out == 3
    # The fastest so far comes first, and the limit is of each size.
    assert size(2) == 2
    assert tried == [2, 0, 1]
    # One that runs is found, however long it takes.
    broken.update({2, 0, 1})
    assert size(3) == 3
    assert tried == [2, 0, 1, 3]
    limit.limit = 100
    assert size(4) == 5
    assert limit.left_out == 0
    assert (
        f"gets {others.REFERENCE_TUNING_SECONDS} s for each size"
        in (operations.find()["decode"].folders["reference"])
    )

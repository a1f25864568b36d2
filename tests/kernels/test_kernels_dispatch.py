"""Choosing a backend, saying so once, and doing it inside a compiled graph."""

import logging

import pytest
import torch

from kernels.attention import attention
from kernels.decode import decode
from kernels.dispatch import choose
from kernels.loss import linear_cross_entropy
from kernels.tolerances import TOLERANCES, assert_close


def fast(x: torch.Tensor) -> torch.Tensor:
    return x


def slow(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


CANDIDATES = {"fast": fast, "slow": slow}


def test_auto_takes_the_first_that_can_run():
    assert choose("op", "auto", CANDIDATES) is fast
    assert choose("op", "auto", CANDIDATES, {"fast": "needs a GPU"}) is slow


def test_auto_says_each_backend_once(caplog, monkeypatch):
    monkeypatch.setattr("kernels.dispatch._said", set())
    caplog.set_level(logging.DEBUG, logger="kernels")
    for cannot in ({}, {}, {"fast": "needs a GPU"}, {}):
        choose("first", "auto", CANDIDATES, cannot)
        choose("second", "auto", CANDIDATES, cannot)
    choose("first", "slow", CANDIDATES)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        ("INFO", "backend auto takes fast (first)"),
        ("DEBUG", "backend auto takes fast (second)"),
        ("INFO", "backend auto takes slow (first)"),
        ("DEBUG", "backend auto takes slow (second)"),
    ]


def test_a_named_backend_is_taken_or_refused():
    assert choose("op", "slow", CANDIDATES) is slow
    with pytest.raises(ValueError, match="op: unknown backend 'triton'; allowed: auto, fast, slow"):
        choose("op", "triton", CANDIDATES)
    with pytest.raises(ValueError, match="op: backend 'fast' cannot run here: needs a GPU"):
        choose("op", "fast", CANDIDATES, {"fast": "needs a GPU"})
    with pytest.raises(ValueError, match="fast: no GPU; slow: no CPU"):
        choose("op", "auto", CANDIDATES, {"fast": "no GPU", "slow": "no CPU"})


def test_operations_compile_into_one_graph():
    q, a, b = torch.randn(1, 1, 3, 8), torch.randn(1, 5, 2, 3), torch.randn(1, 5, 2, 8)

    def step(q, a, b):
        o = decode(q, a, b, a, b, scale=0.3)
        return linear_cross_entropy(o.flatten(0, 1).flatten(1), b.view(10, 8).repeat(1, 3), torch.tensor([4]))

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, a, b), step(q, a, b))


@pytest.mark.parametrize("backend", ["auto", "plain", "sdpa"])
def test_operations_run_on_meta_tensors(backend):
    q, a, b = (torch.empty(1, *shape, device="meta") for shape in ((1, 3, 8), (5, 2, 3), (5, 2, 8)))
    assert decode(q, a, b, a, b, scale=0.3, backend=backend).shape == (1, 1, 3, 8)
    assert attention(q, q, q, scale=0.3, backend=backend).shape == (1, 1, 3, 8)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_comparison_notices_errors_and_nan(dtype):
    truth = torch.randn(50, dtype=torch.float64)
    tolerance = TOLERANCES[dtype]
    assert_close(truth + 0.9 * tolerance.atol * truth.abs().max(), truth, dtype)
    off = truth.clone()
    off[7] += 3 * (tolerance.rtol + tolerance.atol) * truth.abs().max()
    with pytest.raises(AssertionError, match="flat index 7"):
        assert_close(off, truth, dtype)
    off[7] = torch.nan
    with pytest.raises(AssertionError, match="flat index 7"):
        assert_close(off, truth, dtype)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(truth[1:], truth, dtype)

"""Kernels of others that are timed beside ours where they are at hand; none of their code is in this repository.

Shapes: B batch, M cached tokens, H heads, G KV heads, D head dimension, R rank of K and V; P pages, N tokens of a page.
"""

import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Call = Callable[[], torch.Tensor]

# Where the paper's public code (repository tensorgi/TPA) keeps its decode kernels: one file takes a single rank of K
# and V, the other any.
REFERENCE_FILES = ("decode/flashtpa_decode_triton.py", "decode/flashtpa_decode_triton_multi_kvrank.py")
# Rank of Q: the public kernel's own example. Below 16 its matrix products do not compile on every version of Triton.
REFERENCE_RANK_Q = 16
# Its autotuner compiles and times its settings again for every size: seconds that one size may take.
REFERENCE_TUNING_SECONDS = 10

FLASHINFER_IS_INSTALLED = find_spec("flashinfer") is not None
WORKSPACE_BYTES = 2**27
PAGE = 64
# The only widths that FlashInfer's MLA kernel is built for: latent and turned key.
MLA_WIDTHS = (512, 64)


class Reference:
    """The paper's public decode kernel from a folder that the user names.

    Raises ValueError, in one sentence, for a folder without it.
    """

    def __init__(self, folder: Path) -> None:
        check_reference(folder)
        with _xopes():
            self._single, self._several = (_load(folder / name) for name in REFERENCE_FILES)
        self.tuning = TuningLimit([self._single, self._several], REFERENCE_TUNING_SECONDS)

    def call(self, B: int, M: int, H: int, D: int, R: int, device: torch.device) -> Call:
        """One query token over random factors in the layout that the public kernel takes, bf16.

        The kernel is tuned when it first runs at a size, for as long as `tuning` lets it.
        """
        self.tuning.begin()

        def factor(*shape: int) -> torch.Tensor:
            return torch.randn(B, *shape, device=device, dtype=torch.bfloat16)

        aq, bq = factor(1, H, REFERENCE_RANK_Q), factor(1, REFERENCE_RANK_Q, D)
        if R == 1:
            run, a, b = self._single.tpa_decode_parallel_bn_triton, (M, H), (M, D)
        else:
            run, a, b = self._several.tpa_decode_parallel_bn_triton, (M, H, R), (M, D, R)
        ak, av, bk, bv = factor(*a), factor(*a), factor(*b), factor(*b)
        return lambda: run(aq, ak, av, bq, bk, bv)


class TuningLimit:
    """Ends the autotuning of Triton kernels after some seconds of it: the fastest setting by then is taken.

    Every kernel times at least one setting that runs, and first the one that was the fastest at the size before.
    """

    def __init__(self, modules: Sequence[ModuleType], seconds: float) -> None:
        from triton.runtime import Autotuner

        self.limit = seconds
        self.tuners = [
            value for module in modules for value in vars(module).values() if isinstance(value, Autotuner)
        ]
        for tuner in self.tuners:
            # Triton has no option for this; every setting goes through this method, and inf is one that cannot run.
            vars(tuner)["_bench"] = partial(self._bench, tuner, tuner._bench)
        self.begin()

    def begin(self) -> None:
        """From here on it is about another size."""
        self.spent = 0.0
        self.left_out = 0
        self._timed: set[int] = set()
        for tuner in self.tuners:
            best = getattr(tuner, "best_config", None)
            tuner.configs.sort(key=lambda config, best=best: config is not best)

    def _bench(self, tuner: object, bench: Callable[..., Any], *args: Any, **options: Any) -> list[float]:
        if self.spent >= self.limit and id(tuner) in self._timed:
            self.left_out += 1
            return [float("inf")] * 3
        began = time.monotonic()
        times = bench(*args, **options)
        self.spent += time.monotonic() - began
        if times[0] < float("inf"):
            self._timed.add(id(tuner))
        return times


def check_reference(folder: Path) -> None:
    """Raises ValueError, in one sentence, for a folder without the paper's public decode kernel."""
    missing = [name for name in REFERENCE_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"--reference {folder}: {missing[0]} is not there; name a clone of the paper's public code"
        )


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"--reference: {file} cannot be imported ({error})") from error
    return module


@contextmanager
def _xopes() -> Iterator[None]:
    """While the public kernel is imported: what it takes of the package xopes, lists of settings to its autotuner."""
    if find_spec("xopes") is not None:
        yield
        return
    import triton

    def generate_configs(choices: dict[str, list[int]]) -> list[triton.Config]:
        meta = {name: values for name, values in choices.items() if name not in ("num_warps", "num_stages")}
        return [
            triton.Config(dict(zip(meta, values, strict=True)), num_warps=warps, num_stages=stages)
            for warps in choices.get("num_warps", [4])
            for stages in choices.get("num_stages", [2])
            for values in itertools.product(*meta.values())
        ]

    module = ModuleType("xopes.utils")
    module.generate_configs = generate_configs  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {"xopes": ModuleType("xopes"), "xopes.utils": module}
    try:
        yield
    finally:
        del sys.modules["xopes"], sys.modules["xopes.utils"]


def flashinfer_mla(B: int, M: int, H: int, device: torch.device) -> Call:
    """FlashInfer's MLA decoding of one query token, absorbed, bf16, over pages of 64 tokens; M a multiple of that."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper  # pyright: ignore[reportMissingImports]

    latent, turned = MLA_WIDTHS
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    rows = torch.arange(B + 1, dtype=torch.int32, device=device)
    n_pages = B * (M // PAGE)
    wrapper.plan(
        rows,
        rows * (M // PAGE),
        torch.randperm(n_pages, device=device).int(),
        torch.full((B,), M, dtype=torch.int32, device=device),
        H,
        latent,
        turned,
        PAGE,
        False,
        (latent + turned) ** -0.5,
        torch.bfloat16,
        torch.bfloat16,
    )
    q_latent, q_turned = (
        torch.randn(B, H, width, device=device, dtype=torch.bfloat16) for width in MLA_WIDTHS
    )
    c, k = (torch.randn(n_pages, PAGE, width, device=device, dtype=torch.bfloat16) for width in MLA_WIDTHS)
    return lambda: wrapper.run(q_latent, q_turned, c, k)


def flashinfer_grouped(B: int, M: int, H: int, G: int, D: int, device: torch.device) -> Call:
    """FlashInfer's decoding of one query token with G KV heads, bf16, over pages of 64 tokens."""
    from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper  # pyright: ignore[reportMissingImports]

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    n_pages = B * (M // PAGE)
    wrapper.plan(
        torch.arange(B + 1, dtype=torch.int32, device=device) * (M // PAGE),
        torch.randperm(n_pages, device=device).int(),
        torch.full((B,), PAGE, dtype=torch.int32, device=device),
        H,
        G,
        D,
        PAGE,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q = torch.randn(B, H, D, device=device, dtype=torch.bfloat16)
    pages = torch.randn(n_pages, 2, PAGE, G, D, device=device, dtype=torch.bfloat16)
    return lambda: wrapper.run(q, pages)

"""The decode kernel compiled for an H100 by the Triton that is installed; no GPU is needed for that.

A loop whose loads are not pipelined gives the same results, so that no test of these would notice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.place import TRITON_IS_INSTALLED

COMPILE = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import kernels.decode.triton as decode

class Recorder:
    def __getitem__(self, grid):
        return lambda *args, **named: setattr(self, "call", (args, named))

attend, recorder = decode._attend, Recorder()
decode._attend, decode.merge = recorder, lambda *arguments: None
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
for H, D, R, page in json.loads(sys.argv[1]):
    half = {"dtype": torch.bfloat16}
    factors = [torch.empty(16, page or 4096, R, width, **half) for width in (H, D, H, D)]
    pages = torch.zeros(16, 4, dtype=torch.int32) if page else None
    new = [torch.empty(16, 1, R, width, **half) for width in (H, D, H, D)]
    lengths = torch.full((16,), 200)
    decode.decode(torch.empty(16, 1, H, D, **half), *factors, 1.0, lengths, pages, new)
    args, named = recorder.call
    options = {"num_warps": named.pop("num_warps")}
    named.pop("launch_pdl", None)
    named = dict(zip(attend.arg_names, args)) | named
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(attend.arg_names):
        value = named[name]
        if attend.params[i].is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    made = compile(ASTSource(attend, signature, constants, attributes), GPUTarget("cuda", 90, 32), options)
    print(made.asm["ttgir"].count("async_copy_global"), made.metadata.shared)
"""
# Heads, head_dim, rank, page: tokens and heads on the wide side, deep pipelines, the most that fits, pages.
CASES = [
    (32, 64, 1, 0),
    (48, 64, 2, 0),
    (78, 64, 2, 0),
    (78, 64, 3, 0),
    (64, 128, 3, 0),
    (16, 128, 4, 0),
    (48, 64, 2, 64),
]


@pytest.mark.skipif(not TRITON_IS_INSTALLED, reason="the package triton is not installed")
def test_loads_are_pipelined_and_fit_the_chip(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", COMPILE, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, line in zip(CASES, done.stdout.splitlines(), strict=True):
        copies, shared = map(int, line.split())
        # Of each of the four factors and ranks, in front of the loop and in it.
        assert copies >= 2 * 4 * min(case[2], 2), case
        assert shared <= 227 * 1024, case

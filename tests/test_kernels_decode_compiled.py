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
from kernels.decode import grouped_triton, triton as factors_triton

class Recorder:
    def __getitem__(self, grid):
        return lambda *args, **named: setattr(self, "call", (args, named))

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}

def compiled(module, *given):
    attend, recorder = module._attend, Recorder()
    module._attend, module.merge = recorder, lambda *arguments: None
    module.decode(*given)
    module._attend = attend
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
    tensor_cores = made.asm["ptx"].count("wgmma.mma_async")
    print(made.asm["ttgir"].count("async_copy_global"), made.metadata.shared, tensor_cores)

factors_triton.multiprocessors = grouped_triton.multiprocessors = lambda device: 132
half, lengths = {"dtype": torch.bfloat16}, torch.full((16,), 200)
of_factors, of_heads = json.loads(sys.argv[1])
for H, D, R, page in of_factors:
    factors = [torch.empty(16, page or 4096, R, width, **half) for width in (H, D, H, D)]
    pages = torch.zeros(16, 4, dtype=torch.int32) if page else None
    new = [torch.empty(16, 1, R, width, **half) for width in (H, D, H, D)]
    compiled(factors_triton, torch.empty(16, 1, H, D, **half), *factors, 1.0, lengths, pages, new)
for H, G, D, E, T in of_heads:
    k = torch.empty(16, 4096, G, D, **half)
    v = k[..., :E] if G == 1 and E < D else torch.empty(16, 4096, G, E, **half)
    compiled(grouped_triton, torch.empty(16, T, H, D, **half), k, v, 1.0, lengths)
"""
# Heads, head_dim, rank, page: tokens and heads on the wide side, deep pipelines, the most that fits, pages.
OF_FACTORS = [
    (32, 64, 1, 0),
    (48, 64, 2, 0),
    (78, 64, 2, 0),
    (78, 64, 3, 0),
    (64, 128, 3, 0),
    (16, 128, 4, 0),
    (48, 64, 2, 64),
]
# Heads, KV heads, widths of keys and values, query tokens: MLA's latents (values in the keys), GQA, MHA.
OF_HEADS = [
    (23, 1, 288, 256, 1),
    (19, 1, 444, 412, 1),
    (32, 1, 576, 512, 4),
    (24, 3, 74, 74, 1),
    (32, 8, 128, 128, 4),
    (16, 16, 64, 64, 1),
    (32, 1, 512, 256, 1),
    (32, 2, 576, 512, 1),
    (32, 2, 400, 400, 1),
    (32, 2, 250, 250, 1),
]


@pytest.mark.skipif(not TRITON_IS_INSTALLED, reason="the package triton is not installed")
def test_loads_are_pipelined_and_fit_the_chip(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", COMPILE, json.dumps([OF_FACTORS, OF_HEADS])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # Of each factor and rank, or of keys, of values that are not in them and of a rest of either, in front of the loop
    # and in it.
    least = [2 * 4 * min(R, 2) for _, _, R, _ in OF_FACTORS] + [4, 4, 4, 6] + 6 * [4]
    lines = done.stdout.splitlines()
    for case, at_least, line in zip([*OF_FACTORS, *OF_HEADS], least, lines, strict=True):
        copies, shared, tensor_cores = map(int, line.split())
        assert copies >= at_least, case
        assert shared <= 227 * 1024, case
        assert tensor_cores or case in OF_FACTORS, case

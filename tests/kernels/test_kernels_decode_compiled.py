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
import json, math, re, subprocess, sys, tempfile, torch, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kernels.decode import grouped_triton, triton as factors_triton
from kernels.decode.rows import Rows

class Recorder:
    def __getitem__(self, grid):
        self.grid = grid
        return lambda *args, **named: setattr(self, "call", (args, named))

def room(made, warps):
    # Programs that a multiprocessor has room for: 64 K registers, 228 KiB, of which each takes one more.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\\d+)", usage)[1])
    return min(65536 // (math.ceil(registers / 8) * 8 * warps * 32), 228 * 1024 // (made.metadata.shared + 1024))

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}

def compiled(module, *given):
    attend, recorder = module._attend, Recorder()
    module._attend, module.merge = recorder, lambda *arguments: None
    module.decode(*given)
    module._attend = attend
    args, named = recorder.call
    options = {"num_warps": named.pop("num_warps")}
    overlaps = named.pop("launch_pdl", False)
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
    programs = math.ceil(math.prod(recorder.grid) / 132)
    print(made.asm["ttgir"].count("async_copy_global"), made.metadata.shared, tensor_cores, end=" ")
    print(programs, room(made, options["num_warps"]), int(overlaps))

factors_triton.multiprocessors = grouped_triton.multiprocessors = lambda device: 132
half, lengths = {"dtype": torch.bfloat16}, torch.full((16,), 200)
of_factors, of_heads = json.loads(sys.argv[1])
for H, D, R, page, T, how in of_factors:
    P = D // 8 if how == "order 3" else D
    factors = [torch.empty(16, page or 4096, R, width, **half) for width in (H, P, H, P)]
    pages = torch.zeros(16, 4, dtype=torch.int32) if page else None
    new = [torch.empty(16, T, R, width, **half) for width in (H, P, H, P)]
    rows = Rows()
    if how == "turned":
        factors[3], new[3] = factors[1], None
        rows = Rows(cos=torch.empty(4096, D // 2), sin=torch.empty(4096, D // 2))
    if how == "order 3":
        rows = Rows(*(torch.empty(16, 4096, R, 8, **half) for _ in "kv"))
        new += [torch.empty(16, T, R, 8, **half) for _ in "kv"]
    q = torch.empty(16, T, H, D, **half)
    compiled(factors_triton, q, *factors, 1.0, lengths, pages, new, rows)
for H, G, D, E, T in of_heads:
    k = torch.empty(16, 4096, G, D, **half)
    v = k[..., :E] if G == 1 and E < D else torch.empty(16, 4096, G, E, **half)
    compiled(grouped_triton, torch.empty(16, T, H, D, **half), k, v, 1.0, lengths)
"""
# Heads, head_dim, rank, page, query tokens, how rows are made: tokens and heads on the wide side, deep pipelines, the
# most that fits, pages, launches that leave room for another program, several programs for the same tokens.
OF_FACTORS = [
    (32, 64, 1, 0, 1, ""),
    (48, 64, 2, 0, 1, ""),
    (78, 64, 2, 0, 1, ""),
    (78, 64, 3, 0, 1, ""),
    (64, 128, 3, 0, 1, ""),
    (16, 128, 4, 0, 1, ""),
    (48, 64, 2, 64, 1, ""),
    (32, 64, 1, 64, 1, ""),
    (16, 64, 1, 0, 1, ""),
    (16, 64, 4, 0, 1, ""),
    (32, 64, 3, 0, 1, ""),
    (32, 128, 2, 0, 1, ""),
    (32, 32, 1, 0, 1, ""),
    (48, 64, 2, 0, 4, ""),
    (32, 64, 2, 0, 8, ""),
    (32, 64, 2, 0, 1, "turned"),
    (32, 64, 2, 0, 1, "order 3"),
    (16, 64, 1, 0, 1, "order 3"),
    (16, 128, 2, 0, 1, "order 3"),
    (96, 64, 1, 0, 1, "turned"),
    (32, 128, 2, 0, 4, "turned"),
    (31, 64, 2, 0, 1, ""),
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
def test_loads_are_pipelined_and_programs_fit_the_chip(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COMPILE, json.dumps([OF_FACTORS, OF_HEADS])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # Of each factor and rank, or of keys, of values that are not in them and of a rest of either, in front of the loop
    # and in it.
    # Head factors of an odd number of heads are loaded one by one.
    least = [(2 if H % 8 else 4) * 2 * min(R, 2) for H, _, R, *_ in OF_FACTORS] + [4, 4, 4, 6] + 6 * [4]
    lines = done.stdout.splitlines()
    for case, at_least, line in zip([*OF_FACTORS, *OF_HEADS], least, lines, strict=True):
        copies, shared, tensor_cores, programs, room, overlaps = map(int, line.split())
        assert copies >= at_least, case
        assert shared <= 227 * 1024, case
        assert tensor_cores or case in OF_FACTORS, case
        if case in OF_FACTORS:
            assert programs <= room, case
            # The hardware would put programs together and leave multiprocessors idle (kernels/decode/launch.py).
            assert programs >= room or not overlaps, case

"""Speed of T6 beside hand-written straight-line code with the same weights: python tests/bench_straight_line.py

Eager forward, and forward with backward, of `straight_line.py` and of the model, in turns within one process. A
ratio is the model's time over the straight-line code's in the same turn; the aim is a median of at most 1.1. On a
GPU the forward is also timed as a CUDA graph: where a small batch leaves the GPU waiting, eager time is the time
that Python and PyTorch take to launch kernels, and one merged product more or less shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import straight_line
from straight_line import Sizes

from t6_lightning.checkpoint.reference import as_trained, convert
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.mla import MLAConfig
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6

AIM = 1.1


def variants(d_model: int, n_layers: int, vocab_size: int) -> dict[str, tuple[Sizes, Any]]:
    """Sizes in the proportions of the paper's small model: 2.8 times as many heads with TPA as with MHA."""
    common: dict[str, Any] = {"d_model": d_model, "n_layers": n_layers, "vocab_size": vocab_size}
    head_dim = 64
    h = d_model // head_dim
    many, some = round(34 / 12 * h), round(22 / 12 * h)
    latents = {"q_latent": 2 * d_model // 3, "kv_latent": d_model // 3, "rope_dim": 32}
    mla = MLAConfig(h, head_dim, rope_dim=32, kv_rank=latents["kv_latent"], q_rank=latents["q_latent"])
    return {
        "tpa": (Sizes("tpa", n_heads=many, head_dim=head_dim, **common), TPAConfig(many, head_dim)),
        "tpa-kvonly": (
            Sizes("tpa-kvonly", n_heads=some, head_dim=head_dim, **common),
            TPAConfig(some, head_dim, factorize_q=False),
        ),
        "mha": (Sizes("mha", n_heads=h, head_dim=head_dim, **common), MHAConfig(h, head_dim)),
        "mla": (Sizes("mla", n_heads=h, head_dim=head_dim, **latents, **common), mla),
    }


def both(
    sizes: Sizes, attention: Any, tokens: torch.Tensor, dtype: torch.dtype
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Logits by the straight-line code and by the model, and what each of them trains."""
    state = straight_line.random_state(sizes)
    described = T6Config(sizes.vocab_size, sizes.d_model, sizes.n_layers, tokens.shape[1], attention)
    config = as_trained(state, described)
    model = T6(config).to(tokens.device)
    model.load_state_dict(convert(state, config))
    # Both turn in float32, whatever the model's dtype.
    cos, sin = (table.float() for table in straight_line.rope_tables(tokens.shape[1], sizes, tokens.device))
    merged = straight_line.merge({name: value.to(tokens.device) for name, value in state.items()}, sizes)
    with torch.no_grad():
        expected = straight_line.model(tokens, merged, sizes, cos, sin)
        difference = (model(tokens) - expected).norm() / expected.norm()
    assert difference < 1e-4, f"{sizes.mechanism}: logits differ by {difference}"
    model.to(dtype)
    weights = [{name: value.to(dtype).requires_grad_() for name, value in layer.items()} for layer in merged]
    flat = [value for layer in weights for value in layer.values()]
    return (
        lambda: straight_line.model(tokens, weights, sizes, cos, sin),
        lambda: model(tokens),
        flat,
        list(model.parameters()),
    )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the clock on a GPU, and on a CPU of the processor: what else runs there does not count."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def training(
    logits: Callable[[], torch.Tensor], weights: list[torch.Tensor], targets: torch.Tensor
) -> Callable[[], object]:
    def step() -> None:
        loss = F.cross_entropy(logits().flatten(0, 1).float(), targets.flatten())
        torch.autograd.grad(loss, weights)

    return step


def inference(logits: Callable[[], torch.Tensor]) -> Callable[[], object]:
    return torch.no_grad()(logits)


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The same kernels launched as one CUDA graph: what the GPU does, without what Python costs."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def compare(
    straight: Callable[[], object], ours: Callable[[], object], turns: int, device: torch.device
) -> dict[str, float]:
    """Times in turns, the order changing with each, and their ratios."""
    for _ in range(3):
        straight(), ours()
    times: list[tuple[float, float]] = []
    for turn in range(turns):
        if turn % 2:
            mine = seconds(ours, device)
            times.append((seconds(straight, device), mine))
        else:
            theirs = seconds(straight, device)
            times.append((theirs, seconds(ours, device)))
    ratios = [mine / theirs for theirs, mine in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "straight_ms": 1e3 * statistics.median(theirs for theirs, _ in times),
        "t6_ms": 1e3 * statistics.median(mine for _, mine in times),
        "ratio": statistics.median(ratios),
        "ratio_quarter": low,
        "ratio_three_quarters": high,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--d_model", type=int, help="default 256, on a GPU 768")
    parser.add_argument("--n_layers", type=int, help="default 4, on a GPU 12")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="default 256, on a GPU 1024")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--variants", nargs="+", default=["tpa", "tpa-kvonly", "mha", "mla"])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    device, on_gpu = torch.device(options.device), options.device.startswith("cuda")
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    d_model, n_layers = options.d_model or (768 if on_gpu else 256), options.n_layers or (12 if on_gpu else 4)
    length = options.tokens or (1024 if on_gpu else 256)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {options.threads} thread, processor time"
    print(
        f"{name}, torch {torch.__version__}, {dtype}, d_model {d_model}, {n_layers} layers, "
        f"{options.batch} x {length} tokens, vocabulary {options.vocab_size}, {options.turns} turns\n"
        "ratio: T6 over straight-line code, median (quartiles)\n"
    )
    print(f"{'variant':<12}{'pass':<20}{'straight':>11}{'T6':>11}   ratio")
    shape = (options.batch, length)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (
        torch.randint(options.vocab_size, shape, generator=generator).to(device) for _ in range(2)
    )
    rows = []
    for variant, (sizes, attention) in variants(d_model, n_layers, options.vocab_size).items():
        if variant not in options.variants:
            continue
        straight, ours, weights, parameters = both(sizes, attention, tokens, dtype)
        passes = {
            "forward": (inference(straight), inference(ours)),
            "forward + backward": (
                training(straight, weights, targets),
                training(ours, parameters, targets),
            ),
        }
        if on_gpu:
            passes["forward, GPU alone"] = (graphed(inference(straight)), graphed(inference(ours)))
        for label, (by_hand, by_model) in passes.items():
            row = compare(by_hand, by_model, options.turns, device)
            rows.append({"variant": variant, "pass": label, "device": name, "dtype": str(dtype), **row})
            spread = f"({row['ratio_quarter']:.3f} to {row['ratio_three_quarters']:.3f})"
            over = "" if row["ratio"] <= AIM else f"   above {AIM}"
            print(
                f"{variant:<12}{label:<20}{row['straight_ms']:>8.2f} ms{row['t6_ms']:>8.2f} ms   "
                f"{row['ratio']:.3f} {spread}{over}",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

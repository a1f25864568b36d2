"""Questions per minute of downstream tasks, ours and lm-eval's Hugging Face model with the same weights, in turn.

    python tests/bench_evaluation.py --task_data DIR --tokenizer DIR [--limit N] [--json FILE]

Random weights of the paper's small presets: how long scoring takes does not depend on them. Builds and requests are not
counted; both score the same questions of HellaSwag with the same batch, in bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama_twin import llama_twin
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from datamodules.tokenizer import Tokenizer, load_tokenizer
from t6_lightning.evaluation import downstream, tasks
from t6_lightning.evaluation.language_model import T6LM
from t6_lightning.model.t6 import T6
from t6_lightning.presets import load_net


def timed(function: Callable[[], Any]) -> float:
    """Seconds, the device's work included."""
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def transformers_form(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers reads it."""
    import tokenizers

    definition = json.loads(tokenizer.to_json())["definition"]
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(definition))
    made.eos_token = made.convert_ids_to_tokens(tokenizer.eot)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task_data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", type=int, default=200, help="questions per task of an evaluation in training"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(options.tokenizer, 50257, list)
    (part,) = tasks.build("hellaswag", options.task_data)
    questions = part.questions(options.limit)
    requests = [request for question in questions for request in question.requests]

    mha = load_net("paper/small-mha")
    rope = dataclasses.replace(mha.attention.rope, direction="llama", pairing="halves", tables="exact")
    mha = dataclasses.replace(mha, attention=dataclasses.replace(mha.attention, rope=rope))  # pyright: ignore
    ours, theirs = llama_twin(mha, tokenizer.eot)
    tpa = T6(load_net("paper/small-tpa")).eval()
    half = torch.bfloat16 if device == "cuda" else torch.float32
    models: dict[str, Any] = {
        "small-tpa, T6LM": T6LM(tpa.to(device), tokenizer, options.batch_size),
        "small-mha, T6LM": T6LM(ours.to(device), tokenizer, options.batch_size),
        "small-mha as Llama, lm-eval's hf": HFLM(
            theirs.to(device, half),
            tokenizer=transformers_form(tokenizer),
            batch_size=options.batch_size,
            max_length=mha.context,
            device=device,
        ),
    }
    for model in models.values():
        model.loglikelihood(requests[:512], disable_tqdm=True)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.repeats):
        for name, model in models.items():
            seconds[name].append(timed(lambda model=model: model.loglikelihood(requests, disable_tqdm=True)))
    rows = []
    for name, times in seconds.items():
        rate = [60 * len(questions) / each for each in times]
        rows.append({"model": name, "items_per_minute": statistics.median(rate), "all": rate})
        print(f"{name:34} {statistics.median(rate):9,.0f} items/min ({min(rate):,.0f} to {max(rate):,.0f})")
    quick = timed(
        lambda: downstream.evaluate_tasks(models["small-tpa, T6LM"], tasks.PAPER, options.task_data, [0], 200)
    )
    print(f"nine tasks, {options.quick} items each: {quick:.1f} s with building the requests")
    rows.append({"model": "small-tpa, T6LM", "seconds_of_nine_tasks": quick})
    if options.json:
        where = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps(where | {"n": len(questions), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()

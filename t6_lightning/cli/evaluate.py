"""evaluate: perplexity and bits per byte of a checkpoint on given files, and its scores in downstream tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from datamodules.packing import ValidationWindows
from datamodules.text_files import find_files
from datamodules.tokenizer import Tokenizer
from t6_lightning.checkpoint.load import load_trained
from t6_lightning.cli.parser import Parser, check_files, show_json
from t6_lightning.common.console import console
from t6_lightning.common.errors import require
from t6_lightning.evaluation import tasks
from t6_lightning.evaluation.perplexity import evaluate_windows, file_windows
from t6_lightning.evaluation.tasks import TASKS
from t6_lightning.evaluation.training_text import training_keys
from t6_lightning.presets.reading import read_mapping
from t6_lightning.runs.folder import resolve_checkpoint, run_of

MOST_CONTEXTS = 64
"""Times the training context that windows may be long."""


def warn_of_training_text(checkpoint: Path, windows: ValidationWindows, tokenizer: Tokenizer) -> int | None:
    """How many of the documents the checkpoint's run was trained on, where that can be told; says so if there are."""
    run = run_of(checkpoint)
    settings = read_mapping(run.config_file) if run is not None else {}
    keys = training_keys(settings["data"], tokenizer) if isinstance(settings.get("data"), dict) else None
    if keys is None:
        return None
    table = windows.streams[0].table
    n_seen = int(np.isin(table.key, keys).sum())
    if n_seen:
        print(
            f"warning: the model was trained on {n_seen:,} of these {len(table):,} documents, and knows them: "
            "`validate` and `test` take those that were held out",
            file=sys.stderr,
        )
    return n_seen


def main(arguments: list[str]) -> int:
    """Print perplexity and bits per byte of each file and of all, and scores of each task and their average."""
    parser = Parser("evaluate", __doc__ or "")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint file, or `last`")
    parser.add_argument("--run", help="run that `last` refers to (default: the newest)")
    parser.add_argument("--files", nargs="+", help="paths, globs or folders: .jsonl .txt .parquet")
    parser.add_argument("--text_field", default="text", help="column that holds the text")
    parser.add_argument("--txt_documents", choices=["file", "line", "paragraph"], default="file")
    parser.add_argument("--context", type=int, help="tokens per window (default: the training context)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows or questions at once (default 8)")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help=f"`paper` (all nine) or of {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--num_fewshot",
        type=int,
        nargs="+",
        default=[0],
        help="solved examples before a question (default 0)",
    )
    parser.add_argument("--limit", type=int, help="questions per task, the first ones (default: all)")
    parser.add_argument(
        "--task_data", help="folder of local files, TASK/SPLIT.jsonl[.gz] (default: the Hugging Face hub)"
    )
    parser.add_json()
    options = parser.parse_args(arguments[1:])
    check_files(options, "json")
    require(options.batch_size >= 1, "--batch_size", options.batch_size, "it must be at least 1")
    require(
        options.context is None or options.context >= 1, "--context", options.context, "it must be at least 1"
    )
    require(bool(options.files or options.tasks), "--files", options.files, "give --files, --tasks or both")
    for option in ("num_fewshot", "limit"):
        given = getattr(options, option)
        for value in given if isinstance(given, list) else [given] if given is not None else []:
            least = 1 if option == "limit" else 0
            require(value >= least, f"--{option}", value, f"it must be at least {least}")
    data = Path(options.task_data) if options.task_data else None
    require(data is None or data.is_dir(), "--task_data", options.task_data, "there is no such folder")
    names = tasks.names(options.tasks or [])
    if options.files:
        find_files(options.files)
    checkpoint = resolve_checkpoint(options.ckpt_path, options.run)
    trained = load_trained(checkpoint)
    own = trained.model.config.context
    context = options.context or own
    most = MOST_CONTEXTS * own
    require(
        context <= most,
        "--context",
        context,
        f"it must be at most {most}, {MOST_CONTEXTS} times the training's",
    )
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "context": context}
    shown: list[Table] = []
    if options.files:
        labels, windows = file_windows(
            options.files, options.text_field, options.txt_documents, trained.tokenizer, context
        )
        result["training_documents"] = warn_of_training_text(checkpoint, windows, trained.tokenizer)
        metrics = evaluate_windows(
            trained.model, windows, labels, options.batch_size, trained.confine_to_documents
        )
        result["files"] = metrics.per_domain()
        shown.append(_file_table(result["files"], f"{checkpoint.name}, windows of {context} tokens"))
    if names:
        from t6_lightning.evaluation import downstream, report
        from t6_lightning.evaluation.language_model import T6LM

        model = T6LM(trained.model, trained.tokenizer, options.batch_size, context, shows_progress=True)
        scores = downstream.evaluate_tasks(
            model, names, data, list(dict.fromkeys(options.num_fewshot)), options.limit
        )
        result |= report.as_dict(scores)
        shown.append(report.table(scores, f"{checkpoint.name}, tasks of lm-eval, ± standard error"))
    if options.json:
        show_json(result, options.json)
        return 0
    for table in shown:
        console.print(table)
    return 0


def _file_table(figures: dict[str, dict[str, float]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("file")
    for column in ("tokens", "bytes", "loss (nats)", "perplexity", "bits per byte"):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['tokens']:,.0f}",
            f"{row['bytes']:,.0f}",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['bits_per_byte']:.4f}",
        )
    return table

"""What `fit --dry_run` checks and says: all that can be known of a run without training it."""

from __future__ import annotations

from pathlib import Path

import torch

from datamodules.tokenizer import RAW_BYTES
from t6_lightning.cli.configuration import T6CLI
from t6_lightning.common.console import console
from t6_lightning.distributed import ranks
from t6_lightning.runs import report, tracking_store
from t6_lightning.runs.fit import RunConfig, find_start, plan_of
from t6_lightning.runs.plan import check_disk, measure_matrix_rate


def dry_run(cli: T6CLI, config: RunConfig) -> int:
    """Print what the run would cost, and refuse what it would refuse. Leaves nothing behind.

    Data is looked at but not read, except where only it tells how long an epoch is.

    Raises:
        BadInput: settings, checkpoints, data files, tokenizer, tracking store or disk that the run cannot have.
    """
    find_start(config, cli.model, cli.trainer, cli.run)
    cli.datamodule.check_sources()
    spec = getattr(cli.datamodule, "tokenizer_spec", "bpe")
    if spec == RAW_BYTES or spec[:1] in ("", ".", "/", "~") or Path(spec).is_dir():
        cli.model.check_tokenizer(cli.datamodule)
    tracking_store.check()
    plan = cli.plan
    if plan is None:
        cli.datamodule.prepare_data()
        plan = plan_of(cli.model, cli.datamodule, cli.trainer)
    device, half = cli.trainer.strategy.root_device, cli.trainer.precision == "bf16-mixed"
    dtype = torch.bfloat16 if half else torch.float32
    if ranks.is_first():
        report.print_plan(plan, measure_matrix_rate(device, dtype, cli.model.config.d_model))
        decided = ", ".join(f"{name}={value}" for name, value in cli.recipe_settings.items())
        line = f"recipe {cli.config.recipe}{': ' if decided else ''}{decided}"
        console.print(line, soft_wrap=True, highlight=False)
    check_disk(plan.disk_bytes)
    return 0

"""fit: train a run."""

from __future__ import annotations

import torch

from t6_lightning.cli.configuration import T6CLI, build
from t6_lightning.distributed import ranks
from t6_lightning.distributed.signals import signals
from t6_lightning.runs import report
from t6_lightning.runs.fit import RunConfig, check_weights_file, fit, plan_of
from t6_lightning.runs.plan import measure_matrix_rate


def main(arguments: list[str]) -> int:
    """Train, from the beginning or from a checkpoint, or say with `--dry_run` what that would cost."""
    with signals.raised_where_alone():
        cli = build(arguments)
    plan = None if cli.counts_epochs else plan_of(cli.model, cli.datamodule, cli.trainer)
    if cli.config.init_from:
        check_weights_file(cli.config.init_from)
    if cli.config.dry_run:
        if plan is None:
            cli.datamodule.prepare_data()  # which tells how long an epoch is
            plan = plan_of(cli.model, cli.datamodule, cli.trainer)
        device, half = cli.trainer.strategy.root_device, cli.trainer.precision == "bf16-mixed"
        dtype = torch.bfloat16 if half else torch.float32
        if ranks.is_first():
            report.print_plan(plan, measure_matrix_rate(device, dtype, cli.model.config.d_model))
        return 0
    return fit(config_of(cli), cli.model, cli.datamodule, cli.trainer, cli.run)


def config_of(cli: T6CLI) -> RunConfig:
    """What the run is called with."""
    config = cli.config
    return RunConfig(
        settings=cli.settings,
        preset=cli.preset,
        seed=config.seed_everything,
        ckpt_path=config.ckpt_path,
        init_from=config.init_from,
        repeatable=config.run is not None or config.ckpt_path == "last",
        started=cli.started,
    )

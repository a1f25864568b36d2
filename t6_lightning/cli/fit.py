"""fit: train a run."""

from __future__ import annotations

from t6_lightning.cli.configuration import T6CLI, build
from t6_lightning.cli.dry_run import dry_run
from t6_lightning.distributed.signals import signals
from t6_lightning.runs.fit import RunConfig, check_weights_file, fit


def main(arguments: list[str]) -> int:
    """Train, from the beginning or from a checkpoint, or say with `--dry_run` what that would cost."""
    with signals.raised_where_alone():
        cli = build(arguments)
    if cli.config.init_from:
        check_weights_file(cli.config.init_from)
    if cli.config.dry_run:
        with signals.raised_at_once():
            return dry_run(cli, config_of(cli))
    return fit(config_of(cli), cli.model, cli.datamodule, cli.trainer, cli.run)


def config_of(cli: T6CLI) -> RunConfig:
    """What the run is called with."""
    config = cli.config
    return RunConfig(
        settings=cli.settings,
        as_now=cli.as_now,
        preset=cli.preset,
        seed=config.seed_everything,
        ckpt_path=config.ckpt_path,
        init_from=config.init_from,
        repeatable=config.run is not None or config.ckpt_path == "last",
        started=cli.started,
    )

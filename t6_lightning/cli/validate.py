"""validate and test: figures of a checkpoint on its held-out data."""

from __future__ import annotations

from pathlib import Path

from t6_lightning.checkpoint.io import restoring
from t6_lightning.cli.configuration import T6CLI, build
from t6_lightning.common.errors import BadInput
from t6_lightning.distributed import launch, ranks
from t6_lightning.runs import report
from t6_lightning.runs.fit import refuse_other_architecture
from t6_lightning.runs.folder import resolve_checkpoint


def main(arguments: list[str]) -> int:
    """Print the checkpoint's figures on the validation data, or of `test` on the test data."""
    cli = build(arguments)
    return launch.on_every_rank(cli.trainer, cli.model, lambda: _evaluate(cli))


def _evaluate(cli: T6CLI) -> int:
    checkpoint = ranks.first(lambda: required_checkpoint(cli))
    loop = cli.trainer.test if cli.command == "test" else cli.trainer.validate
    with restoring(checkpoint):
        loop(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, verbose=False)
    report.print_figures(str(checkpoint), cli.model.figures)
    return 0


def required_checkpoint(cli: T6CLI) -> Path:
    """The checkpoint that `--ckpt_path` names, once its data is prepared. Raises BadInput."""
    ckpt_path = cli.config.ckpt_path
    if ckpt_path is None:
        raise BadInput(f"--ckpt_path is missing: {cli.command} needs a checkpoint file or `last`")
    checkpoint = resolve_checkpoint(ckpt_path, cli.config.run)
    refuse_other_architecture(cli.model.config, checkpoint)
    cli.datamodule.prepare_data()
    cli.model.check_tokenizer(cli.datamodule)
    return checkpoint

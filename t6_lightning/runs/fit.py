"""What fit, validate, test and predict do once everything is parsed and built."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.checkpoint import shards as checkpoint_shards
from t6_lightning.checkpoint.files import CheckpointError
from t6_lightning.cli.training import T6CLI
from t6_lightning.common.console import console
from t6_lightning.common.errors import BadInput, SourceUnavailable, require
from t6_lightning.distributed import fsdp2, launch, ranks
from t6_lightning.distributed.signals import Interrupted, signals
from t6_lightning.runs import environment, report
from t6_lightning.runs.folder import RunFolder, new_run_name, resolve_checkpoint, run_of
from t6_lightning.runs.plan import Plan, measure_matrix_rate
from t6_lightning.training.callbacks.checkpoints import CutOff
from t6_lightning.training.callbacks.spikes import Diverged


def fit(cli: T6CLI) -> int:
    """Train, from the beginning or from a checkpoint. Returns the exit code."""
    plan = Plan.of(cli)
    if cli.config.run is not None:
        RunFolder(cli.config.run)  # whose name may not be one
    if cli.config.init_from:
        _weights_file(cli.config.init_from)
    if cli.config.dry_run:
        device, half = cli.trainer.strategy.root_device, cli.trainer.precision == "bf16-mixed"
        dtype = torch.bfloat16 if half else torch.float32
        if ranks.is_first():
            report.print_plan(plan, measure_matrix_rate(device, dtype, cli.model.config.d_model))
        return 0
    return launch.on_every_rank(cli.trainer, cli.model, lambda: _fit(cli, plan))


def _fit(cli: T6CLI, plan: Plan) -> int:
    def prepared() -> tuple[str, Path | None] | SourceUnavailable | None:
        with suppress(Interrupted):  # it is noted: all ranks hear of it next
            try:
                return _prepare(cli, plan)
            except SourceUnavailable as error:
                return error

    # What can be wrong shows here, on rank 0 and before the run exists anywhere.
    where = ranks.first(prepared)
    if signum := ranks.signalled():
        return _after_signal(cli, Interrupted(signum))
    if isinstance(where, SourceUnavailable):
        if ranks.is_first():
            print(f"error: {where}", file=sys.stderr)
        return 75
    if where is None:
        return 0
    name, checkpoint = where
    folder = RunFolder(name)
    if cli.config.init_from:
        cli.model.initial_weights = _weights(cli, Path(cli.config.init_from))
    with ExitStack() as held:

        def hold() -> None:
            held.enter_context(folder.locked())

        ranks.first(hold)
        if ranks.is_first():
            _announce(cli, folder, checkpoint, plan)
        return _train(cli, folder, checkpoint)


def _prepare(cli: T6CLI, plan: Plan) -> tuple[str, Path | None] | None:
    """The run's name and the checkpoint to go on from; None when there is nothing left to do."""
    folder, checkpoint = _where_to_go_on(cli)
    if checkpoint is not None:
        _refuse_other_architecture(cli, checkpoint)
        if "optimizer_states" not in checkpoint_files.load(checkpoint, whole=False):
            raise BadInput(f"--ckpt_path={checkpoint} holds weights only: start from it with --init_from")
        if _step_of(checkpoint) > cli.trainer.max_steps:
            raise BadInput(
                f"trainer.max_steps={cli.trainer.max_steps} is not possible: {checkpoint.name} is further already"
            )
        if folder.record.get("status") == "finished" and _step_of(checkpoint) == cli.trainer.max_steps:
            console.print(f"run {folder.name} is finished already")
            report.print_summary(folder, report.read_summary(folder))
            return None
        if cli.config.ckpt_path is not None:
            for change in _changes(folder, cli):
                print(f"changed since the checkpoint, and used as it is now: {change}", file=sys.stderr)
    if cli.config.init_from:
        _weights(cli, Path(cli.config.init_from))
    plan.check_disk()
    with signals.raised_at_once():
        cli.datamodule.prepare_data()
        cli.datamodule.training_windows(cli.datamodule.validation_keys())  # text enough for one there must be
        cli.model.check_tokenizer(cli.datamodule)
        cli.tracking.connect()
    return folder.name, checkpoint


def _open(cli: T6CLI, folder: RunFolder, checkpoint: Path | None) -> None:
    """Write what the folder and the tracking store say of a run before it trains."""
    if checkpoint is None and (changes := _changes(folder, cli)):
        # Nothing is lost with a run that saved nothing. Unless it did so while data was prepared here.
        if checkpoint_files.in_order(folder.checkpoints):
            raise BadInput(f"--run={folder.name!r} is not possible: another process has trained it meanwhile")
        said = "ended before its first checkpoint and is begun anew, with another configuration"
        print(f"run {folder.name} {said}: {'; '.join(changes)}", file=sys.stderr)
        cli.tracking.leave(folder)
    folder.create(cli.config_yaml)
    started = folder.record.get("started") or datetime.now(UTC).isoformat()
    folder.update_record(status="running", started=started)
    tracking = cli.tracking
    tracking.start(folder, _tags(cli))
    tracking.log_hyperparams(_hyperparameters(cli))
    tracking.log_artifact(folder.config_file)
    tracking.log_artifact(environment.write(folder.path / "environment.json"))
    tracking.log_artifact(report.write_data_summary(cli.datamodule, folder))


def _train(cli: T6CLI, folder: RunFolder, checkpoint: Path | None) -> int:
    ranks.first(lambda: _open(cli, folder, checkpoint))
    cli.checkpoints.run_folder = folder
    cli.model.goes_on = checkpoint is not None
    status, mlflow_status, code = "failed", "FAILED", 1
    try:
        if checkpoint is not None and _step_of(checkpoint) == cli.trainer.max_steps:
            # Killed between its last checkpoint and its report.
            cli.trainer.validate(cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False)
        else:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
        net = fsdp2.whole_model(cli.model.net)
        faults = cli.datamodule.faults_of_all_ranks()
        if net is not None and ranks.is_first():
            report.print_summary(folder, report.finish(cli, folder, net, faults))
        status, mlflow_status, code = "finished", "FINISHED", 0
    except Interrupted as error:
        status, mlflow_status = "interrupted", "KILLED"
        code = _after_signal(cli, error)
    except CutOff as error:
        status, mlflow_status, code = "interrupted", "KILLED", 75
        if reason := str(error):
            print(f"error: {reason}", file=sys.stderr)
    except Diverged as error:
        if ranks.is_first():
            _explain_divergence(cli, folder, error)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
    except SourceUnavailable:
        status, mlflow_status = "interrupted", "KILLED"  # the same command goes on once the hub answers
        raise
    except ranks.FirstRankFailed:
        pass  # rank 0 says it
    except RuntimeError as error:
        if not ranks.is_lost(error):
            raise
        last = folder.last_checkpoint()
        said = f"go on from {last.name} with {_again(cli)[1]}" if last else "there is no checkpoint yet"
        print(f"error: another rank is gone or answers no more, and the run stops: {said}", file=sys.stderr)
        return 1
    finally:
        if ranks.is_first():
            folder.update_record(status=status)
            cli.tracking.close(mlflow_status)
    ranks.barrier()  # a launcher ends the others when one has left
    return code


def _explain_divergence(cli: T6CLI, folder: RunFolder, error: Diverged) -> None:
    last = folder.last_checkpoint()
    print(
        f"error: {error}: the run stops. Last good checkpoint: {last or 'none yet'}. "
        "Try a lower model.optimizer.lr, a longer warm-up, a lower trainer.gradient_clip_val, "
        f"or --seed_everything other than {cli.config.seed_everything}.",
        file=sys.stderr,
    )


def _where_to_go_on(cli: T6CLI) -> tuple[RunFolder, Path | None]:
    """The run's folder, and the checkpoint to go on from if there is one."""
    name, ckpt_path = cli.config.run, cli.config.ckpt_path
    if ckpt_path is not None:
        checkpoint = resolve_checkpoint(ckpt_path, name)
        folder = RunFolder(name) if name else run_of(checkpoint) or RunFolder(new_run_name("from-checkpoint"))
        return folder, checkpoint
    if name is None:
        return RunFolder(new_run_name(_preset(cli))), None
    folder = RunFolder(name)
    if not folder.exists:
        return folder, None
    saved = checkpoint_files.in_order(folder.checkpoints)
    checkpoint = folder.last_checkpoint()
    if saved and checkpoint is None:
        raise BadInput(
            f"--run={name!r} is not possible: none of that run's {len(saved)} checkpoints is whole; choose another "
            f"name, or remove {folder.path} to train it from the beginning"
        )
    if saved and (changes := _changes(folder, cli)):
        raise BadInput(
            f"--run={name!r} is not possible: that run exists with another configuration ({'; '.join(changes[:3])}); "
            "choose another name, or add --ckpt_path last to go on with the new values"
        )
    return folder, checkpoint


def _changes(folder: RunFolder, cli: T6CLI) -> list[str]:
    """Settings in which the folder's configuration differs from the present one."""
    if not folder.exists:
        return []
    before = dict(_leaves(yaml.safe_load(folder.config_file.read_text())))
    now = dict(_leaves(yaml.safe_load(cli.config_yaml)))
    names = [name for name in sorted(before | now) if not name.startswith(NO_PART_OF_WHAT_IS_COMPUTED)]
    names = [name for name in names if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]


NO_PART_OF_WHAT_IS_COMPUTED = (
    *(
        "tracking.",
        "trainer.profiler",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.strategy",
    ),
    *("data.init_args.num_workers", "data.init_args.batch_size", "checkpoints.keep"),
    *("checkpoints.asynchronous", "checkpoints.sharded"),
    *("model.recompute", "model.compile"),
    *("model.net.attention_backend", "model.net.attention_saves"),
)
"""Where a run is logged, and over what it is spread: tokens per step are a setting of their own."""


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for name, value in values.items():
        leaves += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return leaves


def _refuse_other_architecture(cli: T6CLI, checkpoint: Path, whole: bool = False) -> dict[str, Any]:
    """Load a checkpoint of this very architecture; `whole` as in `checkpoint_files.load`.

    Raises:
        BadInput: it is damaged or another model's.
    """
    state = checkpoint_files.load(checkpoint, whole)
    there = dict(_leaves(state["hyper_parameters"]["net"]))
    here = dict(_leaves(cli.model.config.architecture()))
    shapeless = {"dropout", "context", "rope_base", "attention.init_args.init"}
    differ = [
        name for name in sorted(there | here) if there.get(name) != here.get(name) and name not in shapeless
    ]
    if differ:
        named = "; ".join(
            f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in differ[:4]
        )
        raise BadInput(f"checkpoint {checkpoint} is of another architecture: {named}")
    return state


def _weights_file(named: str) -> Path:
    file = Path(named)
    require(file.exists(), "--init_from", named, "there is no such file")
    is_checkpoint = not file.is_dir() or (file / checkpoint_shards.REST).is_file()
    require(is_checkpoint, "--init_from", named, "that folder is no checkpoint; name one of its checkpoints")
    return file


def _weights(cli: T6CLI, checkpoint: Path) -> dict[str, torch.Tensor]:
    state = _refuse_other_architecture(cli, checkpoint, whole=True)["state_dict"]
    return {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint_files.load(checkpoint, whole=False)["global_step"])


SAME = "the same command"


def _again(cli: T6CLI) -> tuple[bool, str]:
    """Whether the same command goes on with the run, and what does."""
    if cli.config.run is not None or cli.config.ckpt_path == "last":
        return True, SAME
    return False, f"python -m t6_lightning fit --ckpt_path last --run {cli.checkpoints.run_folder.name}"


def _after_signal(cli: T6CLI, error: Interrupted) -> int:
    again, how = (True, SAME) if error.step is None else _again(cli)
    when = "before training began" if error.step is None else f"after a checkpoint at step {error.step}"
    if ranks.is_first():
        print(f"stopped by {error} {when}: go on with {how}", file=sys.stderr)
    return 75 if again else 128 + error.signum


def _preset(cli: T6CLI) -> str:
    """The name that the configuration goes by: the last of its files."""
    files = [Path(str(file)) for file in cli.config.get("config") or []]
    return report.preset_label(files[-1]) if files else "custom"


def _tags(cli: T6CLI) -> dict[str, str]:
    return environment.git_tags() | {
        "mlflow.user": environment.user(),
        "mlflow.source.name": "python -m t6_lightning fit",
        "mlflow.source.type": "LOCAL",
        "mechanism": cli.model.config.attention.mechanism,
        "preset": _preset(cli),
        "corpus": type(cli.datamodule).__name__,
        "seed": str(cli.config.seed_everything),
        "data_fingerprint": cli.datamodule.fingerprint,
    }


def _hyperparameters(cli: T6CLI) -> dict[str, Any]:
    derived = {
        "n_parameters": cli.model.config.n_parameters(),
        "tokens_per_step": cli.cadence.tokens_per_step,
        "ranks": cli.trainer.world_size,
    }
    return yaml.safe_load(cli.config_yaml) | derived


def _announce(cli: T6CLI, folder: RunFolder, checkpoint: Path | None, plan: Plan) -> None:
    console.print(f"run {folder.name} in {folder.path}", soft_wrap=True)
    if checkpoint is not None:
        console.print(f"going on from {checkpoint.name}")
    console.print(plan.sentence(), soft_wrap=True)


def validate(cli: T6CLI) -> int:
    """Print the checkpoint's figures on the validation data."""
    return launch.on_every_rank(cli.trainer, cli.model, lambda: _evaluate(cli, cli.trainer.validate))


def test(cli: T6CLI) -> int:
    """As `validate`, through Lightning's test loop."""
    return launch.on_every_rank(cli.trainer, cli.model, lambda: _evaluate(cli, cli.trainer.test))


def _evaluate(cli: T6CLI, loop: Any) -> int:
    checkpoint = ranks.first(lambda: _required_checkpoint(cli))
    loop(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, verbose=False)
    report.print_figures(str(checkpoint), cli.model.figures)
    return 0


def predict(cli: T6CLI) -> int:
    """Write the loss of every validation token to predictions.npz beside the checkpoint's run, or here."""
    return launch.on_every_rank(cli.trainer, cli.model, lambda: _predict(cli))


def _predict(cli: T6CLI) -> int:
    checkpoint = ranks.first(lambda: _required_checkpoint(cli))
    batches: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    if not ranks.is_first():
        return 0  # every rank has predicted everything: a file is written once
    arrays: dict[str, Any] = {name: torch.cat([b[name] for b in batches]).numpy() for name in batches[0]}
    run = run_of(checkpoint)
    file = (run.path if run else Path.cwd()) / "predictions.npz"
    np.savez_compressed(file, domains=np.array(cli.datamodule.domains), **arrays)
    console.print(f"{arrays['nll'].shape[0]} windows: loss of every token in {file}", soft_wrap=True)
    return 0


def _required_checkpoint(cli: T6CLI) -> Path:
    ckpt_path = cli.config.ckpt_path
    if ckpt_path is None:
        raise BadInput(f"--ckpt_path is missing: {cli.command} needs a checkpoint file or `last`")
    checkpoint = resolve_checkpoint(ckpt_path, cli.config.run)
    _refuse_other_architecture(cli, checkpoint)
    cli.datamodule.prepare_data()
    cli.model.check_tokenizer(cli.datamodule)
    return checkpoint

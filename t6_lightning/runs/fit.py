"""`fit`: train a run in its folder, from the beginning or from its newest checkpoint, and report it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import yaml

from datamodules.base import TokenData
from t6_lightning.checkpoint import content, files, shards
from t6_lightning.checkpoint.io import restoring
from t6_lightning.common.classes import import_class, import_path
from t6_lightning.common.console import console
from t6_lightning.common.errors import BadInput, CheckpointError, SourceUnavailable, disk_sentence, require
from t6_lightning.common.state import DamagedState
from t6_lightning.distributed import fsdp2, launch, ranks
from t6_lightning.distributed.signals import Interrupted, signals
from t6_lightning.model.config import T6Config
from t6_lightning.runs import environment, report
from t6_lightning.runs.folder import RunFolder, resolve_checkpoint
from t6_lightning.runs.plan import Plan, check_disk, disk_bytes
from t6_lightning.runs.tracking import MLflowTracking
from t6_lightning.training.callbacks.cadence import Cadence
from t6_lightning.training.callbacks.checkpoints import Checkpoints, CutOff
from t6_lightning.training.callbacks.spikes import Diverged
from t6_lightning.training.module import T6Module


@dataclass(frozen=True)
class RunConfig:
    """What a run is called with, beside the objects that train it.

    Attributes:
        settings: everything that is configured, as plain values. They are written to the run's config.yaml, logged as
            parameters, and compared when the run goes on: a change of what is computed is refused or named.
        preset: the name that the configuration goes by.
        seed: of model and data, for the run's tags.
        ckpt_path: a checkpoint to go on from even where settings changed; "last" is the run's newest good one.
        init_from: a checkpoint whose weights, and nothing else, are taken.
        repeatable: whether the same command goes on with the run, and does not begin another one.
        started: `time.monotonic()` when the command began.
        as_now: reads `settings` that an earlier version wrote: what it did not have yet has its default.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    preset: str = "custom"
    seed: int = 0
    ckpt_path: str | None = None
    init_from: str | None = None
    repeatable: bool = True
    started: float = field(default_factory=time.monotonic)
    as_now: Callable[[dict[str, Any]], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        checkpoint: what it goes on from; None at the beginning.
        ended: only its report is missing.
        summary: of a run of which nothing is missing.
        changes: settings that differ from those of the run's folder, as sentences.
    """

    checkpoint: Path | None
    ended: bool = False
    summary: dict[str, Any] | None = None
    changes: tuple[str, ...] = ()


def fit(config: RunConfig, module: T6Module, data: TokenData, trainer: pl.Trainer, run: RunFolder) -> int:
    """Train `module` on `data` as `run`: prepare, go on from the newest good checkpoint, train, report.

    The Trainer needs the callback `Checkpoints` with the run's folder, `Cadence`, and for exact resumption with dropout
    `StepSeeds`; with the logger `MLflowTracking` the run is tracked. With several ranks the whole call runs on each:
    Lightning's launcher starts them here unless torchrun or SLURM did.

    Returns:
        0 when the run is finished, 75 after a signal or a source that cannot be reached, when the same call goes on
        from the checkpoint, 1 when it failed.

    Raises:
        BadInput: before anything is trained or written: settings, data, disk, another process that trains the run.
    """
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    if _find(callbacks, Checkpoints) is None:
        raise BadInput(
            "fit is not possible: the Trainer lacks the callback Checkpoints with the run's folder"
        )
    return launch.on_every_rank(trainer, module, lambda: _fit(config, module, data, trainer, run))


def _fit(config: RunConfig, module: T6Module, data: TokenData, trainer: pl.Trainer, run: RunFolder) -> int:
    def prepared() -> Start | SourceUnavailable | None:
        try:
            return _prepare(config, module, data, trainer, run)
        except SourceUnavailable as error:
            return error
        except Interrupted as error:
            if error.at_once:
                raise
            return None  # it is noted: all ranks hear of it next

    _ = run.name  # chosen on rank 0, and told to the others
    # What can be wrong shows here, on rank 0 and before the run exists anywhere.
    start = ranks.first(prepared)
    if signum := ranks.signalled():
        return _after_signal(config, run, Interrupted(signum))
    if isinstance(start, SourceUnavailable):
        if ranks.is_first():
            print(f"error: {start}", file=sys.stderr)
        return 75
    if start is None:
        return 0
    if config.init_from:
        module.start_from(_weights(module.config, Path(config.init_from)))
    with ExitStack() as held:

        def hold() -> None:
            held.enter_context(run.locked())

        ranks.first(hold)
        try:
            ranks.first(lambda: _open(config, module, data, trainer, run, start))
            return _train(config, module, data, trainer, run, start)
        except OSError as error:
            if (sentence := disk_sentence(error)) is None:
                raise
            last = run.last_checkpoint()
            stands = f"{last.name} stands" if last else "there is no checkpoint yet"
            command = _resume_command(config, run)
            print(f"error: {sentence}; {stands}: make room and go on with {command}", file=sys.stderr)
            return 1


# --- before training ---


def find_start(config: RunConfig, module: T6Module, trainer: pl.Trainer, run: RunFolder) -> Start:
    """Where the run goes on. Reads what is there, and writes nothing.

    Raises:
        BadInput: a checkpoint that cannot be gone on from, weights that do not fit, a run of other settings.
    """
    changes = _changes(config, run, is_said=False)
    checkpoint = _checkpoint(config, run, changes)
    ended, summary = False, None
    if checkpoint is not None:
        state = refuse_other_architecture(module.config, checkpoint)
        if "optimizer_states" not in state:
            raise BadInput(f"--ckpt_path={checkpoint} holds weights only: start from it with --init_from")
        content.check_optimizer(state, f"checkpoint {checkpoint}")
        step = int(state.get("global_step", 0))
        if -1 < trainer.max_steps < step:
            raise BadInput(
                f"trainer.max_steps={trainer.max_steps} is not possible: {checkpoint.name} is further already"
            )
        saved = state.get("callbacks", {}).get(Checkpoints.__qualname__, {})
        # Version 0.1.0 did not say whether training had ended; it ended by steps alone.
        ended = step == trainer.max_steps or (saved.get("ended") is True and not changes)
        is_reported = run.record.get("status") == "finished" and ended
        summary = report.read_summary(run) if is_reported else None  # without one it is reported again
    if config.init_from and summary is None:
        _weights(module.config, Path(config.init_from))
    return Start(checkpoint, ended, summary, tuple(changes))


def _prepare(
    config: RunConfig, module: T6Module, data: TokenData, trainer: pl.Trainer, run: RunFolder
) -> Start | None:
    """Where the run goes on; None when there is nothing left to do. On rank 0 alone."""
    start = find_start(config, module, trainer, run)
    if start.summary is not None:
        console.print(f"run {run.name} is finished already")
        report.print_summary(run, start.summary)
        return None
    if start.checkpoint is not None and config.ckpt_path is not None:
        for change in start.changes:
            print(f"changed since the checkpoint, and used as it is now: {change}", file=sys.stderr)
    check_disk(disk_bytes(module.config.n_parameters(), _kept(trainer)))
    with signals.raised_at_once():
        data.prepare_data()
        data.training_windows(data.validation_keys())  # text enough for one there must be
        module.check_tokenizer(data)
        if (tracking := _find(trainer.loggers, MLflowTracking)) is not None:
            tracking.connect()
    return start


def _kept(trainer: pl.Trainer) -> int:
    """How many checkpoints stay."""
    checkpoints = _find(trainer.callbacks, Checkpoints)  # pyright: ignore[reportAttributeAccessIssue]
    return 1 if checkpoints is None else checkpoints.keep


def plan_of(module: T6Module, data: TokenData, trainer: pl.Trainer) -> Plan:
    """The costs of a run. A run that counts epochs must have its data prepared, which tells how long they are.

    Raises:
        BadInput: the tokens of a step are no multiple of those of a micro-batch on every rank.
    """
    cadence = _find(trainer.callbacks, Cadence) or Cadence()  # pyright: ignore[reportAttributeAccessIssue]
    micro_batches = cadence.micro_batches(data.batch_size, data.context, trainer.world_size)
    tokens_per_step = micro_batches * data.batch_size * data.context * trainer.world_size
    steps = trainer.max_steps
    if trainer.max_epochs not in (None, -1):
        windows = sum(w.per_epoch or 0 for w in data.training_windows(data.validation_keys()).values())
        per_epoch = windows * data.context // tokens_per_step
        of_epochs = max(1, per_epoch) * (trainer.max_epochs or 0)
        steps = of_epochs if steps == -1 else min(steps, of_epochs)
    return Plan.of(module.config, steps, tokens_per_step, micro_batches, _kept(trainer))


def _checkpoint(config: RunConfig, run: RunFolder, changes: list[str]) -> Path | None:
    """The checkpoint to go on from, if there is one."""
    if config.ckpt_path not in (None, "last"):
        return resolve_checkpoint(config.ckpt_path, run.name)
    # Both may come before the run's first checkpoint: a job's script is the same for its first start and all others.
    checkpoint = run.checkpoint_to_go_on_from()
    if checkpoint is not None and changes and config.ckpt_path is None:
        raise BadInput(
            f"--run={run.name!r} is not possible: that run exists with another configuration "
            f"({'; '.join(changes[:3])}); choose another name, or add --ckpt_path last to go on with the new values"
        )
    return checkpoint


def _changes(config: RunConfig, run: RunFolder, is_said: bool) -> list[str]:
    """`changed_settings`; none where they cannot be told and nothing is lost, or the user asks to go on."""
    try:
        return changed_settings(run, config)
    except DamagedState as error:
        if run.has_saved and config.ckpt_path is None:
            raise
        if not is_said:
            message = "the settings of this command are used, and what the run had before is not known"
            print(f"{run.config_file} is {error.reason}: {message}", file=sys.stderr)
        return []


def changed_settings(run: RunFolder, config: RunConfig) -> list[str]:
    """Settings in which the folder's configuration differs from the present one, as sentences.

    Raises:
        DamagedState: the folder's configuration is damaged, or missing beside checkpoints.
    """
    if (written := run.settings) is None:
        return []
    now = dict(leaves(config.settings))
    before = dict(leaves(written))
    if before.keys() != now.keys():  # of another version, or with other classes
        before = dict(leaves(config.as_now(written)))
    names = [name for name in sorted(before | now) if not name.startswith(NOT_COMPUTED)]
    names = [
        name for name in names if _same_class(name, before.get(name)) != _same_class(name, now.get(name))
    ]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]


NOT_COMPUTED = (
    *("tracking.", "trainer.profiler", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "data.init_args.num_workers", "data.init_args.batch_size", "checkpoints.keep"),
    *("checkpoints.asynchronous", "checkpoints.sharded", "model.recompute", "model.compile"),
    *("model.net.attention_backend", "model.net.attention_saves"),
)
"""Settings that change nothing that is computed: where a run is logged, and over what it is spread."""


def _same_class(name: str, value: Any) -> Any:
    """A class_path as the one path of its class, however it was written and wherever the class was then."""
    if not name.endswith("class_path") or not isinstance(value, str) or "." not in value:
        return value
    try:
        return import_path(import_class(value, object, name))
    except BadInput:
        return value


def leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as pairs of dotted name and value."""
    found = []
    for name, value in values.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def refuse_other_architecture(net: T6Config, checkpoint: Path, whole: bool = False) -> dict[str, Any]:
    """Load a checkpoint of this very architecture; `whole` as in `files.load`.

    Raises:
        BadInput: it is damaged or another model's.
    """
    state = files.load(checkpoint, whole)
    saved = content.config_of(state, f"checkpoint {checkpoint}")
    shapeless = {"dropout", "context", "rope_base", "attention.init_args.init", "attention.init_args.init_q"}
    differ = {
        name: values for name, values in net.differences(saved.to_dict()).items() if name not in shapeless
    }
    if differ:
        named = "; ".join(
            f"{name} is {there!r} there and {here!r} here" for name, (there, here) in list(differ.items())[:4]
        )
        raise BadInput(f"checkpoint {checkpoint} is of another architecture: {named}")
    content.check_weights(state["state_dict"], net, f"checkpoint {checkpoint}")
    return state


def check_weights_file(named: str) -> None:
    """Refuse an `--init_from` that names no checkpoint. Raises BadInput."""
    file = Path(named)
    require(file.exists(), "--init_from", named, "there is no such file")
    is_checkpoint = not file.is_dir() or (file / shards.REST).is_file()
    require(is_checkpoint, "--init_from", named, "that folder is no checkpoint; name one of its checkpoints")


def _weights(net: T6Config, checkpoint: Path) -> dict[str, torch.Tensor]:
    state = refuse_other_architecture(net, checkpoint, whole=True)["state_dict"]
    return {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}


def _open(
    config: RunConfig, module: T6Module, data: TokenData, trainer: pl.Trainer, run: RunFolder, start: Start
) -> None:
    """Announce the run, and write what its folder and the loggers say of it before it trains."""
    plan = plan_of(module, data, trainer)
    console.print(f"run {run.name} in {run.path}", soft_wrap=True)
    if start.checkpoint is not None:
        console.print(f"going on from {start.checkpoint.name}")
    console.print(plan.sentence(), soft_wrap=True)
    tracking = _find(trainer.loggers, MLflowTracking)
    if start.checkpoint is None and run.has_saved:
        raise BadInput(f"--run={run.name!r} is not possible: another process has trained it in between")
    # Nothing is lost with a run that saved nothing.
    if start.checkpoint is None and (changes := _changes(config, run, is_said=True)):
        said = "ended before its first checkpoint and begins again, with another configuration"
        print(f"run {run.name} {said}: {'; '.join(changes)}", file=sys.stderr)
        if tracking is not None:
            tracking.leave()
    run.create(yaml.safe_dump(dict(config.settings), sort_keys=False))
    started = run.record.get("started") or datetime.now(UTC).isoformat()
    run.update_record(status="running", started=started, **_time_so_far(config, run, start))
    if tracking is not None:
        tracking.start(_tags(config, module, data))
    derived = {
        "n_parameters": module.config.n_parameters(),
        "tokens_per_step": plan.tokens_per_step,
        "ranks": trainer.world_size,
    }
    for logger in trainer.loggers:
        logger.log_hyperparams(dict(config.settings) | derived)
    described = environment.write(run.path / "environment.json")
    summary = report.write_data_summary(data, run)
    if tracking is not None:
        for file in (run.config_file, described, summary):
            tracking.log_artifact(file)


def _time_so_far(config: RunConfig, run: RunFolder, start: Start) -> dict[str, float]:
    """For the record: seconds of the commands before this one, and when this one began, in seconds of the epoch.

    A command that was killed could not add its own time: it counts up to the checkpoint that it left.
    """
    began = time.time() - (time.monotonic() - config.started)
    if start.checkpoint is None:
        return {"seconds": 0.0, "began": began}
    seconds, killed = run.record.get("seconds", 0.0), run.record.get("began")
    if killed is not None:
        seconds += max(0.0, start.checkpoint.stat().st_mtime - killed)
    return {"seconds": seconds, "began": began}


def _seconds(config: RunConfig, run: RunFolder) -> float:
    """Of all commands that trained the run, this one included."""
    return run.record.get("seconds", 0.0) + time.monotonic() - config.started


def _tags(config: RunConfig, module: T6Module, data: TokenData) -> dict[str, str]:
    return environment.git_tags() | {
        "mlflow.user": environment.user(),
        "mlflow.source.name": "python -m t6_lightning fit",
        "mlflow.source.type": "LOCAL",
        "mechanism": module.config.attention.mechanism,
        "preset": config.preset,
        "corpus": type(data).__name__,
        "seed": str(config.seed),
        "data_fingerprint": data.fingerprint,
    }


# --- training, and what ends it ---


def _train(
    config: RunConfig, module: T6Module, data: TokenData, trainer: pl.Trainer, run: RunFolder, start: Start
) -> int:
    tracking = _find(trainer.loggers, MLflowTracking)
    status, mlflow_status, code = "failed", "FAILED", 1
    try:
        ended = _run_trainer(config, module, data, trainer, run, start)
        net = fsdp2.whole_model(module.net)
        if net is not None and ranks.is_first():
            report.print_summary(run, report.finish(ended, net, module.figures, data, run, tracking))
        status, mlflow_status, code = "finished", "FINISHED", 0
    except Interrupted as error:
        status, mlflow_status = "interrupted", "KILLED"
        if error.at_once:
            raise
        code = _after_signal(config, run, error)
    except CutOff as error:
        status, mlflow_status, code = "interrupted", "KILLED", 75
        if reason := str(error):
            print(f"error: {reason}", file=sys.stderr)
    except Diverged as error:
        if ranks.is_first():
            _explain_divergence(config, run, error)
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
        last = run.last_checkpoint()
        message = (
            f"go on from {last.name} with {_resume_command(config, run)}"
            if last
            else "there is no checkpoint yet"
        )
        print(
            f"error: another rank is gone or does not answer, and the run stops: {message}", file=sys.stderr
        )
        return 1
    finally:
        if ranks.is_first():
            with suppress(OSError):  # of a full disk, which is said already
                run.update_record(status=status, seconds=_seconds(config, run), began=None)
            if tracking is not None:
                tracking.close(mlflow_status)
    ranks.barrier()  # a launcher ends the others when one has left
    return code


def _run_trainer(
    config: RunConfig, module: T6Module, data: TokenData, trainer: pl.Trainer, run: RunFolder, start: Start
) -> report.Ended:
    half = trainer.precision == "bf16-mixed"
    if start.ended and start.checkpoint is not None:
        # Killed between its last checkpoint and its report.
        # Its validation was logged before the checkpoint; Lightning would log an `epoch` of this one too.
        loggers, trainer.loggers = trainer.loggers, []
        with restoring(start.checkpoint):
            trainer.validate(module, data, ckpt_path=start.checkpoint, verbose=False)
        trainer.loggers = loggers
        step = int(files.load(start.checkpoint, whole=False)["global_step"])
        tokens = data.samples * data.context
    else:
        with restoring(start.checkpoint):
            trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint)
        step = trainer.global_step
        loader: Any = data.train_loader
        tokens = loader.samples * data.context
    return report.Ended(step, tokens, _seconds(config, run), data.faults_of_all_ranks(), half)


def _explain_divergence(config: RunConfig, run: RunFolder, error: Diverged) -> None:
    last = run.last_checkpoint()
    print(
        f"error: {error}: the run stops. Last good checkpoint: {last or 'none yet'}. "
        "Try a lower model.optimizer.lr, a longer warm-up, a lower trainer.gradient_clip_val, "
        f"or --seed_everything other than {config.seed}.",
        file=sys.stderr,
    )


def _resume_command(config: RunConfig, run: RunFolder) -> str:
    if config.repeatable:
        return "the same command"
    return f"python -m t6_lightning fit --ckpt_path last --run {run.name}"


def _after_signal(config: RunConfig, run: RunFolder, error: Interrupted) -> int:
    has_trained = error.step is not None
    command = _resume_command(config, run) if has_trained else "the same command"
    when = f"after a checkpoint at step {error.step}" if has_trained else "before training began"
    if ranks.is_first():
        print(f"stopped by {error} {when}: go on with {command}", file=sys.stderr)
    return 75 if config.repeatable or not has_trained else 128 + error.signum


Kind = TypeVar("Kind")


def _find(among: list[Any], kind: type[Kind]) -> Kind | None:
    """The first object of a class."""
    return next((one for one in among if isinstance(one, kind)), None)

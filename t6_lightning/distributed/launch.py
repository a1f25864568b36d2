"""How the ranks of a run are started, and the trainer that they share."""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from t6_lightning.common.console import console
from t6_lightning.common.errors import BadInput, require, shown
from t6_lightning.distributed import ranks
from t6_lightning.distributed.fsdp2 import ShardedStrategy
from t6_lightning.distributed.signals import Interrupted, signals

SECONDS_TO_LEAVE = 60
"""How long the first process waits for the others that it started."""
SECONDS_TO_JOIN = 20
"""How long a rank that was asked to stop still waits for ranks that have not joined, to stop with them."""


def on_every_rank(trainer: pl.Trainer, module: pl.LightningModule, program: Callable[[], int]) -> int:
    """Start the other ranks of this node, unless torchrun or SLURM did, and run `program` on each.

    The whole command runs on every rank, not Lightning's loop alone, so that what rank 0 decides (the run's
    name, the checkpoint) can be told to the others before anything is spent.

    Returns:
        the exit code; of ranks that Lightning's launcher started always 0, because it takes any other for a crash.
    """
    if trainer.world_size == 1:
        return program()
    strategy = trainer.strategy
    launcher: Any = strategy.launcher
    environment: Any = getattr(strategy, "cluster_environment", None)
    is_child = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0

    def leave_alone(signum: int) -> None:
        _end(getattr(launcher, "procs", []), patience=0)
        name, to_go_on = signal.Signals(signum).name, "go on with the same command"
        print(f"stopped by {name} before all ranks had joined: {to_go_on}", file=sys.stderr, flush=True)
        os._exit(128 + signum if signum == signal.SIGINT else 75)

    def connected_program() -> int:
        strategy.connect(module)
        with signals.heeded_in_c(leave_alone, SECONDS_TO_JOIN):
            strategy.setup_environment()
            ranks.connect_hosts()
        # Lightning's own way out, when Python ends, is too late: the first process waits for the others to end.
        atexit.unregister(_destroy_dist_connection)
        if not ranks.is_first():
            _say_warnings_only()
        try:
            return program()
        finally:
            # Who leaves at once asks no other.
            ranks.disconnect(patience=0 if isinstance(sys.exception(), Interrupted) else 10)

    try:
        code = (
            connected_program() if launcher is None else launcher.launch(connected_program, trainer=trainer)
        )
    except ranks.FirstRankFailed:
        return 0 if is_child else 1
    except BaseException as error:
        at_once = isinstance(error, Interrupted) and error.at_once
        _end(getattr(launcher, "procs", []), patience=0 if at_once else 5)
        raise
    _end(getattr(launcher, "procs", []), patience=SECONDS_TO_LEAVE)
    return 0 if is_child else code


def _say_warnings_only() -> None:
    console.quiet = True
    for name in ("t6_lightning", "datamodules"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _end(processes: list[subprocess.Popen[Any]], patience: float) -> None:
    """Wait for processes to leave by themselves; one that hangs in a collective is killed."""
    for process in processes:
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def started_from_outside() -> tuple[int, int] | None:
    """(processes per node, nodes) that torchrun or srun started; None when neither did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return per_node, int(os.environ["WORLD_SIZE"]) // per_node
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return None


def follow_launcher(trainer: Any) -> None:
    """Set the trainer's devices and nodes to the processes that torchrun or srun started.

    Raises:
        BadInput: other numbers were asked for.
    """
    started = started_from_outside()
    if started is None:
        return
    for name, unset, number in (("devices", "auto", started[0]), ("num_nodes", 1, started[1])):
        given = trainer[name]
        fits = given in (unset, number, str(number))
        require(fits, f"trainer.{name}", given, f"the launcher started {number}; leave it out")
        trainer[name] = number


def _guilty(build: Callable[[dict[str, Any]], pl.Trainer], config: dict[str, Any]) -> str:
    """Which settings the trainer cannot be built with: those without any one of which it can."""
    usual = {name: value.default for name, value in inspect.signature(pl.Trainer).parameters.items()}
    guilty = []
    for name, value in config.items():
        if name in usual and value != usual[name]:
            with suppress(Exception):
                build(config | {name: usual[name]})
                guilty.append(f"trainer.{name}={shown(value)}")
    return f"{' with '.join(guilty)} is not possible" if guilty else "trainer"


def build_trainer(
    build: Callable[[dict[str, Any]], pl.Trainer], config: dict[str, Any], shards: bool
) -> pl.Trainer:
    """Lightning's trainer with our strategy in place of its model-parallel one.

    Args:
        build: makes the trainer of its arguments.
        config: those arguments.
        shards: checkpoints are to be folders of shards.

    Raises:
        BadInput: a strategy or devices that are not there, tensor parallelism, or shards of a model that is not spread.
    """
    asked = config["strategy"]
    options: dict[str, Any] = {"writes_shards": True} if shards else {}
    if isinstance(asked, str):
        name = asked.lower()  # as Lightning reads it
        is_lightnings = name.rpartition(".")[2] == "modelparallelstrategy"
        name = "fsdp2" if is_lightnings else name
        known = ("auto", *StrategyRegistry.available_strategies())
        allowed = f"choose auto, ddp, {', '.join(n for n in known if n.startswith('fsdp2'))}, or another of Lightning's"
        require(name in known, "trainer.strategy", asked, allowed)
        config = config | {"strategy": name}
    if isinstance(asked, ModelParallelStrategy):
        require(
            asked._tensor_parallel_size in ("auto", 1),
            "trainer.strategy.tensor_parallel_size",
            asked._tensor_parallel_size,
            "the model is spread by parameters alone; leave it out",
        )
        options |= {"process_group_backend": asked._process_group_backend, "timeout": asked._timeout}
        config = config | {"strategy": "fsdp2"}  # by name: Lightning's object refuses float64
    is_spread = str(config["strategy"]).startswith("fsdp2")
    require(is_spread or not shards, "checkpoints.sharded", shards, "it needs --trainer.strategy fsdp2")
    if options:
        options = StrategyRegistry[config["strategy"]]["init_params"] | options
        StrategyRegistry.register("_fsdp2_as_asked", ShardedStrategy, override=True, **options)
        config = config | {"strategy": "_fsdp2_as_asked"}
    try:
        return build(config)
    except Exception as error:  # every accelerator, precision and strategy has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{_guilty(build, config)}: {reason}") from error

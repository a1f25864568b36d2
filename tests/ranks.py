"""Commands on several ranks, as torchrun starts them, in processes that need not import Lightning anew."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

from commands import TINY

SECONDS = 400


def _rank(arguments: list[str], environment: dict[str, str], errors: str, preparation: Any) -> None:
    os.environ.update(environment)
    with open(errors, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    # Workers of torch's loaders end when their parent is not the process that asked for them.
    multiprocessing.set_start_method("fork", force=True)
    if preparation is not None:
        preparation()
    from t6_lightning.__main__ import main

    code = 1
    with contextlib.suppress(SystemExit):
        code = main(arguments)
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def of_torchrun(rank: int, world: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0"},
        **{"LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"},
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def of_slurm(rank: int, world: int) -> dict[str, str]:
    """What srun tells a process."""
    return {
        **{
            "SLURM_JOB_ID": "1234",
            "SLURM_JOB_NAME": "t6",
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_NNODES": "1",
        },
        **{"SLURM_NTASKS": str(world), "SLURM_NTASKS_PER_NODE": str(world), "SLURM_NODEID": "0"},
        **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
    }


def start(
    world: int, folder: Path, *arguments: str | Path, preparation: Any = None, slurm: bool = False
) -> list[multiprocessing.process.BaseProcess]:
    """Start a command on `world` ranks. What rank r says goes to `folder`/rank-r.txt.

    `preparation` is a picklable function that each rank calls first. With `slurm` the ranks find what srun would
    have told them, else what torchrun would.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = _context()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "T6_HOME": os.environ["T6_HOME"]}
    shared |= {name: os.environ[name] for name in ("HF_ENDPOINT",) if name in os.environ}
    processes = []
    for rank in range(world):
        own = shared | (of_slurm if slurm else of_torchrun)(rank, world)
        process = context.Process(
            target=_rank,
            args=([str(a) for a in arguments], own, str(folder / f"rank-{rank}.txt"), preparation),
        )
        process.start()
        processes.append(process)
    return processes


def start_alone(said: Path, *arguments: str | Path) -> multiprocessing.process.BaseProcess:
    """Start a command as a user does: one process, which no launcher tells anything. What it says goes to a file."""
    own = {"T6_HOME": os.environ["T6_HOME"]}
    process = _context().Process(target=_rank, args=([str(a) for a in arguments], own, str(said), None))
    process.start()
    return process


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["t6_lightning.cli.configuration", "mlflow.tracking", "matplotlib.pyplot"])
    return context


def finish(processes: list[multiprocessing.process.BaseProcess]) -> list[int]:
    """Wait for all ranks, killing those that hang; their exit codes."""
    try:
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [process.exitcode or 0 for process in processes]


def fit(world: int, name: str, *arguments: str | Path, preparation: Any = None) -> str:
    """A tiny run on `world` ranks of a CPU, which must end well; what rank 0 said."""
    said = Path(os.environ["T6_HOME"]) / "said" / name
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", str(world)]
    strategy = [] if "--trainer.strategy" in arguments or world == 1 else ["--trainer.strategy", "ddp"]
    codes = finish(
        start(
            world, said, "fit", *TINY, *devices, *strategy, "--run", name, *arguments, preparation=preparation
        )
    )
    everything = "\n".join((said / f"rank-{rank}.txt").read_text() for rank in range(world))
    assert codes == [0] * world, everything
    return (said / "rank-0.txt").read_text()

"""What training costs beside its steps, and what a second device brings, measured on whole runs of `fit`.

    python tests/bench_training.py --preset paper/medium-tpa --strategies one ddp fsdp2 --costs 16384 -- FIT OPTIONS

Per strategy ("one" is one device, the others take all): median and quartiles of the logged speeds of a
run, and the share of its time in which a rank waited for data. Then, with --costs, on one device: how long training is
held up by a checkpoint, from the times at which steps were logged, and seconds from the start of the command to the
end of the first step, fresh and resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKPOINT_EVERY, STEPS = 10, 30


def logged(home: Path, run: str, key: str) -> dict[int, tuple[float, float]]:
    """By step: the value of a metric and when it was logged."""
    record = json.loads((home / "runs" / run / "run.json").read_text())
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute(
            "SELECT step, value, timestamp FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step",
            (record["mlflow_run_id"], key),
        ).fetchall()
    return {step: (value, at / 1000) for step, value, at in rows}


def speed(home: Path, name: str, options: list[str], steps: int) -> dict[str, Any]:
    """Tokens/s of a run, the first 10 steps left out; what comes after its last step is not waited for."""
    devices = ["--trainer.devices", "1"] if name == "one" else ["--trainer.strategy", name]
    limits = ["--trainer.max_steps", str(steps), "--cadence.log_every_steps", "2"]
    run = f"speed-{name}"
    started = time.time()
    until_step(home, run, [*options, *devices, *limits], steps)
    of = {key: logged(home, run, f"perf/{key}") for key in ("tokens_per_second", "data_share")}
    speeds = [value for step, (value, _) in of["tokens_per_second"].items() if step > 10]
    shares = [value for step, (value, _) in of["data_share"].items() if step > 10]
    low, median, high = statistics.quantiles(speeds, n=4)
    times = [at for _, at in of["tokens_per_second"].values()]
    return {
        "seconds_to_first_step": times[0] - started,
        "seconds_of_steps": times[-1] - times[0],
        "tokens_per_second": median,
        "quartiles": [low, high],
        "logged": len(speeds),
        "data_share": statistics.median(shares),
        "data_share_most": max(shares),
    }


def fit(run: str, arguments: list[str]) -> None:
    """Run a training to its end."""
    command = [sys.executable, "-m", "t6_lightning", "fit", "--run", run, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{run}: exit code {done.returncode}\n{done.stderr}")


def until_step(home: Path, run: str, arguments: list[str], step: int = 0) -> tuple[float, int]:
    """Seconds from the start of a run to its first logged step from `step` on, and that step; it is killed then."""
    started = time.time()
    command = [sys.executable, "-m", "t6_lightning", "fit", "--run", run, *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            while True:
                if process.poll() is not None:
                    errors.seek(0)
                    raise SystemExit(
                        f"{run}: exit code {process.returncode} before its step\n{errors.read()}"
                    )
                with contextlib.suppress(FileNotFoundError, KeyError, sqlite3.OperationalError):
                    found = logged(home, run, "train/loss").items()
                    new = [(at, at_step) for at_step, (_, at) in found if at > started and at_step >= step]
                    if new:
                        return new[0][0] - started, new[0][1]
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def costs(home: Path, options: list[str], tokens_per_step: int, turns: int) -> dict[str, Any]:
    """What a checkpoint takes from training; seconds to the first step, fresh and resumed in turns."""
    options = [*options, "--trainer.devices", "1", "--cadence.log_every_steps", "1"]
    options += ["--cadence.tokens_per_step", str(tokens_per_step)]
    options += ["--checkpoints.every_tokens", str(CHECKPOINT_EVERY * tokens_per_step)]
    fit("costs", [*options, "--trainer.max_steps", str(STEPS)])
    times = {step: at for step, (_, at) in logged(home, "costs", "train/loss").items()}
    gaps = {step: times[step] - times[step - 1] for step in range(3, STEPS)}
    usual = statistics.median(gaps.values())
    # From each checkpoint to the next: copying holds training up, writing may slow it down.
    spans = [
        range(first + 1, first + CHECKPOINT_EVERY)
        for first in range(CHECKPOINT_EVERY, STEPS - 1, CHECKPOINT_EVERY)
    ]
    lost = [sum(gaps[step] - usual for step in span) for span in spans]
    files = [f for f in (home / "runs" / "costs" / "checkpoints").iterdir() if f.is_file()]
    figures: dict[str, Any] = {
        "usual_step": usual,
        "step_after_checkpoint": max(gaps[span[0]] for span in spans),
        "lost_per_checkpoint": max(lost),
        "checkpoint_bytes": max(f.stat().st_size for f in files),
    }
    if turns:
        longer = [*options, "--trainer.max_steps", str(2 * STEPS)]
        pairs = []
        for turn in range(turns):
            fresh, _ = until_step(home, f"fresh-{turn}", longer)
            resumed, step = until_step(home, "costs", [*longer, "--ckpt_path", "last"])
            # A step that an earlier turn has logged is not logged again.
            pairs.append((fresh, resumed - (step - STEPS - 1) * usual))
        figures["first_step_fresh_and_resumed"] = pairs
        figures["resume_costs"] = statistics.median(late - fresh for fresh, late in pairs)
    return figures


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="paper/medium-tpa")
    parser.add_argument("--strategies", nargs="*", default=["one"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens_per_step", type=int, default=131072)
    parser.add_argument("--costs", type=int, metavar="TOKENS", help="tokens of a step in the run for costs")
    parser.add_argument("--turns", type=int, default=3, help="of fresh and resumed starts (default 3)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("fit_options", nargs="*", help="after --")
    options = parser.parse_args()
    home = Path(os.environ.setdefault("T6_HOME", tempfile.mkdtemp(prefix="t6-bench-")))
    shared = ["--config", options.preset, *options.fit_options]
    figures: dict[str, Any] = {"preset": options.preset}
    for name in options.strategies:
        of_step = ["--cadence.tokens_per_step", str(options.tokens_per_step)]
        figures[name] = speed(home, name, shared + of_step, options.steps)
        print(name, json.dumps(figures[name]), flush=True)
    if options.costs:
        figures["costs"] = costs(home, shared, options.costs, options.turns)
        print("costs", json.dumps(figures["costs"]), flush=True)
    figures["environment"] = json.loads(next((home / "runs").glob("*/environment.json")).read_text())
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The loop of a sweep: take a queued trial, train it, keep what it found; then write the report."""

import json
import math
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sweeps import study as study_module
from sweeps.curves import draw
from sweeps.definition import Cell, Sweep
from sweeps.parent import ParentRun
from sweeps.plan import costs
from sweeps.report import markdown
from sweeps.study import OBJECTIVE
from sweeps.trials import INTERRUPTED, Signals, last_words, locked, run_trial
from t6_lightning.common.files import write_atomically
from t6_lightning.common.state import DamagedState, read_state
from t6_lightning.runs.folder import RunFolder

if TYPE_CHECKING:
    import optuna


def run(sweep: Sweep, storage: str | None, as_json: bool) -> int:
    """Run what is not finished yet and print the report (or its rows as JSON).

    Returns 0 when every trial is finished, 1 when some failed or still run on another machine, 75 after a
    signal: the same command goes on.
    Raises BadInput for an impossible cell, a storage that cannot be opened, or a sweep that already runs.
    """
    signals = Signals()
    with locked(sweep.folder, signals) as lock:
        study = study_module.open_study(sweep, storage)
        cell_costs = study_module.planned_costs(study)
        if cell_costs is None:
            cell_costs = costs(sweep)
            study_module.keep_plan(study, sweep, cell_costs)
        parent = ParentRun(study, sweep)
        cut_off = study_module.queue_unfinished(study, sweep)
        if cut_off:
            _say(f"{cut_off} trial(s) cut off by a kill go on from their checkpoints")
        _run_queue(study, sweep, parent.run_id, lock, signals)
        rows = study_module.rows(study)
        text = markdown(sweep, rows, cell_costs, study_module.failures(study))
        write_atomically(sweep.report_file, text)
        drawn = draw(sweep, rows, sweep.curves_file)
        unfinished = len(sweep.trials) - len(rows)
        stopped = bool(signals.received) and unfinished > 0
        files = [sweep.report_file, *([sweep.curves_file] if drawn else [])]
        parent.close(files, "KILLED" if stopped else "FAILED" if unfinished else "FINISHED")
    if stopped:
        _say(f"stopped with {unfinished} of {len(sweep.trials)} trials left; the same command goes on")
        return INTERRUPTED
    print(json.dumps(rows, indent=2) if as_json else text)
    _say("report: " + ", ".join(map(str, files)))
    if unfinished:
        _say(f"{unfinished} of {len(sweep.trials)} trials are left; the same command tries them again")
    return 1 if unfinished else 0


def _run_queue(study: "optuna.Study", sweep: Sweep, parent: str, lock: IO[str], signals: Signals) -> None:
    from optuna.trial import TrialState

    begun = time.monotonic()
    n_before, n_run, n_all = len(study_module.rows(study)), 0, len(sweep.trials)
    while not signals.received and (trial := study_module.next_trial(study, sweep)) is not None:
        cell_name, seed = study_module.key(trial)
        cell = next(cell for cell in sweep.cells if cell.name == cell_name)
        log = sweep.folder / f"{cell.name}-seed{seed}.log"
        elapsed = time.monotonic() - begun
        left = f", about {_minutes(elapsed / n_run * (n_all - n_before - n_run))} left" if n_run else ""
        label = f"[{n_before + n_run + 1}/{n_all}] {cell.name} seed {seed}"
        _say(f"{label} ({_minutes(elapsed)} elapsed{left}): {log}")
        arguments = [*sweep.fit_arguments(cell, seed), *_tracking(sweep, cell, parent)]
        code = run_trial(arguments, log, lock, signals)
        n_run += 1
        run_folder = RunFolder(sweep.run_name(cell, seed))
        summary, why = _result(run_folder, code, log)
        if summary:
            trial.set_user_attr("run", run_folder.name)
            trial.set_user_attr("summary", summary)
            study.tell(trial, summary[OBJECTIVE])
            _say(f"{label}: {OBJECTIVE} {summary[OBJECTIVE]:.4f}, {_minutes(summary['seconds'])}")
            continue
        # Below 0: the signal came before `fit` could handle it.
        stopped_with_sweep = signals.received and (code == INTERRUPTED or code < 0)
        if not stopped_with_sweep:
            trial.set_user_attr("error", why)
            _say(f"{label} FAILED: {why}")
        study.tell(trial, state=TrialState.FAIL)


def _result(run_folder: RunFolder, code: int, log: Path) -> tuple[dict[str, Any], str]:
    """The summary of a run that finished, or an empty one and the reason."""
    if code:
        return {}, f"exit code {code}: {last_words(log)}"
    try:
        summary = read_state(run_folder.summary_file, optional={OBJECTIVE: (int, float)})
    except (OSError, DamagedState) as error:
        return {}, str(error)
    if not math.isfinite(summary.get(OBJECTIVE, math.nan)):
        return {}, f"it ended without a finite {OBJECTIVE}"
    return summary, ""


def _tracking(sweep: Sweep, cell: Cell, parent: str) -> list[str]:
    tags = json.dumps({"sweep": sweep.name, "cell": cell.name})
    return [f"--tracking.parent={parent}", f"--tracking.tags={tags}"]


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

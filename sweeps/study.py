"""The state of a sweep: an Optuna study with one queued trial for each cell × seed."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sweeps.definition import Sweep
from sweeps.plan import Costs
from t6_lightning.common.databases import is_sqlite
from t6_lightning.common.errors import BadInput
from t6_lightning.common.secrets import hide_password, without_secrets

if TYPE_CHECKING:
    import optuna

OBJECTIVE = "val/bits_per_byte"
LOCK_SECONDS = 60  # two processes that start at once, or a slow disk, must not raise "database is locked"


def open_study(sweep: Sweep, storage: str | None) -> optuna.Study:
    """The study of this sweep, created when it is not there yet.

    Raises BadInput when the study was started from a file that said something else.
    """
    import optuna

    sweep.folder.mkdir(parents=True, exist_ok=True)
    with _storage(sweep, storage) as opened:
        study = optuna.create_study(
            study_name=sweep.name,
            storage=opened,
            direction="minimize",
            load_if_exists=True,
            sampler=_sampler(),
            pruner=optuna.pruners.NopPruner(),
        )
    known = study.user_attrs.get("identity", sweep.identity())
    if known != sweep.identity():
        changed = next(field for field, value in sweep.identity().items() if known.get(field) != value)
        raise BadInput(
            f"sweep {sweep.name!r} was started with other {changed}: only seeds may be added to a started "
            "sweep; give the file another name."
        )
    return study


def planned_costs(study: optuna.Study) -> Costs | None:
    """What `keep_plan` kept; None for a study that has no plan yet."""
    return study.user_attrs.get("costs")


def keep_plan(study: optuna.Study, sweep: Sweep, cell_costs: Costs) -> None:
    """From now on the study belongs to this plan: a file that says something else is refused."""
    study.set_user_attr("identity", sweep.identity())
    study.set_user_attr("costs", cell_costs)


def load_study(sweep: Sweep, storage: str | None) -> optuna.Study:
    """The study of a sweep that was started before; BadInput when it was not."""
    import optuna

    file = sweep.folder.with_name(f"{sweep.name}.db")
    try:
        if storage is None and not file.exists():
            raise KeyError(sweep.name)
        with _storage(sweep, storage) as opened:
            return optuna.load_study(study_name=sweep.name, storage=opened, sampler=_sampler())
    except KeyError:
        where = hide_password(storage or sweep.default_storage)
        raise BadInput(
            f"sweep {sweep.name!r} was not started yet in {where}; start it with `python -m sweeps run`."
        ) from None


def queue_unfinished(study: optuna.Study, sweep: Sweep) -> int:
    """Queue every cell × seed that is not finished nor running elsewhere; returns how many had been cut off.

    The caller holds the sweep's lock, so nothing on this machine is running it: a trial that this machine
    left RUNNING was killed. Its run folder lets it go on from its own checkpoint. Trials running on other
    machines that share the storage are theirs.
    """
    from optuna.trial import TrialState

    cut_off = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get("host") in (None, platform.node()):
            study.tell(trial.number, state=TrialState.FAIL)
            cut_off += 1
    pending = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
    there = {key(trial) for trial in study.get_trials(deepcopy=False, states=pending)}
    for cell, seed in sweep.trials:
        if (cell.name, seed) not in there:
            params = {"cell": cell.name, "seed": seed}
            study.enqueue_trial(params, user_attrs=params)
    return cut_off


def next_trial(study: optuna.Study, sweep: Sweep) -> optuna.Trial | None:
    """Take the next queued trial, marked as running on this machine; None when the queue is empty."""
    from optuna.trial import TrialState

    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        trial = study.ask()
        if "cell" not in trial.user_attrs:  # another machine took the last one between the two calls
            study.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_user_attr("host", platform.node())
        trial.suggest_categorical("cell", [cell.name for cell in sweep.cells])
        trial.suggest_int("seed", 0, 2**32 - 1)
        return trial
    return None


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """One flat dict for each finished trial: cell, seed, run, and the run's summary; in the study's order."""
    from optuna.trial import TrialState

    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        {"cell": trial.user_attrs["cell"], "seed": trial.user_attrs["seed"], "run": trial.user_attrs["run"]}
        | trial.user_attrs["summary"]
        for trial in finished
    ]


def failures(study: optuna.Study) -> dict[tuple[str, int], str]:
    """(cell, seed) to sentence, for the trials whose last attempt failed."""
    from optuna.trial import TrialState

    last = {key(trial): trial for trial in study.get_trials(deepcopy=False)}
    return {
        which: trial.user_attrs["error"]
        for which, trial in last.items()
        if trial.state == TrialState.FAIL and "error" in trial.user_attrs
    }


def key(trial: Any) -> tuple[str, int]:
    """(cell name, seed) of an Optuna trial."""
    return trial.user_attrs.get("cell", ""), trial.user_attrs.get("seed", -1)


def _sampler() -> optuna.samplers.BaseSampler:
    import optuna

    # Never asked for a value: each trial is queued with its own. Optuna's default would be TPE.
    return optuna.samplers.RandomSampler(seed=0)


@contextmanager
def _storage(sweep: Sweep, storage: str | None) -> Iterator[optuna.storages.RDBStorage]:
    """Open the storage; errors of the database inside the block become BadInput, without the password."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage or sweep.default_storage
    arguments = {"connect_args": {"timeout": LOCK_SECONDS}} if is_sqlite(url) else {}
    try:
        yield optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = without_secrets(str(getattr(error, "orig", None) or error).splitlines()[0], url)
        raise BadInput(
            f"--storage {hide_password(url)!r} cannot be opened ({reason}); allowed are sqlite:///FILE and "
            "postgresql+psycopg://USER:PASSWORD@HOST/NAME."
        ) from None

"""python -m sweeps run|status|report FILE, and list."""

import json
import sys

from sweeps import study as study_module
from sweeps.definition import Sweep, load_sweep
from t6_lightning.common.arguments import Parser
from t6_lightning.common.databases import sqlite_url
from t6_lightning.common.errors import BadInput
from t6_lightning.common.home import t6_home


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2 for bad input, said in one sentence on stderr)."""
    try:
        given = _parser().parse_args(argv)
        if given.command == "list":
            return list_sweeps()
        sweep = load_sweep(given.file)
        if given.command == "run" and given.dry_run:
            return dry_run(sweep, given.json)
        if given.command == "run":
            from sweeps.run import run

            return run(sweep, given.storage, given.json)
        if given.command == "status":
            return status(sweep, given.storage)
        return report(sweep, given.storage, given.json)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def dry_run(sweep: Sweep, as_json: bool) -> int:
    """Print what the sweep would cost, and start nothing."""
    from sweeps.plan import costs, describe

    found = costs(sweep)
    print(json.dumps(found, indent=2) if as_json else describe(sweep, found))
    return 0


def status(sweep: Sweep, storage: str | None) -> int:
    """Print a line for each trial of the sweep: finished with its figure, running, waiting or failed."""
    study = study_module.load_study(sweep, storage)
    states = {study_module.key(trial): trial for trial in study.get_trials(deepcopy=False)}
    failed = study_module.failures(study)
    for cell, seed in sweep.trials:
        trial = states.get((cell.name, seed))
        if trial is None:
            state = "not queued"
        elif trial.value is not None:
            state = f"finished, {study_module.OBJECTIVE} {trial.value:.4f}"
        elif (cell.name, seed) in failed:
            state = f"failed: {failed[cell.name, seed]}"
        else:
            state = {"FAIL": "stopped, goes on with the next run"}.get(
                trial.state.name, trial.state.name.lower()
            )
        print(f"{sweep.run_name(cell, seed)}: {state}")
    return 0


def report(sweep: Sweep, storage: str | None, as_json: bool) -> int:
    """Print the table of what is finished, or its rows as JSON."""
    from sweeps.report import markdown

    study = study_module.load_study(sweep, storage)
    rows = study_module.rows(study)
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    cell_costs = study.user_attrs.get("costs")
    if cell_costs is None:
        raise BadInput(f"sweep {sweep.name!r} was stopped before its plan was made; start it again.")
    print(markdown(sweep, rows, cell_costs, study_module.failures(study)))
    return 0


def list_sweeps() -> int:
    """Print the sweeps of T6_HOME and how far each is."""
    import optuna

    files = sorted((t6_home() / "sweeps").glob("*.db"))
    if not files:
        print(f"No sweep was started in {t6_home()} yet.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for file in files:
        for study in optuna.study.get_all_study_summaries(sqlite_url(file), include_best_trial=False):
            cells = study.user_attrs.get("identity", {}).get("cells", {})
            print(
                f"{study.study_name}: {len(cells)} cells, {study.n_trials} trials started or queued, {file}"
            )
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m sweeps", description="Answer a question by many runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,status,report,list}")
    run = commands.add_parser(
        "run", help="train what is not finished yet, then report; started again, it goes on"
    )
    state = commands.add_parser("status", help="the state of each trial")
    table = commands.add_parser("report", help="the table of what is finished")
    commands.add_parser("list", help="the sweeps of T6_HOME")
    for command in (run, state, table):
        command.add_argument("file", metavar="FILE", help="Python file that builds a Sweep")
        command.add_argument(
            "--storage",
            metavar="URL",
            help="database of the study (default: sqlite:///T6_HOME/sweeps/NAME.db)",
        )
    run.add_argument(
        "--dry-run", action="store_true", help="print trials, parameters and tokens, start nothing"
    )
    for command in (run, table):
        command.add_argument("--json", action="store_true", help="print the raw figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())

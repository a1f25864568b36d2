"""What a sweep will cost: every cell is parsed and built as `fit` would, before anything is spent."""

import logging
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from sweeps.definition import Sweep
from t6_lightning.common.errors import BadInput

Costs = dict[str, dict[str, int]]


def costs(sweep: Sweep) -> Costs:
    """For each cell: n_heads, n_parameters, cache_elements (one token, all layers) and tokens of one trial.

    Raises BadInput, naming the cell, for an override that `fit` does not know or a model it refuses.
    """
    # In a process of its own: building a trainer may claim a GPU, which would then be kept from the trials.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_ignore_ctrl_c) as pool:
        seed = sweep.seeds[0]
        answers = list(pool.map(_cost, [sweep.fit_arguments(cell, seed) for cell in sweep.cells]))
    found: Costs = {}
    for cell, answer in zip(sweep.cells, answers, strict=True):
        if isinstance(answer, str):
            raise BadInput(f"cell {cell.name!r} of sweep {sweep.name!r}: {answer}")
        found[cell.name] = answer
    return found


def describe(sweep: Sweep, cell_costs: Costs) -> str:
    """The plan as text: trials, tokens, and a line for each cell."""
    tokens = next(iter(cell_costs.values()))["tokens"]
    n_trials = len(sweep.trials)
    lines = [
        f"{sweep.name}: {n_trials} trials = {len(sweep.cells)} cells x {len(sweep.seeds)} seeds "
        f"({', '.join(map(str, sweep.seeds))})",
        f"each {sweep.max_steps:,} steps = {tokens:,} tokens of {sweep.config}; "
        f"{tokens * n_trials:,} tokens in all",
        "",
        "| cell | heads | parameters | of target | KV elements per token |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, cost in cell_costs.items():
        share = share_of_target(cost["n_parameters"], sweep)
        figures = [str(cost["n_heads"]), f"{cost['n_parameters']:,}", share, f"{cost['cache_elements']:,}"]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def share_of_target(n_parameters: float, sweep: Sweep) -> str:
    """Parameters in percent of the sweep's target; a dash when it has none."""
    return f"{100 * n_parameters / sweep.target_parameters:.2f} %" if sweep.target_parameters else "–"


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides


def _cost(arguments: list[str]) -> dict[str, int] | str:
    """Costs of one cell, or the sentence that says why it is impossible. Runs in the pool's process."""
    from t6_lightning.cli.configuration import T6CLI, with_config_files
    from t6_lightning.runs.fit import plan_of

    logging.disable(logging.WARNING)  # Lightning announces every trainer
    command, *options = arguments
    try:
        cli = T6CLI(command, with_config_files(command, options))
        plan = plan_of(cli.model, cli.datamodule, cli.trainer)
    except BadInput as error:
        return str(error)
    net: Any = cli.model.config
    return {
        "n_heads": net.attention.n_heads,
        "n_parameters": plan.n_parameters,
        "cache_elements": net.cache_bytes_per_token(bytes_per_element=1),
        "tokens": plan.tokens,
    }

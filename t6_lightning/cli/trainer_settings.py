"""Which of Lightning's trainer settings a run may have: what something else here decides is refused, not ignored."""

from __future__ import annotations

import inspect
import os
from typing import Any

from lightning.pytorch import Trainer

from t6_lightning.common.errors import BadInput, require
from t6_lightning.distributed import launch

DEFAULTS = {
    "max_epochs": -1,  # steps end a run, unless said otherwise
    "max_steps": 1000,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data deals itself out to ranks
}

_WHOLE_EPOCHS = "tokens per step and exact resumption need whole epochs; a Trainer of your own takes it"
_VALIDATION = "data.val_tokens says on how much is validated"
INSTEAD = {
    "accumulate_grad_batches": "cadence.tokens_per_step decides it",
    "val_check_interval": "cadence.validate_every_tokens decides it",
    "check_val_every_n_epoch": "cadence.validate_every_tokens decides it",
    "log_every_n_steps": "cadence.log_every_steps decides it",
    "limit_train_batches": _WHOLE_EPOCHS,
    "overfit_batches": _WHOLE_EPOCHS,
    "fast_dev_run": "--trainer.max_steps 2 makes a short run, --dry_run none",
    "limit_val_batches": _VALIDATION,
    "limit_test_batches": _VALIDATION,
    "limit_predict_batches": _VALIDATION,
    "reload_dataloaders_every_n_epochs": "one loader serves the whole run",
    "use_distributed_sampler": "the data deals itself out to ranks",
    "enable_checkpointing": "checkpoints.* decide it",
    "barebones": "a run is logged and saved; `bench train` times the model alone",
}
"""What would be overwritten or would change what steps and tokens mean -> what decides instead."""

MOST_SEED = 2**32 - 1
MOST_DEVICES = 65_536


def check(trainer: Any, seed: Any) -> None:
    """Refuse settings that a run cannot have.

    Raises:
        BadInput: one of `INSTEAD` is set, or a value is out of its range.
    """
    usual = {name: value.default for name, value in inspect.signature(Trainer).parameters.items()} | DEFAULTS
    for name, instead in INSTEAD.items():
        require(trainer[name] == usual[name], f"trainer.{name}", trainer[name], f"leave it out, as {instead}")
    by_epochs = trainer.max_epochs is not None and trainer.max_epochs >= 1
    require(
        by_epochs or trainer.max_epochs == -1,
        "trainer.max_epochs",
        trainer.max_epochs,
        "it must be at least 1, or -1 where trainer.max_steps alone ends the run",
    )
    ends = trainer.max_steps >= 1 or (trainer.max_steps == -1 and by_epochs)
    or_epochs = ", or -1 beside trainer.max_epochs"
    require(ends, "trainer.max_steps", trainer.max_steps, f"it must be at least 1{or_epochs}")
    clip = trainer.gradient_clip_val
    require(
        clip is None or clip > 0,
        "trainer.gradient_clip_val",
        clip,
        "it must be above 0, or null for no clipping",
    )
    way = trainer.gradient_clip_algorithm
    require(
        way in (None, "norm"), "trainer.gradient_clip_algorithm", way, "gradients are clipped by their norm"
    )
    number = str(trainer.devices)
    is_count = number.lstrip("-").isdecimal()
    require(
        not is_count or int(number) >= 1,
        "trainer.devices",
        trainer.devices,
        "it must be at least 1, `auto` for all, or a list",
    )
    for name in ("devices", "num_nodes"):
        given = str(trainer[name])
        fits = not given.isdecimal() or int(given) <= MOST_DEVICES
        require(fits, f"trainer.{name}", trainer[name], f"it must be at most {MOST_DEVICES:,}")
    fits = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= MOST_SEED
    require(fits, "seed_everything", seed, f"it must be a whole number from 0 to {MOST_SEED}")
    if trainer.num_nodes > 1 and launch.started_from_outside() is None and "MASTER_ADDR" not in os.environ:
        raise BadInput(
            f"trainer.num_nodes={trainer.num_nodes} is not possible: nothing has started processes on other nodes; "
            "start the command there with torchrun or srun"
        )

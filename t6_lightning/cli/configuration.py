"""The configuration of fit, validate, test and predict: presets, YAML and flags, through Lightning's CLI."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
import yaml

# Lightning calls methods that jsonargparse has renamed; its users can do nothing about it.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import jsonargparse
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from datamodules import DATA_MODULES, corpora  # noqa: F401  (corpora: so that short names of data classes are known)
from datamodules.base import TokenData
from t6_lightning.checkpoint.io import VerifiedCheckpointIO
from t6_lightning.cli import trainer_settings
from t6_lightning.cli.refusals import allows_null, blamed, one_sentence, words
from t6_lightning.common.errors import BadInput, first_line, reason_in, shown
from t6_lightning.distributed import launch
from t6_lightning.model.backend import check_backend
from t6_lightning.presets import RECIPES, config_file, preset_label, preset_names, recipe_table, settings
from t6_lightning.presets.reading import Unbounded, plain_values
from t6_lightning.runs.fit import leaves, plan_of
from t6_lightning.runs.folder import RunFolder, new_run_name, run_named_by
from t6_lightning.runs.plan import Plan
from t6_lightning.runs.tracking import MLflowTracking
from t6_lightning.training.callbacks.cadence import Cadence
from t6_lightning.training.callbacks.checkpoints import Checkpoints
from t6_lightning.training.callbacks.monitor import Monitor
from t6_lightning.training.callbacks.progress import TrainingProgress
from t6_lightning.training.callbacks.seeds import StepSeeds
from t6_lightning.training.callbacks.spikes import SpikeGuard
from t6_lightning.training.module import T6Module


class TrainingProfiler(PyTorchProfiler):
    """PyTorch's profiler over three micro-batches of training: Lightning's table is of validation, the last to come."""

    STEP_FUNCTIONS: ClassVar = {"training_step"}


PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": TrainingProfiler,
}

LINKED = {"context": "--model.net.context", "seed": "--seed_everything"}
"""Settings of the data that follow others."""

MACHINE = ("trainer.devices", "trainer.num_nodes")
"""What a run is started on; a run that goes on may find another number of them."""


_load_value = jsonargparse.get_loader("yaml")


def _load_bounded(text: str) -> Any:
    """A value of the command line, which is YAML too: within the bounds of files, or it counts as text."""
    plain_values(text)
    return _load_value(text)


jsonargparse.set_loader("yaml", _load_bounded, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Reads files with what they extend worked in, and says what is wrong in one sentence."""

    def __init__(self, *args: Any, recipe: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """jsonargparse's reading of a configuration file: here as text, so that nothing is written to disk."""
        found = settings(Path(path), self.recipe)
        try:
            self._check_groups(found)
            return self.parse_string(yaml.safe_dump(found, sort_keys=False), path, *args, **kwargs)
        except BadInput as error:
            label = preset_label(Path(path))
            raise BadInput(f"{error} (in {label if label in preset_names() else path})") from error

    def _check_groups(self, found: dict[str, Any]) -> None:
        """Refuse anything but a mapping where settings of a group are expected. Raises BadInput."""
        dests = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        for group in sorted({dest[:i] for dest in dests for i in range(len(dest)) if dest[i] == "."}):
            value: Any = found
            for name in group.split("."):
                value = value.get(name, {}) if isinstance(value, dict) else {}
            if not isinstance(value, dict):
                inside = [dest for dest in dests if dest.startswith(f"{group}.")]
                holds = f"it must be a mapping of settings such as {inside[0].removeprefix(f'{group}.')}"
                raise BadInput(f"{group}={shown(value)} is not possible: {holds}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise BadInput(one_sentence(message, self)) from ex


@dataclass(frozen=True)
class CheckpointOptions:
    """When checkpoints are written, which are kept, and how.

    Attributes:
        every_tokens: training tokens between checkpoints.
        keep: newest checkpoints kept; older ones are removed once a newer one is safely written.
        asynchronous: training goes on while a copy of the state is written; it takes that much memory more.
        sharded: with the strategy fsdp2, every rank writes its own part, and a checkpoint is a folder.
    """

    every_tokens: int = 1_000_000
    keep: int = 2
    asynchronous: bool = True
    sharded: bool = False


class T6CLI(LightningCLI):
    """One parser per command; parses and builds, runs nothing."""

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        self.started = time.monotonic()
        # Lightning warns when arguments are passed while sys.argv has some: they are the same ones.
        argv, sys.argv = sys.argv, sys.argv[:1]
        try:
            super().__init__(
                T6Module,
                TokenData,
                subclass_mode_data=True,
                save_config_callback=None,
                trainer_defaults=dict(trainer_settings.DEFAULTS),
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs={
                    "prog": f"python -m t6_lightning {command}",
                    "description": __doc__,
                    "recipe": _value_of("--recipe", arguments),
                },
                args=arguments,
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        finally:
            sys.argv = argv
        check_backend(self.model.config, self.trainer.strategy.root_device)
        self.plan: Plan | None = None
        """What a run that counts steps costs; of one that counts epochs only its data can tell."""
        if command == "fit":
            self.datamodule.check_epochs(self.trainer)
        if command == "fit" and not self.counts_epochs:
            self.plan = plan_of(self.model, self.datamodule, self.trainer)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"data": {"class_path": "datamodules.PythonDocs"}})
        parser.link_arguments("model.net.context", "data.init_args.context")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_class_arguments(Cadence, "cadence")
        parser.add_class_arguments(CheckpointOptions, "checkpoints")
        parser.add_class_arguments(SpikeGuard, "spikes")
        parser.add_class_arguments(MLflowTracking, "tracking", skip={"run"}, instantiate=False)
        parser.add_argument(
            "--recipe",
            type=Literal["paper", "released"],
            default=RECIPES[0],
            help="Defaults of what the paper and its released trainer have differently.",
        )
        parser.add_argument("--run", type=str | None, default=None, help="Name of the run's folder.")
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint file, or `last`: the run's newest good one.",
        )
        if self.command == "fit":
            parser.add_argument(
                "--init_from",
                type=str | None,
                default=None,
                help="Checkpoint to take weights from, nothing else.",
            )
            parser.add_argument(
                "--dry_run", action="store_true", help="Print what the run will cost, and stop."
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        for action in parser._actions:
            hint, value = getattr(action, "_typehint", None), self.config.get(action.dest)
            missing = value is None and action.default is not None and not allows_null(hint)
            if hint is not None and missing and action.dest in self.config:
                raise BadInput(f"{action.dest}=None is not possible: it must be {words(hint)}")
        trainer_settings.check(self.config.trainer, self.config.seed_everything)

    def before_instantiate_classes(self) -> None:
        trainer = self.config.trainer
        launch.follow_launcher(trainer)
        if trainer.precision is None:
            on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
            trainer.precision = "bf16-mixed" if on_gpu else "32-true"

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except BadInput:
            raise
        except Exception as error:
            # jsonargparse hides what a data module says of its settings among the types that it tried.
            reason = reason_in(str(error))
            if reason != " ".join(str(error).split()):
                raise BadInput(f"data.{reason}") from error
            raise BadInput(f"{type(error).__name__}: {first_line(error)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        built: Any = self.config_init
        options: CheckpointOptions = built.checkpoints
        config = {**built.trainer, **kwargs, "plugins": [VerifiedCheckpointIO(options.asynchronous)]}
        if self.command == "fit":
            run = self.run
            # In this order: what is decided of a step, then what is logged of it; what saves comes last by itself.
            own: list[Callback] = [
                StepSeeds(int(self.config.seed_everything)),
                built.cadence,
                built.spikes,
                Monitor(),
                TrainingProgress(),
                Checkpoints(options.every_tokens, options.keep, lambda: run.checkpoints),
            ]
            asked = _as_list(config["callbacks"])
            if any(isinstance(callback, ProgressBar) for callback in asked):
                own = [callback for callback in own if not isinstance(callback, ProgressBar)]
            config["callbacks"] = [*own, *asked]
            tracking = MLflowTracking(**vars(self.config.tracking), run=run)
            config["logger"] = [tracking, *_as_list(config["logger"])]
            config["profiler"] = _profiler(config["profiler"])
        else:
            config |= {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
            config["profiler"] = None  # a run's configuration may have one, of its training
        return launch.build_trainer(
            lambda config: self._instantiate_trainer(config, []), config, options.sharded
        )

    @cached_property
    def run(self) -> RunFolder:
        """The run that is trained: the one that is named, that of the checkpoint, or a new one."""
        name, ckpt_path = self.config.run, self.config.ckpt_path
        if name is not None:
            return RunFolder(name)
        preset = self.preset

        def choose() -> str:
            if ckpt_path is None:
                return new_run_name(preset)
            run = run_named_by(ckpt_path, None)
            return new_run_name("from-checkpoint") if run is None else run.name

        return RunFolder(choose)

    @property
    def counts_epochs(self) -> bool:
        """Whether the data must be read to tell how many steps the run has."""
        return self.config.trainer.max_epochs != -1

    @property
    def preset(self) -> str:
        """The name that the configuration goes by: the last of its files."""
        files = [Path(str(file)) for file in self.config.get("config") or []]
        return preset_label(files[-1]) if files else "custom"

    @property
    def recipe_settings(self) -> dict[str, Any]:
        """What the recipe decides in these files, by the names of flags, with the values that the run has."""
        recipe = self.config.recipe
        table = recipe_table(recipe)
        decided = (
            {name for name, _ in leaves(settings(table)) if not name.endswith("class_path")}
            if table
            else set()
        )
        for path in self.config.get("config") or []:
            usual = dict(leaves(settings(Path(str(path)), RECIPES[0])))
            found = leaves(settings(Path(str(path)), recipe))
            decided |= {name for name, value in found if name not in usual or usual[name] != value}
        resolved = {name: value for name, value in leaves(self.settings) if name != "recipe"}
        return {
            name.replace("init_args.", "").removesuffix(".class_path"): value
            for name, value in resolved.items()
            if name in decided
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration without what names this one call, as `--config` reads it back."""
        settings = self._plain(self.config)
        # Said in the run's configuration, these stay the same on another number of ranks.
        cadence, data, ranks = settings["cadence"], self.datamodule, self.trainer.world_size
        if cadence["tokens_per_step"] is None:
            cadence["tokens_per_step"] = data.batch_size * data.context * ranks
        if settings["model"]["summed_losses"] is None:
            micro_batches = Cadence(cadence["tokens_per_step"]).micro_batches
            settings["model"]["summed_losses"] = micro_batches(data.batch_size, data.context, ranks)
        return settings

    def as_now(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A run's configuration as this version reads it: what it does not have yet has its default."""
        try:
            return self._plain(self.parser.parse_object(settings))
        except ValueError:  # no configuration of this version: it differs, whatever is read
            return settings

    def _plain(self, config: Any) -> dict[str, Any]:
        config = config.clone()
        for name in ("config", "run", "ckpt_path", "init_from", "dry_run", *MACHINE):
            config.pop(name, None)
        return yaml.safe_load(self.parser.dump(config, skip_none=False))


def _profiler(chosen: Profiler | str | None) -> Profiler | None:
    """The profiler, set to write its table into the run's folder: Lightning would log it where nobody looks."""
    if isinstance(chosen, str):
        if chosen not in PROFILERS:
            names = ", ".join(PROFILERS)
            raise BadInput(f"trainer.profiler={chosen!r} is not possible: choose one of {names}, or a class")
        chosen = PROFILERS[chosen]()
    if chosen is not None and not chosen.filename:
        chosen.filename = "profile"
    return chosen


def _as_list(value: Any) -> list[Any]:
    if value in (None, True, False):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _value_of(option: str, arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(option + "="):
            return argument.partition("=")[2]
    return None


def with_config_files(command: str, arguments: list[str]) -> list[str]:
    """Replace preset names by their files; without `--config`, take the checkpoint's run, or `quickstart`.

    Files come first, in their order: flags win over them wherever they stand on the command line. Before them all
    comes the table of the recipe, which is the one of `--recipe`, or the last that a file states.
    """
    files: list[Path] = []
    flags: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        _check_word(word)
        field = option.removeprefix("--data.").removeprefix("init_args.")
        if option.startswith("--data.") and field in LINKED:
            raise BadInput(f"{option} is not possible: {LINKED[field]} sets it")
        if option not in ("--config", "-c"):
            flags.append(word)
            continue
        name = value if equals else next(words, None)
        if name is None:
            raise BadInput("--config needs a preset or a YAML file")
        files.append(config_file(name))
    if not files and {"-h", "--help"} & set(arguments):
        return flags
    files = files or [_default_config(arguments)]
    recipe = _value_of("--recipe", flags)
    if recipe is None:
        stated = [found["recipe"] for found in map(settings, files) if "recipe" in found]
        recipe = stated[-1] if stated else RECIPES[0]
        flags.append(f"--recipe={recipe}")
    table = recipe_table(recipe)
    return [*(f"--config={file}" for file in ([table] if table else []) + files), *flags]


def _check_word(word: str) -> None:
    """Refuse an option's value that jsonargparse would read, or show, for ever. Raises BadInput."""
    try:
        word.encode()
        plain_values(word.partition("=")[2] if word.startswith("--") else word)
    except UnicodeEncodeError as error:
        raise BadInput(f"{shown(word)} is not possible: it is not valid UTF-8") from error
    except Unbounded as error:
        raise BadInput(f"{shown(word)} is not possible: {error}") from error
    except yaml.YAMLError:
        return  # it is text


def _default_config(arguments: list[str]) -> Path:
    ckpt_path = _value_of("--ckpt_path", arguments)
    if ckpt_path is not None:
        run = run_named_by(ckpt_path, _value_of("--run", arguments))
        if run is not None and run.settings is not None:  # which checks them
            return run.config_file
    return config_file("quickstart")


def build(arguments: list[str]) -> T6CLI:
    """Parse and build what a command line says; it begins with the command."""
    # Lightning sets its level at import; devices that are not there and tips are no news.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("kernels").setLevel(logging.INFO)  # which backend training runs on
    command, *rest = arguments
    rest = with_config_files(command, rest)
    try:
        return T6CLI(command, rest)
    except Exception as error:
        raise blamed(error, rest, lambda fewer: T6CLI(command, fewer)) from error

"""What a checkpoint of unknown origin holds is checked before use: its file, its values, its weights.

No code is run by reading: `torch.load(weights_only=True)` sees to that. What it lets through may still be damaged,
endless, of any size, or another model's.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from datamodules.tokenizer import RAW_BYTES, Tokenizer
from t6_lightning.checkpoint.shards import Pieces
from t6_lightning.common.errors import BadInput, first_line
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6

MOST_VALUES = 300_000
"""Containers and plain values in a checkpoint; one of 100 layers has about 10,000."""
DEEPEST = 50
"""Containers in containers; Lightning's own have about 8."""

FORM: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "callbacks": dict,
    "loops": dict,
    "global_step": int,
    "epoch": int,
    "tokenizer": str,
}
"""Types of what a checkpoint of ours may hold."""


def archive_damage(file: Path, contents: bool) -> str | None:
    """What is wrong with a file of `torch.save`, which is a zip archive without compression; None for nothing.

    Args:
        file: its path.
        contents: compare every entry with its CRC-32 too, which reads the whole file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "its entries are compressed, and torch.save compresses nothing"
            if sum(entry.file_size for entry in entries) > file.stat().st_size:
                return "its entries claim more bytes than the file has"
            bad = archive.testzip() if contents else None
    except Exception as error:  # zipfile raises errors of many kinds for damage
        return first_line(error)
    return None if bad is None else f"the checksum of its entry {bad[:80]!r} is wrong"


def value_damage(state: Any) -> str | None:
    """Why plain values cannot be walked through or used: endless, too many, or tensors without memory of their own."""
    left = MOST_VALUES
    waiting: list[tuple[Any, int]] = [(state, 0)]
    while waiting:
        value, depth = waiting.pop()
        inside: list[Any] = []
        if isinstance(value, torch.Tensor):
            if reason := _tensor_damage(value):
                return reason
        elif isinstance(value, Mapping):
            inside = [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            inside = list(value)
        elif isinstance(value, Pieces):
            inside = value.pieces
        elif isinstance(value, int) and abs(value) >= 2**63:
            return "it holds an integer of more than 64 bits"
        left -= len(inside)
        if left < 0 or depth > DEEPEST:
            return "its values refer to themselves, or are nested too deep or too many"
        waiting += [(element, depth + 1) for element in inside]
    return None


def _tensor_damage(tensor: torch.Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "it holds a tensor that is not a plain one"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"a tensor of shape {tuple(tensor.shape)} claims more bytes than the file has for it"
    return None


def form_damage(state: Any) -> str | None:
    """Why values are no checkpoint of a T6Module, as far as can be told without its model."""
    if not isinstance(state, dict) or "state_dict" not in state or "hyper_parameters" not in state:
        return "it lacks the model's configuration"
    for name, kind in FORM.items():
        if name == "tokenizer" and state.get(name) is None:
            continue  # imported without one
        if name in state and (not isinstance(state[name], kind) or isinstance(state[name], bool)):
            return f"its {name} is of type {type(state[name]).__name__}, and must be {kind.__name__}"
    if not isinstance(state["hyper_parameters"].get("net"), dict):
        return "it lacks the model's configuration"
    if not isinstance(state["hyper_parameters"].get("confine_to_documents", False), bool):
        return "its confine_to_documents is neither true nor false"
    for name, value in state["state_dict"].items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor | Pieces)):
            return f"its weight {str(name)[:80]!r} is not a tensor"
    for name, value in state.get("callbacks", {}).items():
        if not isinstance(value, dict):
            return f"its state of the callback {str(name)[:80]!r} is no mapping"
    if reason := _count_damage(state.get("loops", {}), "loops"):
        return reason
    if state.get("global_step", 0) < 0 or state.get("epoch", 0) < 0:
        return "its global_step or epoch is below 0"
    return None


COUNTS = ("ready", "started", "processed", "completed")
"""What Lightning's loops call their counters."""


def _count_damage(loops: Mapping[str, Any], named: str) -> str | None:
    """Which counter of Lightning's loops is none; every command that reads a checkpoint takes them over."""
    for name, value in loops.items():
        if isinstance(value, Mapping):
            if reason := _count_damage(value, f"{named}.{name}"):
                return reason
        elif name in COUNTS and (type(value) is not int or value < 0):
            return f"its {named}.{name} is {str(value)[:80]!r}, and no count"
    return None


def config_of(state: Mapping[str, Any], named: str) -> T6Config:
    """The model's configuration. Raises BadInput: an impossible one, or a model of other weights than there are."""
    try:
        config = T6Config.from_dict(state["hyper_parameters"]["net"])
        n_parameters = config.n_parameters()
    except BadInput as error:
        raise BadInput(f"{named}: {error}") from error
    except Exception as error:  # values of any kind
        raise BadInput(f"{named} describes no model: {first_line(error)}") from error
    weights = state["state_dict"]
    numbers = sum(value.shape.numel() for value in weights.values())
    if config.n_layers > len(weights) or n_parameters > numbers:
        raise BadInput(
            f"{named} describes a model of {n_parameters:,} parameters in {config.n_layers:,} layers and holds "
            f"{numbers:,} in {len(weights):,} tensors"
        )
    return config


def check_weights(weights: Mapping[str, Any], config: T6Config, named: str) -> None:
    """Compare weights with those that the model has.

    Args:
        weights: `net.NAME` -> tensor, or pieces of one.
        config: of the model.
        named: what holds them, for messages.

    Raises:
        BadInput: missing, extra or misshapen ones, or a dtype of no weights; non-finite ones where they are tensors.
    """
    with torch.device("meta"):
        expected = {f"net.{name}": value for name, value in T6(config).state_dict().items()}
    for name in expected:
        if name not in weights:
            raise BadInput(f"{named} lacks the weight {name}, which its model has")
    for name, value in weights.items():
        if not name.startswith("net."):  # a module of the user's own beside the model
            continue
        if name not in expected:
            raise BadInput(f"{named} holds {name[:80]!r}, which is no weight of its model")
        if value.shape != expected[name].shape:
            there, here = tuple(value.shape), tuple(expected[name].shape)
            raise BadInput(f"{named}: the weight {name} has the shape {there}, and its model {here}")
        if not value.dtype.is_floating_point:
            raise BadInput(f"{named}: the weight {name} is of {value.dtype}; allowed: floating-point dtypes")
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise BadInput(f"{named}: the weight {name} holds values that are not finite")


def check_optimizer(state: Mapping[str, Any], named: str) -> None:
    """Compare AdamW's states with the weights; those of other optimizers are left to them.

    Raises:
        BadInput: states of some parameters only, other shapes than those of the weights, or none of an optimizer.
    """
    damaged = f"{named}: the states of its optimizer are damaged"
    try:
        shapes = [tuple(value.shape) for value in state["state_dict"].values()]
        for one in state["optimizer_states"]:
            states, groups = one["state"], one["param_groups"]
            if not any("exp_avg" in values for values in states.values()):
                continue
            parameters = [index for group in groups for index in group["params"]]
            if sorted(parameters) != sorted(states):
                raise BadInput(f"{damaged}: they are not of its {len(parameters)} parameters")
            for index, values in states.items():
                of_moments = {tuple(values[name].shape) for name in ("exp_avg", "exp_avg_sq")}
                if len(of_moments) > 1 or not of_moments <= set(shapes):
                    raise BadInput(f"{damaged}: the moments of parameter {index} have the shape of no weight")
                shapes.remove(of_moments.pop())
                if not float(values["step"]) >= 0:
                    raise BadInput(f"{damaged}: parameter {index} has taken {values['step']} steps")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{damaged}: {first_line(error)}") from error


def other_form(saved: Any, present: Any, named: str) -> str | None:
    """Where a saved state differs in its types from the present one of the same object, or a number (they are counts
    and settings) is below 0 or NaN; None where neither is so.

    Names that only one of them has are passed over: versions differ in them.
    """
    if saved is None or present is None:
        return None
    if isinstance(present, Mapping):
        if not isinstance(saved, Mapping):
            return f"{named} is of type {type(saved).__name__}, and must be a mapping"
        inside = (
            other_form(saved[name], present[name], f"{named}.{name}") for name in present if name in saved
        )
        return next(filter(None, inside), None)
    for kinds in ((bool,), (int, float), (str,), (list, tuple), (torch.Tensor,)):
        if isinstance(present, kinds) and not isinstance(saved, kinds):
            return f"{named} is of type {type(saved).__name__}, and must be {type(present).__name__}"
        if isinstance(present, kinds):
            break
    if isinstance(saved, int | float) and not saved >= 0:
        return f"{named} is {saved}, and must be 0 or above"
    return None


def tokenizer_of(state: Mapping[str, Any], config: T6Config, named: str) -> Tokenizer | None:
    """The tokenizer that a model was trained with; None for a model that was imported without one.

    Raises:
        BadInput: it is missing, cannot be read, or is none of this model.
    """
    if "tokenizer" not in state:
        raise BadInput(f"{named} holds no tokenizer, and text cannot be read without it")
    if state["tokenizer"] is None:
        return None
    try:
        for symbol in _symbols(state["tokenizer"]):
            # A list of all of them is made: a single large one would take the memory.
            if type(symbol) is not int or not 0 <= symbol < config.vocab_size:
                raise BadInput(f"its symbol {str(symbol)[:80]!r} has no row in the model")
        tokenizer = Tokenizer.from_json(state["tokenizer"])
    except Exception as error:  # of json and of tokenizers' Rust, which raises plain Exceptions
        raise BadInput(f"{named}: its tokenizer cannot be read: {first_line(error)}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"{named}: its tokenizer has {tokenizer.vocab_size:,} symbols and its model rows for "
            f"{config.vocab_size:,}"
        )
    return tokenizer


def _symbols(tokenizer: str) -> list[Any]:
    """Every id that a tokenizer's JSON names."""
    given = json.loads(tokenizer)
    symbols = [] if given["eot"] is None else [given["eot"]]
    if given["definition"] != RAW_BYTES:
        spec = json.loads(given["definition"])
        symbols += [token["id"] for token in spec["added_tokens"]]
        vocabulary = spec["model"].get("vocab")
        symbols += vocabulary.values() if isinstance(vocabulary, dict) else []
    return symbols

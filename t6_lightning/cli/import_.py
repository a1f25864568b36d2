"""import: a checkpoint of the paper's public code as one of ours, with the same logits."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from datamodules.tokenizer import Tokenizer, load_tokenizer
from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.checkpoint.reference import as_trained, convert
from t6_lightning.checkpoint.reference_files import read_state
from t6_lightning.cli.parser import Parser
from t6_lightning.common.console import console
from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.config import T6Config
from t6_lightning.presets import load_net


def tokenizer_for(spec: str, vocab_size: int) -> Tokenizer:
    """The tokenizer that `spec` names.

    Raises:
        BadInput: it cannot be had, or has more symbols than the model has rows.
    """
    require(spec != "bpe", "--tokenizer", spec, "a trained model needs the tokenizer it was trained with")
    try:
        tokenizer = load_tokenizer(spec, vocab_size, list)
    except BadInput as error:
        reason = str(error).removeprefix("tokenizer: ").rstrip(".")
        raise BadInput(
            f"{reason}; give --tokenizer FOLDER, one with tokenizer.json or with vocab.json and merges.txt"
        ) from error
    require(
        tokenizer.vocab_size <= vocab_size,
        "--tokenizer",
        spec,
        f"it has {tokenizer.vocab_size} symbols, and the model rows for {vocab_size}",
    )
    return tokenizer


def changes(before: T6Config, after: T6Config) -> dict[str, Any]:
    """Settings in which two configurations differ, by the names that `fit` has for them."""
    flat = [_leaves(config.to_dict(), "model.net.") for config in (before, after)]
    return {name: value for name, value in flat[1].items() if flat[0][name] != value}


def _leaves(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    leaves = {}
    for name, value in values.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}." if name != "init_args" else prefix)
        else:
            leaves[prefix + name] = value
    return leaves


def checkpoint_of(
    config: T6Config, weights: dict[str, torch.Tensor], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """What training would have saved, without an optimizer: the weights in float32."""
    return {
        "state_dict": {f"net.{name}": value.float() for name, value in weights.items()},
        # The public code reads windows as one text.
        "hyper_parameters": {"net": config.architecture(), "confine_to_documents": False},
        "tokenizer": None if tokenizer is None else tokenizer.to_json(),
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
    }


def main(arguments: list[str]) -> int:
    """Convert a file and say what was set."""
    parser = Parser("import", __doc__ or "")
    parser.add_argument(
        "reference_file",
        metavar="REFERENCE_FILE",
        help="state dict (.pt, .bin, .safetensors), the index of several files, or a folder with either",
    )
    parser.add_argument("--config", required=True, metavar="PRESET_OR_FILE", help="what the model is")
    parser.add_argument("--output", required=True, metavar="X.ckpt", help="checkpoint to write")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="tokenizer it was trained with: hub name (the paper's is gpt2), folder, or `bytes`; "
        "without it the checkpoint reads and writes no text",
    )
    options = parser.parse_args(arguments[1:])
    file, output = Path(options.reference_file), Path(options.output)
    require(not output.exists(), "--output", str(output), "it exists already")
    described = load_net(options.config)
    state = read_state(file)
    try:
        config = as_trained(state, described)
        weights = convert(state, config)
    except BadInput as error:
        raise BadInput(f"{file} as {options.config}: {error}") from error
    tokenizer = None if options.tokenizer is None else tokenizer_for(options.tokenizer, config.vocab_size)
    try:
        checkpoint_files.save(checkpoint_of(config, weights, tokenizer), output)
    except checkpoint_files.CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    changed = changes(described, config)
    flags = "".join(f" --{name} {str(value).lower()}" for name, value in changed.items())
    said = ", ".join(f"{name.removeprefix('model.net.')}={value}" for name, value in changed.items())
    lines = [
        f"{file}: {config.attention.mechanism}, {config.n_parameters():,} parameters in {dtype}",
        f"set as the public code has it: {said or 'nothing, the configuration says so already'}",
        f"checkpoint {output}",
        f"to train on: fit --config {options.config}{flags} --data.tokenizer {options.tokenizer or 'NAME_OR_FOLDER'} "
        f"--init_from {output}",
    ]
    if tokenizer is None:
        lines.append("without a tokenizer: `generate` and `evaluate` need one, as --tokenizer gives it")
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return 0

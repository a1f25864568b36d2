"""Files of the paper's public code: one file of weights, or several with an index, as a state dict with bare names."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from t6_lightning.common.errors import BadInput, first_line, require

EMBEDDING, TIED = "transformer.wte.weight", "lm_head.weight"

# Keys under which training scripts keep the weights, and what wrappers put into the weights' names.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
WRAPPERS = ("_orig_mod", "module", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

RECOMPUTED = re.compile(r"(^|\.)(cos_cached|sin_cached|attn\.bias|attn\.masked_bias)$")
"""Buffers that some versions of the code save: RoPE's tables and the causal mask. They hold nothing learned."""

INDEX = ".index.json"
PREFERRED = (
    "model.safetensors" + INDEX,
    "pytorch_model.bin" + INDEX,
    "model.safetensors",
    "pytorch_model.bin",
)
"""What a folder is read by, if it is there: transformers' names. Others may lie beside it, an optimizer's state too."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file, an index file, or a folder with either, by their names in the public code.

    Torch files (.pt, .bin) and safetensors are told apart by their content. Wrappers of training scripts,
    `torch.compile` and distributed training are removed from names, and buffers that are recomputed are left out.

    Raises:
        BadInput: no such file, damaged, no state dict, or with code in it, which is never run.
    """
    file = _in_folder(path) if path.is_dir() else path
    require(file.is_file(), "REFERENCE_FILE", str(file), "there is no such file")
    content = _load_shards(file) if file.name.endswith(INDEX) else _load(file)
    while isinstance(content, dict) and not _holds_weights(content):
        inner = (content[name] for name in CONTAINERS if isinstance(content.get(name), dict))
        content = next(inner, None)
    if content is None or not isinstance(content, dict):
        raise BadInput(f"{file} holds no state dict of the public code: no {EMBEDDING} or {TIED} is in it")
    state: dict[str, torch.Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise BadInput(f"{file} is no state dict of the public code: {name!r} names no weight")
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if RECOMPUTED.search(bare):
            continue
        if bare in state:
            raise BadInput(f"{file} holds {bare} twice, in different wrappings")
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not dense or not value.is_floating_point():
            raise BadInput(
                f"{file} is no state dict of the public code: {name} is no matrix of floating numbers"
            )
        if not value.float().isfinite().all():
            raise BadInput(f"{file} cannot be used: {name} holds numbers that are infinite or not numbers")
        state[bare] = value
    return state


def _in_folder(folder: Path) -> Path:
    """The file that a folder of weights is read by."""
    for name in PREFERRED:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    found = [name for name in files if name.endswith(INDEX)] or [
        name for name in files if name.endswith(SUFFIXES)
    ]
    which = f"name one of {', '.join(found)} in it" if found else "it holds no file of weights"
    require(len(found) == 1, "REFERENCE_FILE", str(folder), which)
    return folder / found[0]


def _load_shards(index: Path) -> dict[str, Any]:
    """The weights of all files that an index names, each from the file that the index says."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{index} cannot be read as JSON: {first_line(error)}") from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise BadInput(f"{index} is no index of weights: it lacks the mapping weight_map")
    for weight, name in where.items():
        # Beside the index, as transformers writes them: an index cannot make other files of the machine be read.
        beside = isinstance(name, str) and name == Path(name).name and not name.endswith(INDEX)
        require(
            beside, f"{index}: weight_map[{weight!r}]", name, "it must be the name of a file beside the index"
        )
    state: dict[str, Any] = {}
    for name in dict.fromkeys(where.values()):
        file = index.parent / name
        if not file.is_file():
            raise BadInput(f"{index} names {name}, and there is no such file beside it")
        shard = _load(file)
        expected = [weight for weight, holder in where.items() if holder == name]
        missing = [weight for weight in expected if not isinstance(shard, dict) or weight not in shard]
        if missing:
            raise BadInput(f"{file} lacks {missing[0]}, which {index.name} says it holds")
        state |= {weight: shard[weight] for weight in expected}
    return state


def _load(file: Path) -> Any:
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{":  # eight bytes of length, then a JSON header
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, ValueError) as error:
            raise BadInput(f"{file} cannot be read as safetensors: {first_line(error)}") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise BadInput(
                f"{file} holds more than weights ({code[1]}), and code in files is never run: save the state dict alone"
            ) from error
        raise BadInput(f"{file} cannot be read: it is neither a torch file nor safetensors") from error
    except Exception as error:  # zipfile, pickle and torch errors all mean the same to the user
        raise BadInput(f"{file} cannot be read as a torch file: {first_line(error)}") from error


def _holds_weights(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(name, str) and name.endswith((EMBEDDING, TIED)) for name in content)

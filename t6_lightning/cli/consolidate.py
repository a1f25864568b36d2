"""consolidate: one checkpoint file of a folder of shards."""

from __future__ import annotations

from pathlib import Path

from t6_lightning.checkpoint import content
from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.cli.parser import Parser
from t6_lightning.common.console import console
from t6_lightning.common.errors import require
from t6_lightning.runs.folder import resolve_checkpoint


def main(arguments: list[str]) -> int:
    """Write the whole checkpoint, optimizer included, as one file with its checksum; needs no GPU."""
    parser = Parser("consolidate", __doc__ or "")
    parser.add_argument("--ckpt_path", required=True, help="folder of shards, or `last`")
    parser.add_argument("--run", help="run that `last` refers to (default: the newest)")
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    options = parser.parse_args(arguments[1:])
    require(
        not options.output.exists(), "--output", str(options.output), "it exists; nothing is written over"
    )
    checkpoint = resolve_checkpoint(options.ckpt_path, options.run)
    state, named = checkpoint_files.load(checkpoint), f"checkpoint {checkpoint}"
    content.check_weights(state["state_dict"], content.config_of(state, named), named)
    checkpoint_files.save(state, options.output.absolute())
    console.print(f"{checkpoint} as one file: {options.output}", soft_wrap=True)
    return 0

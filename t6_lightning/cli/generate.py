"""generate: text from a prompt, by a trained checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch

from datamodules.tokenizer import Tokenizer
from t6_lightning.checkpoint.load import load_trained
from t6_lightning.cli.parser import Parser
from t6_lightning.common.errors import BadInput, first_line, require, shown
from t6_lightning.model.generate import check_settings, generate, row_generators
from t6_lightning.runs.folder import resolve_checkpoint

MOST_CONTEXTS = 4
"""Times the training context that a prompt may be long."""
MOST_BYTES = 4 << 20
"""Of a prompt."""


def main(arguments: list[str]) -> int:
    """Write the prompt, as the tokenizer reads it, and what follows to standard output, as it comes."""
    parser = Parser("generate", __doc__ or "")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint file, or `last`")
    parser.add_argument("--run", help="run that `last` refers to (default: the newest)")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to go on from; may be empty")
    prompt.add_argument("--prompt_file", metavar="FILE", help="file that holds it; - is standard input")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments[1:])
    require(0 <= options.seed < 2**63, "--seed", options.seed, "it must be 0 or above, and below 2**63")
    check_settings(options.max_new_tokens, options.temperature, options.top_k)
    text = options.prompt if options.prompt_file is None else read_prompt(options.prompt_file)
    trained = load_trained(resolve_checkpoint(options.ckpt_path, options.run))
    model, tokenizer = trained.model, trained.tokenizer
    device = model.embedding.weight.device
    # Every document of the training data opens with the separator.
    ids = [tokenizer.eot, *tokenizer.encode(text).tolist()]
    check_length(len(ids), options.max_new_tokens, model.config.context)
    with torch.autocast(device.type, trained.dtype, enabled=trained.dtype != torch.float32):
        tokens = generate(
            model,
            torch.tensor([ids], device=device),
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            generator=row_generators(options.seed, 1, device),
            n_symbols=min(tokenizer.vocab_size, model.config.vocab_size),
            dtype=trained.dtype,
        )
        for part in pieces(tokenizer, ids[1:], (int(token_B[0]) for token_B in tokens)):
            sys.stdout.write(part)
            sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def read_prompt(file: str) -> str:
    """The text of a file, or of standard input for "-". Raises BadInput."""
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadInput(f"--prompt_file={shown(file)} cannot be read: {first_line(error)}") from error
    require(len(data) <= MOST_BYTES, "--prompt_file", file, f"it is longer than {MOST_BYTES:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"--prompt_file={shown(file)} is not UTF-8: byte {error.start}") from error


def check_length(n_prompt: int, n_new: int, context: int) -> None:
    """Refuse a prompt far beyond what the model has seen, and warn of text that goes past it.

    Raises:
        BadInput: the prompt's tokens are more than `MOST_CONTEXTS` training contexts.
    """
    most = MOST_CONTEXTS * context
    if n_prompt > most:
        raise BadInput(
            f"the prompt has {n_prompt:,} tokens: at most {most:,} are read, {MOST_CONTEXTS} times the {context:,} of "
            "the training context; shorten it"
        )
    if n_prompt + n_new > context:
        print(
            f"warning: a prompt of {n_prompt:,} tokens and {n_new:,} new ones go past the {context:,} tokens of the "
            "training context: what is written beyond it may make no sense",
            file=sys.stderr,
        )


def pieces(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of the prompt's ids, then what each further token adds to it, up to the separator."""
    # Of its ids, not as given: a tokenizer may lower-case, drop blanks or replace what it does not know.
    ids, text = list(prompt), tokenizer.decode(prompt)
    yield text
    n_shown = len(text)
    for token in tokens:
        if token == tokenizer.eot:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character may take several tokens: show it when it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[n_shown:]
            n_shown = len(text)
    # One that never became whole.
    yield text[n_shown:]

"""generate: text from a prompt, by a trained checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch

from datamodules.tokenizer import Tokenizer
from t6_lightning.checkpoint.load import load_trained
from t6_lightning.cli.parser import Parser
from t6_lightning.common.errors import require
from t6_lightning.model.generate import check_settings, generate
from t6_lightning.runs.folder import resolve_checkpoint


def main(arguments: list[str]) -> int:
    """Write the prompt, as the tokenizer reads it, and what follows to standard output, as it comes."""
    parser = Parser("generate", __doc__ or "")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint file, or `last`")
    parser.add_argument("--run", help="run that `last` refers to (default: the newest)")
    parser.add_argument("--prompt", required=True, help="text to go on from; may be empty")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments[1:])
    require(0 <= options.seed < 2**63, "--seed", options.seed, "it must be 0 or above, and below 2**63")
    check_settings(options.max_new_tokens, options.temperature, options.top_k)
    trained = load_trained(resolve_checkpoint(options.ckpt_path, options.run))
    model, tokenizer = trained.model, trained.tokenizer
    device = model.embedding.weight.device
    # Every document of the training data opens with the separator.
    ids = [tokenizer.eot, *tokenizer.encode(options.prompt).tolist()]
    tokens = generate(
        model,
        torch.tensor([ids], device=device),
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    for text in pieces(tokenizer, ids[1:], (int(token_B[0]) for token_B in tokens)):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


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

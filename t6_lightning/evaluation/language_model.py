"""A T6 in memory as lm-eval's language model: log-likelihoods, rolling log-likelihoods, generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from rich.progress import Progress

from datamodules.tokenizer import Tokenizer
from t6_lightning.checkpoint import files
from t6_lightning.checkpoint.load import load_trained
from t6_lightning.common.console import console
from t6_lightning.common.errors import require
from t6_lightning.distributed import ranks
from t6_lightning.evaluation.scoring import Score, Tokens, score
from t6_lightning.model.generate import generate, row_generators
from t6_lightning.model.t6 import T6

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_NEW_TOKENS = 256
"""Where a task does not say how many tokens it wants, as in lm-eval's own models."""


class T6LM(TemplateLM):
    """lm-eval's model of a T6. No Hugging Face model stands behind it, and its weights are not copied.

    Each rank is given all requests and computes every n-th batch; all ranks return all results, so each must take part.
    lm-eval sees one process.

    Args:
        model: whole on this process's device. It is evaluated as it is, in evaluation mode.
        tokenizer: of the text that it was trained on; its document separator precedes a text without context.
        batch_size: contexts per forward.
        max_length: tokens that it reads at most, by default the training context.
        shows_progress: a progress bar on the first rank.
    """

    def __init__(
        self,
        model: T6,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        max_length: int | None = None,
        shows_progress: bool = False,
    ) -> None:
        super().__init__()
        require(batch_size >= 1, "batch_size", batch_size, "it must be at least 1")
        require(max_length is None or max_length >= 1, "max_length", max_length, "it must be at least 1")
        self.model, self.text = model, tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or model.config.context
        self.shows_progress = shows_progress
        self._device = model.embedding.weight.device

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> T6LM:
        """lm-eval's way to a model by name, from `ckpt_path`, `batch_size`, `max_length` and `device`.

        `ckpt_path` is a checkpoint, or a run's folder, whose newest verified one is taken.

        Raises:
            BadInput: no such checkpoint, or an argument that is none of these.
        """
        given = {name: value for name, value in {**(additional_config or {}), **arg_dict}.items() if value}
        known = ("ckpt_path", "batch_size", "max_length", "device")
        for name in arg_dict:
            require(name in known, f"model_args.{name}", arg_dict[name], f"choose from {', '.join(known)}")
        require("ckpt_path" in given, "model_args", str(arg_dict), "it must name ckpt_path=FILE")
        numbers = {}
        for name in ("batch_size", "max_length"):
            value = str(given.get(name) or "")
            require(not value or value.isdigit(), name, value, "it must be a whole number")
            numbers |= {name: int(value)} if value else {}
        checkpoint = Path(str(given["ckpt_path"]))
        folder = checkpoint / "checkpoints"
        if folder.is_dir():
            newest = files.newest_verified(folder)
            require(newest is not None, "ckpt_path", str(checkpoint), "it holds no whole checkpoint")
            checkpoint = newest or checkpoint
        # lm-eval's default is a GPU, whether or not there is one.
        device = arg_dict.get("device") or (given.get("device") if torch.cuda.is_available() else None)
        trained = load_trained(checkpoint, device)
        return cls(trained.model, trained.tokenizer, **numbers, shows_progress=True)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> T6LM:
        """As `create_from_arg_obj`, from "ckpt_path=FILE,batch_size=16"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.text.eot

    @property
    def tokenizer_name(self) -> str:
        return f"t6-{self.text.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string).tolist()

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.embedding.weight.dtype),
            "mechanism": self.model.config.attention.mechanism,
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        scores = self._scored([(context, continuation) for _, context, continuation in requests])
        results = [(value.log_probability, value.is_greedy) for value in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, value in zip(owners, self._scored(windows), strict=True):
            totals[owner] += value.log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _scored(self, requests: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
        pieces: list[tuple[Tokens, Tokens]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for piece in _pieces(*request, self.max_length):
                pieces.append(piece)
                owners.append(owner)
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        for owner, value in zip(owners, self._scored_pieces(pieces), strict=True):
            totals[owner] += value.log_probability
            greedy[owner] = greedy[owner] and value.is_greedy
        return [Score(*each) for each in zip(totals, greedy, strict=True)]

    def _scored_pieces(self, requests: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
        rank, world = ranks.number()
        device_type = self._device.type
        with (
            self._in_evaluation(),
            torch.autocast(device_type, torch.bfloat16, enabled=self._autocasts()),
            self._progress("scoring", len(requests)) as advance,
        ):
            mine = score(
                self.model,
                requests,
                self.batch_size,
                self.max_length,
                mine=lambda batch: batch % world == rank,
                on_progress=advance,
            )
        found: list[Score] = []
        for values in zip(*ranks.gathered(mine), strict=True):
            found.extend(Score(*value) for value in values if value is not None)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        rank, world = ranks.number()
        wanted = [self._wanted(request) for request in requests]
        mine: dict[int, str] = {}
        with self._in_evaluation(), self._progress("generating", len(requests)) as advance:
            for number, batch in enumerate(_alike(wanted, self.batch_size)):
                if number % world == rank:
                    mine |= self._generated([(i, wanted[i]) for i in batch])
                advance(len(batch))
        merged = {i: text for texts in ranks.gathered(mine) for i, text in texts.items()}
        results = [merged[i] for i in range(len(requests))]
        for request, text in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def _wanted(self, request: Instance) -> _Wanted:
        arguments: Any = request.args
        prompt, given = arguments
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS))
        new_tokens = options["max_gen_toks"]
        require(
            1 <= new_tokens < self.max_length,
            "max_gen_toks",
            new_tokens,
            f"the model reads {self.max_length} tokens, of which the prompt needs one",
        )
        tokens = self.tok_encode(prompt) or [self.prefix_token_id]
        top_k = options.get("top_k") if options["do_sample"] else None
        return _Wanted(
            tuple(tokens[-(self.max_length - new_tokens) :]),
            tuple(handle_stop_sequences(options["until"], None)),
            new_tokens,
            float(options.get("temperature", 0.0)),
            int(top_k) if top_k else None,
        )

    @torch.inference_mode()
    def _generated(self, batch: list[tuple[int, _Wanted]]) -> dict[int, str]:
        """Texts of prompts of one length; each ends before its first stop sequence or separator."""
        wanted = batch[0][1]
        prompts = torch.tensor([list(each.prompt) for _, each in batch], device=self._device)
        tokens: list[list[int]] = [[] for _ in batch]
        texts: list[str | None] = [None] * len(batch)
        steps = generate(
            self.model,
            prompts,
            wanted.new_tokens,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            generator=row_generators(0, len(batch), self._device),
            n_symbols=min(self.text.vocab_size, self.model.config.vocab_size),
        )
        for token_B in steps:
            for row, token in enumerate(token_B.tolist()):
                if texts[row] is not None:
                    continue
                if token == self.eot_token_id:
                    texts[row] = self.text.decode(tokens[row])
                    continue
                tokens[row].append(token)
                text = self.text.decode(tokens[row])
                ends = [text.index(stop) for stop in batch[row][1].until if stop and stop in text]
                if ends:
                    texts[row] = text[: min(ends)]
            if all(text is not None for text in texts):
                break
        return {
            i: self.text.decode(made) if text is None else text
            for (i, _), made, text in zip(batch, tokens, texts, strict=True)
        }

    def _autocasts(self) -> bool:
        """As `fit` trains there and `evaluate` reads: bf16 on a GPU, unless the weights are in another dtype."""
        return self._device.type == "cuda" and self.model.embedding.weight.dtype == torch.float32

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[int], object]]:
        if not (self.shows_progress and ranks.is_first()):
            yield lambda done: None
            return
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.advance(task, done)


def _pieces(context: Tokens, continuation: Tokens, limit: int) -> Iterator[tuple[Tokens, Tokens]]:
    """A continuation that the model cannot read at once, in parts of half of what it reads, each after what fits."""
    if len(continuation) <= limit:
        yield context, continuation
        return
    whole, step = [*context, *continuation], max(1, limit // 2)
    for first in range(len(context), len(whole), step):
        yield whole[:first][-limit:], whole[first : first + step]


class _Wanted(NamedTuple):
    """What one request of generation asks for."""

    prompt: tuple[int, ...]
    until: tuple[str, ...]
    new_tokens: int
    temperature: float
    top_k: int | None


def _alike(wanted: list[_Wanted], batch_size: int) -> Iterator[list[int]]:
    """Requests that one call of `generate` serves: prompts of one length, and equal settings beside stops."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, each in enumerate(wanted):
        kinds.setdefault((len(each.prompt), each.new_tokens, each.temperature, each.top_k), []).append(i)
    for _, same in sorted(kinds.items(), key=lambda kind: -kind[0][0]):
        for first in range(0, len(same), batch_size):
            yield same[first : first + batch_size]

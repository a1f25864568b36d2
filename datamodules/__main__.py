"""`python -m datamodules prepare | inspect`: fill the token cache; look at a corpus and time its reading.

The corpus is PythonDocs, TextFiles with --files, or any data module: --data NAME with its settings as --data.SETTING,
or --config FILE (the `data` section of a run's configuration).
"""

import argparse
import contextlib
import itertools
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from t6_lightning.common.arguments import Parser
from t6_lightning.common.errors import BadInput, SourceUnavailable, reason_in
from t6_lightning.common.home import t6_home

if TYPE_CHECKING:
    from datamodules.base import TokenData


TOKENS_MEASURED = 4_000_000
"""Of a stream, where `inspect` is not told how many."""
SETTINGS = ("tokenizer", "vocab_size", "context", "val_tokens")
SETTINGS_OF_FILES = (
    "files",
    "exclude",
    "val_files",
    "val_fraction",
    "text_field",
    "domain_field",
    "txt_documents",
)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("datamodules").setLevel(logging.INFO)
    try:
        options, options.rest = _parser().parse_known_args(arguments)
        if options.rest and not (options.data or options.config):
            raise BadInput(f"{options.rest[0]}: there is no such flag here; --help lists those there are.")
        {"prepare": prepare, "inspect": inspect}[options.command](options)
    except SourceUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 75  # as of `fit`: the same command goes on
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of the disk
        print(f"error: {error.strerror}: {error.filename or t6_home()}", file=sys.stderr)
        return 1
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Fill the cache and print what it now holds."""
    data = corpus_of(options)
    _refuse_tokens(data, options)
    data.prepare_data()
    if options.tokens:
        seconds = read_ahead(data, options.tokens)
        print(f"prepared       the first {options.tokens:,} training tokens in {seconds:.1f} s")
    print_counts(data)


def inspect(options: argparse.Namespace) -> None:
    """Counts, what simple models reach, sample documents, and measured throughput."""
    data = corpus_of(options)
    _refuse_tokens(data, options)
    data.prepare_data()
    print_counts(data)
    print_samples(data, options.samples)
    if not options.no_throughput:
        print_throughput(options)


def _refuse_tokens(data: "TokenData", options: argparse.Namespace) -> None:
    if options.tokens is not None and not data.streamed:
        raise BadInput(f"--tokens: it belongs to streams; {type(data).__name__} is read whole.")


def read_ahead(data: "TokenData", tokens: int) -> float:
    """Read (and so cache) the first training tokens with a progress bar; returns the seconds it took."""
    from rich.console import Console
    from rich.progress import track

    steps = -(-tokens // (data.batch_size * data.context))
    began = time.perf_counter()
    batches = itertools.islice(data.train_dataloader(), steps)
    for _ in track(batches, "reading", total=steps, console=Console(stderr=True), transient=True):
        pass
    return time.perf_counter() - began


def configured_corpus(options: argparse.Namespace) -> "TokenData":
    """The data module that --data, --config and --data.SETTING describe, as `fit` reads them."""
    import jsonargparse
    import yaml

    from datamodules import corpora  # noqa: F401  (so that their short names are known)
    from datamodules.base import TokenData

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TokenData, "data", required=True)
    content: Any = None
    if options.config:
        try:
            with open(options.config, encoding="utf-8") as file:
                content = yaml.safe_load(file)
        except OSError as error:
            raise BadInput(f"--config: {options.config} cannot be read ({error.strerror}).") from error
        except (ValueError, yaml.YAMLError) as error:  # not UTF-8; not YAML
            raise BadInput(
                f"--config: {options.config} is no YAML: {' '.join(str(error).split())}."
            ) from error
        if not isinstance(content, dict) or "data" not in content:
            raise BadInput(f"--config: {options.config} has no section `data`.")
    try:
        if options.config:
            parser.set_defaults({"data": content["data"]})
        chosen = ["--data", options.data] if options.data else []
        built: Any = getattr(parser, "instantiate", parser.instantiate_classes)(
            parser.parse_args([*chosen, *options.rest])
        )
        return built.data
    except BadInput:
        raise
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        said = reason_in(str(error))
        if unknown := re.search(r"Option '(\w+)' is not accepted", said):
            said = f"there is no setting {unknown[1]!r}"
        raise BadInput(f"--data: {said.rstrip('.')}.") from error


def corpus_of(options: argparse.Namespace) -> "TokenData":
    """The data module that was asked for. BadInput for settings of another one."""
    of_any, of_files = (
        {name: getattr(options, name) for name in names if hasattr(options, name)}
        for names in (SETTINGS, SETTINGS_OF_FILES)
    )
    if options.data or options.config:
        for name in (*of_any, *of_files):
            raise BadInput(f"--{name}: beside --data or --config it is --data.{name}.")
        return configured_corpus(options)
    from datamodules.corpora import PythonDocs, TextFiles

    if "files" not in of_files:
        for name in of_files:
            raise BadInput(f"--{name}: it belongs to --files, which is missing.")
        return PythonDocs(**of_any)
    if "val_files" in of_files:
        of_files["val_files"] = _named(of_files["val_files"])
    return TextFiles(**of_files, **of_any)


def print_counts(data: "TokenData") -> None:
    summary = data.summary()
    tokenizer = data.tokenizer
    print(f"tokenizer      {data.tokenizer_spec}, {tokenizer.vocab_size:,} ids, {tokenizer.fingerprint[:12]}")
    print(f"fingerprint    {data.fingerprint}")
    row = "{:<14} {:>12} {:>15} {:>15} {:>9}"
    print(row.format("", "documents", "tokens", "bytes", "share"))
    for name, source in (summary.get("sources") or {"": summary}).items():
        share = f"{source['share']:.1%}" if "share" in source else ""
        if "train_files" in source:
            stored = f"{source['train_files']:,} files, {source['train_stored_bytes']:,} stored bytes"
            place = f"streamed from {source['source']} ({source['revision']})"
            print(f"train {name:<8} {stored}, {place} {share}".rstrip())
        elif share:
            print(row.format(f"train {name}", *_counts(source, "train"), share))
    if "train_tokens" in summary:
        print(row.format("train", *_counts(summary, "train"), ""))
    for side in ("val", "test"):
        print(row.format(side, *_counts(summary, side), ""))
        for name, domain in summary["domains"].items():
            if domain[f"{side}_documents"]:
                share = f"{domain[f'{side}_bytes'] / summary[f'{side}_bytes']:.1%}"
                print(row.format(f"  {name}", *_counts(domain, side), share))
    for name in ("unigram", "gzip", "xz"):
        if (bits := summary.get(f"{name}_bits_per_byte")) is not None:
            print(f"{name:<14} {bits:.3f} bits per byte of the validation text")


def _counts(summary: dict[str, Any], side: str) -> list[str]:
    return [f"{summary[f'{side}_{what}']:,}" for what in ("documents", "tokens", "bytes")]


def print_samples(data: "TokenData", number: int) -> None:
    for document in data.example_documents(number):
        text = " ".join(document.text.split())
        size = f"{len(data.tokenizer.encode(document.text)):,} tokens, {len(document.text.encode()):,} bytes"
        print(f"\ndocument {document.key:016x}: {size}\n  {text[:300]}")


def print_throughput(options: argparse.Namespace) -> None:
    """Read, tokenize and pack in this process from an empty cache; then pack from the cache.

    Everything, or the first `--tokens` (TOKENS_MEASURED) of a stream.
    """
    from datamodules.lanes import close_all

    data = corpus_of(options)
    tokenizer = data.tokenizer  # trained or loaded beforehand: it is not what is measured
    with _empty_home():
        data = corpus_of(options)
        vars(data)["tokenizer"] = tokenizer
        if data.streamed:
            data.prepare_data()  # validation text and the list of files
        began, cpu = time.perf_counter(), time.process_time()
        number = TOKENS_MEASURED if options.tokens is None else options.tokens
        tokens = _pack(data, number)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        speed = f"{tokens / seconds / 1e6:.2f} M tokens/s"
        print(f"\nread + tokenize + pack  {speed} ({tokens:,} in {seconds:.2f} s, {cpu:.2f} s of CPU time)")
        close_all()  # what was read ahead goes on being tokenized
        began = time.perf_counter()
        tokens = _pack(data, number)
        print(f"pack from the cache     {tokens / (time.perf_counter() - began) / 1e6:.2f} M tokens/s")


def _pack(data: "TokenData", tokens: int) -> int:
    """Read all training windows of one epoch, or so many tokens of a stream; returns their tokens."""
    from datamodules.packing import TrainingWindows

    first, *others = data.training_windows(data.validation_keys()).values()
    if isinstance(first, TrainingWindows) and not others:
        batches = first.per_epoch // data.batch_size
        return sum(
            first.batch(i * data.batch_size, data.batch_size)["tokens"].numel() for i in range(batches)
        )
    batches = -(-tokens // (data.batch_size * data.context))
    return sum(batch["tokens"].numel() for batch in itertools.islice(data.train_dataloader(), batches))


@contextlib.contextmanager
def _empty_home() -> Iterator[None]:
    before = os.environ.get("T6_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["T6_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["T6_HOME"]
            else:
                os.environ["T6_HOME"] = before


def _count(value: str) -> int:
    if not value.isdigit():
        raise argparse.ArgumentTypeError(f"{value!r} is not allowed; allowed: whole numbers from 0 on")
    return int(value)


def _named(values: list[str]) -> dict[str, list[str] | str]:
    """DOMAIN=PATH, ... -> paths by domain."""
    named: dict[str, list[str] | str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise BadInput(f"--val_files: {value!r} is not allowed; allowed: DOMAIN=PATH.")
        if name in named:
            raise BadInput(f"--val_files: {value!r} names {name!r} again; allowed: each DOMAIN once.")
        named[name] = path
    return named


def _parser() -> Parser:
    parser = Parser(
        prog="python -m datamodules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("prepare", prepare), ("inspect", inspect)):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--data", metavar="NAME", help="any data module; its settings as --data.SETTING")
        command.add_argument("--config", metavar="FILE", help="YAML with a section `data`")
        command.add_argument("--tokens", type=_count, help="of a stream to read")
        # What is not given is left to the data module.
        setting = partial(command.add_argument, default=argparse.SUPPRESS)
        setting("--files", nargs="+", metavar="PATH", help="TextFiles on these; without: PythonDocs")
        setting("--exclude", nargs="+", metavar="GLOB", help="file names to leave out")
        setting("--val_files", nargs="+", metavar="DOMAIN=PATH")
        setting("--val_fraction", type=float)
        setting("--text_field")
        setting("--domain_field")
        setting("--txt_documents", choices=("file", "line", "paragraph"))
        setting("--tokenizer", help="bpe, bytes, a folder or a hub name")
        setting("--vocab_size", type=int, help="of bpe")
        setting("--context", type=int)
        setting("--val_tokens", type=int, help="at most so many per domain and side")
        if name == "inspect":
            command.add_argument("--samples", type=_count, default=3, help="documents to show")
            command.add_argument("--no_throughput", action="store_true", help="do not measure")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Python's own standard library as a corpus: docstrings and documentation topics (prose) and source (code).

Read from disk, never imported. The documents are the same for everyone with the same Python (micro version
included): what distributors split off, drop or patch is left out. Some 3 million tokens.
"""

import ast
import gc
import hashlib
import inspect
import platform
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from importlib.util import decode_source
from pathlib import Path

from datamodules.documents import Document, Source, hash64

VAL_FRACTION = 0.07
"""Share of the modules and topics that validate: 4-5 % of the bytes of either domain."""

RECIPE = 1
"""Part of the source's identity: raise it whenever the same files would give other documents."""

TOPICS = "pydoc_data/topics.py"

# Names of files and folders. Tests, Tk, IDLE, pip's seed and the build's settings are packaged apart, differ
# per platform or are left out by distributors; site.py and sysconfig.py are patched by them.
LEFT_OUT = (
    "test", "tests", "idlelib", "tkinter", "turtledemo", "turtle.py", "lib2to3", "distutils", "ensurepip",
    "msilib", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "config-*", "_sysconfigdata*",
    "site.py", "sysconfig.py", "sitecustomize.py", "usercustomize.py", "_distutils_*", "__phello__*",
)  # fmt: skip


def standard_library() -> Source:
    """The standard library of the Python that runs."""
    root = Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256(f"python-docs {RECIPE}".encode())
    for path in modules(root):
        digest.update(f"\0{path}\0".encode())
        digest.update((root / path).read_bytes())
    name = f"Python {platform.python_version()} standard library"
    return Source(name, digest.hexdigest(), partial(documents, root))


def modules(root: Path) -> list[str]:
    """Relative paths (with /) of the modules that count, sorted."""
    found = []
    folders = [root]
    while folders:
        for path in folders.pop().iterdir():
            if any(fnmatch(path.name, pattern) for pattern in LEFT_OUT):
                continue
            if path.is_dir():
                folders.append(path)
            elif path.suffix == ".py":
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def documents(root: Path) -> Iterator[Document]:
    """Per module its docstrings (prose), then its source without them (code); per topic its text (prose).

    The split key is the module's path (so both of its documents fall on one side) or the topic's name. Exact
    duplicates and files that do not decode or parse are skipped.
    """
    seen = set()
    for path in modules(root):
        for document in _documents_of(root, path):
            digest = hashlib.blake2b(document.text.encode("utf-8", "replace"), digest_size=16).digest()
            if document.text and digest not in seen:
                seen.add(digest)
                yield document


def _documents_of(root: Path, path: str) -> Iterator[Document]:
    try:
        source = decode_source((root / path).read_bytes())
        tree = _parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    if path == TOPICS:
        for topic, text in _topics(tree).items():
            yield Document(text.strip(), "prose", hash64(f"topic {topic}"))
        return
    key = hash64(path)
    found = list(_docstrings(tree, _dotted(path)))
    prose = "\n\n\n".join(f"{name}\n\n{inspect.cleandoc(_docstring(node) or '')}" for name, node in found)
    yield Document(prose.strip(), "prose", key)
    yield Document(_without_docstrings(source, [node for _, node in found]), "code", key)


def _parse(source: str) -> ast.Module:
    """ast.parse without the garbage collector, which would scan the growing tree again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if was_enabled:
            gc.enable()


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# Where statements hold statements. Not looking into expressions is several times as fast as ast.walk.
STATEMENT_FIELDS = ("body", "handlers", "cases", "orelse", "finalbody")


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, Documented]]:
    """(qualified name, node) of everything with a docstring, in the order of the source."""
    if isinstance(node, (ast.Module, *NAMED)) and _docstring(node) is not None:
        yield name, node
    for field in STATEMENT_FIELDS:
        for child in getattr(node, field, ()):
            if isinstance(child, NAMED):
                yield from _docstrings(child, f"{name}.{child.name}")
            elif hasattr(child, "body") or hasattr(child, "cases"):
                yield from _docstrings(child, name)


def _docstring(node: Documented) -> str | None:
    """As written; ast.get_docstring cleans it on the way, and is asked too often here for that."""
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first.value.value if isinstance(first.value.value, str) else None
    return None


def _without_docstrings(source: str, nodes: list[Documented]) -> str:
    """The source without docstrings; `pass` stands where one shared its line or was the whole body."""
    data = source.encode("utf-8", "surrogatepass")  # ast counts columns in UTF-8 bytes
    lines = data.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    kept, position = [], 0
    for node in nodes:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        assert docstring.end_col_offset is not None
        begin = starts[docstring.lineno - 1] + docstring.col_offset
        end = starts[docstring.end_lineno - 1] + docstring.end_col_offset
        before = lines[docstring.lineno - 1][: docstring.col_offset]
        after = lines[docstring.end_lineno - 1][docstring.end_col_offset :]
        if before.strip() or after.strip() or (len(node.body) == 1 and not isinstance(node, ast.Module)):
            kept.append(data[position:begin] + b"pass")
            position = end
        else:
            kept.append(data[position : starts[docstring.lineno - 1]])
            position = starts[docstring.end_lineno]
    kept.append(data[position:])
    return b"".join(kept).decode("utf-8", "surrogatepass").strip()


def _topics(tree: ast.Module) -> dict[str, str]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return ast.literal_eval(statement.value)
    return {}

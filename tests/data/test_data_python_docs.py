"""The standard library as a corpus: what is in it, what is not, and that nothing occurs twice."""

import ast
import textwrap
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from datamodules import python_docs
from datamodules.documents import held_out


@pytest.fixture(scope="module")
def library():
    return list(python_docs.standard_library().documents())


def test_it_is_real_text_of_both_domains(library):
    size = dict.fromkeys(("prose", "code"), 0)
    for document in library:
        size[document.domain] += len(document.text.encode())
    assert size["prose"] > 1_500_000
    assert size["code"] > 5_000_000
    assert len({document.text for document in library}) == len(library)
    argparse = next(document.text for document in library if document.text.startswith("argparse\n"))
    assert "argparse.ArgumentParser\n\nObject for parsing command line strings" in argparse
    assert any('The "if" statement' in document.text for document in library)  # a documentation topic


def test_the_same_in_the_same_order_each_time(library):
    assert list(islice(python_docs.standard_library().documents(), 200)) == library[:200]
    assert python_docs.standard_library().identity == python_docs.standard_library().identity


def test_prose_and_code_of_a_module_fall_on_one_side_and_both_are_validated(library):
    keys = np.array([document.key for document in library], dtype=np.uint64)
    side = held_out(keys, python_docs.VAL_FRACTION)
    for domain in ("prose", "code"):
        size = np.array([len(document.text) * (document.domain == domain) for document in library])
        assert 0.03 < size[side].sum() / size.sum() < 0.06


def test_code_still_parses_and_holds_no_docstring(library):
    codes = [document.text for document in library if document.domain == "code"]
    for code in codes[::5]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert ast.get_docstring(node) is None or '"""' not in code


def test_what_distributors_split_off_is_left_out():
    paths = python_docs.modules(Path(ast.__file__).parent)
    parts = {part for path in paths for part in path.split("/")}
    assert {"argparse.py", "asyncio", "json", "topics.py"} <= parts
    assert (
        not {"test", "tests", "idlelib", "tkinter", "turtle.py", "lib2to3", "distutils", "ensurepip"} & parts
    )
    assert not any("packages" in part or part.startswith(("config-", "_sysconfigdata")) for part in parts)
    assert paths == sorted(paths)


def test_docstrings_are_cut_out_wherever_they_stand(tmp_path):
    source = '''
        """Module Ü."""
        import os

        class A:
            """Only this."""

        class B:
            """First."""
            x = "kept"

        def f(): "one line"

        async def g():
            "short"; return 1

        if os:
            def h():
                r"""Inside
                a branch."""
                return lambda: "ü"  # kept
        '''
    (tmp_path / "m.py").write_text(textwrap.dedent(source))
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xff'\n")
    prose, code = python_docs.documents(tmp_path)
    assert prose.text.split("\n\n\n") == [
        "m\n\nModule Ü.", "m.A\n\nOnly this.", "m.B\n\nFirst.", "m.f\n\none line", "m.g\n\nshort",
        "m.h\n\nInside\na branch.",
    ]  # fmt: skip
    assert prose.key == code.key
    expected = """
        import os

        class A:
            pass

        class B:
            x = "kept"

        def f(): pass

        async def g():
            pass; return 1

        if os:
            def h():
                return lambda: "ü"  # kept
        """
    assert code.text == textwrap.dedent(expected).strip()

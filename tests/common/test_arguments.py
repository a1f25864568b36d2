"""Every command line says what is wrong in one sentence and exits with code 2."""

from __future__ import annotations

import importlib

import pytest

from t6_lightning.common.arguments import Parser
from t6_lightning.common.errors import BadInput


def test_a_wrong_argument_is_bad_input_in_subcommands_too() -> None:
    parser = Parser(prog="program")
    parser.add_subparsers(dest="command").add_parser("go").add_argument("--n", type=int)
    assert parser.parse_args(["go", "--n", "3"]).n == 3
    with pytest.raises(BadInput, match=r"^--n: invalid int value: 'x'\.$"):
        parser.parse_args(["go", "--n", "x"])
    with pytest.raises(BadInput, match=r"^unrecognized arguments: --m\.$"):
        parser.parse_args(["go", "--m"])


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("t6_lightning", ["params", "--format"], "unrecognized arguments: --format"),
        ("t6_lightning", ["generate", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (
            "datamodules",
            ["inspect", "--samples", "x"],
            "--samples: 'x' is not allowed; allowed: whole numbers",
        ),
        ("datamodules", [], "the following arguments are required: command"),
        ("sweeps", ["run"], "the following arguments are required: FILE"),
        ("sweeps", ["walk"], "invalid choice: 'walk'"),
        ("mlflow_server", ["start", "--port", "x"], "--port: invalid int value: 'x'"),
    ],
)
def test_command_lines(
    module: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importlib.import_module(f"{module}.__main__").main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("error: ")
    assert written.err.count("\n") == 1
    assert says in written.err

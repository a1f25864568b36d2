"""The argument parser of every command line."""

import argparse
from typing import NoReturn

from t6_lightning.common.errors import BadInput


class Parser(argparse.ArgumentParser):
    """Raises BadInput, in one sentence, where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message.removeprefix('argument ').rstrip('.')}.")

"""Whether kernels run in Triton's interpreter here: conftest.py turns it on where there is no GPU."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest
from packaging.version import Version

from kernels.place import TRITON_IS_INSTALLED

IS_ON = TRITON_IS_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
WHY_OFF = "Triton's interpreter is off: the package is not installed, or there is a GPU"
if IS_ON and Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
    IS_ON, WHY_OFF = (
        False,
        "the interpreter of Triton before 3.7 makes numbers of arrays in a way that NumPy 2.4 refuses",
    )
needs_interpreter = pytest.mark.skipif(not IS_ON, reason=WHY_OFF)

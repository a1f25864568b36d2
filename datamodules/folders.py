"""Files in a folder and its subfolders, linked ones too."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from datamodules.system_faults import named


def files_below(root: Path) -> Iterator[Path]:
    """Every file in a folder, at any depth, behind links too; a folder that several paths lead to is read once.

    Real folders are read first, so that links change no path of a file that is found without them.
    Raises BadInput for a folder that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    real, linked = deque([root]), deque[Path]()
    while real or linked:
        folder = real.popleft() if real else linked.popleft()
        with named(str(folder)):
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_file():
                yield folder / entry.name
            elif entry.is_dir():
                (linked if entry.is_symlink() else real).append(folder / entry.name)

"""Files mapped into memory without a descriptor: a process may hold only so many of them, often 1,024."""

import ctypes
import mmap
import os
import sys
import weakref
from pathlib import Path

import numpy as np


def mapped(file: Path) -> memoryview:
    """The bytes of a file, read when they are looked at. They stay readable when the file is removed.

    Python's own `mmap` keeps a descriptor for as long as it lives. Raises OSError; ValueError for an empty file.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise ValueError("it is empty")
        if sys.platform == "win32" or ctypes.sizeof(ctypes.c_void_p) < 8:
            return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        place = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if place in (None, ctypes.c_void_p(-1).value):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(file))
    finally:
        os.close(descriptor)
    contents = (ctypes.c_ubyte * size).from_address(place)
    # Every view of the bytes holds `contents`. At the interpreter's end threads may still read.
    weakref.finalize(contents, _libc().munmap, place, size).atexit = False
    return np.frombuffer(memoryview(contents), np.uint8).data.toreadonly()


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    integer, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.argtypes = (pointer, size, integer, integer, integer, ctypes.c_int64)
    libc.mmap.restype = pointer
    libc.munmap.argtypes = (pointer, size)
    return libc

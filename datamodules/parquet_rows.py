"""Rows of a local parquet file, read page by page."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.system_faults import system_fault
from t6_lightning.common.errors import BadInput, first_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq

Row = tuple[str, dict[str, Any]]

ROWS_AT_ONCE = 256
BATCH_BYTES = 128 << 20
"""What a batch of rows may take, were each row as long as all values of its column together: pages of a dictionary
repeat one value in every row."""
BUFFER_BYTES = 1 << 20


def parquet_rows(path: Path, columns: list[str]) -> tuple[list[str], Iterator[Row]]:
    """The names of all columns, and (place such as "row 3", {column: value}) of each row, of the columns asked for and
    present. Raises BadInput."""
    import pyarrow.parquet as pq

    try:
        present = pq.read_schema(path).names
    except Exception as error:  # pyarrow's own
        raise _explained(path, 0, error) from error
    return present, _rows(path, [name for name in present if name in columns])


def rows_at_once(footer: "pq.FileMetaData", groups: Iterable[int], columns: list[str], most: int) -> int:
    """How many rows of some row groups are read in one batch: 1 to `most`, so that they take up to BATCH_BYTES."""
    largest = 1
    for group in map(footer.row_group, groups):
        chunks = [group.column(i) for i in range(group.num_columns)]
        sizes = [
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns
        ]
        largest = max(largest, sum(sizes))
    return max(1, min(most, BATCH_BYTES // largest))


def _rows(path: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = 0
    try:
        # Buffered, so that a column chunk, which may be the whole file, is not read at once.
        with pq.ParquetFile(
            path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as file:
            footer = file.metadata
            size = rows_at_once(footer, range(footer.num_row_groups), columns, ROWS_AT_ONCE)
            for batch in file.iter_batches(size, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (BadInput, GeneratorExit):
        raise
    except Exception as error:  # pyarrow's own
        raise _explained(path, number, error) from error


def _explained(path: Path, rows: int, error: Exception) -> BadInput:
    said = system_fault(error, str(path))
    return said or BadInput(f"{path}: it cannot be read after row {rows} ({first_line(error)}).")

"""Files packed by gzip or Zstandard, read as what they hold.

A small file may unpack to any number of bytes, so there is a limit beyond what texts reach.
"""

import gzip
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, cast

MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # how a packed file begins (RFC 1952, RFC 8878)
PACKED_SUFFIXES = tuple(MAGIC)
BUFFER_BYTES = 2**18
MAX_UNPACKED_TIMES = 200  # the size of the file; JSON and logs reach 5 to 40
UNPACKED_FREELY_BYTES = 2**30  # a little of anything may be unpacked: equal rows reach 1,000 times their packed size


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in PACKED_SUFFIXES


def begins_otherwise(path: Path) -> bool:
    """Whether a file can be read, and begins unlike a packed file of its name."""
    magic = MAGIC.get(path.suffix.lower(), b"")
    try:
        with path.open("rb") as stream:
            return stream.read(len(magic)) != magic
    except OSError:
        return False


def unpacked(path: Path) -> BufferedReader:
    """The content of a packed file. Raises OSError, EOFError or zlib.error, also while it is read, where the file is
    damaged or cut short, and OSError where it unpacks to too much."""
    return BufferedReader(_Unpacking(path), BUFFER_BYTES)


def most_unpacked(size: int) -> int:
    """How many bytes a file of this size may unpack to."""
    return max(UNPACKED_FREELY_BYTES, MAX_UNPACKED_TIMES * size)


def too_much_unpacked(most: int) -> str:
    return (
        f"it unpacks to more than {most:,} bytes, {MAX_UNPACKED_TIMES} times its size or "
        f"{UNPACKED_FREELY_BYTES / 2**30:g} GiB"
    )


class _Unpacking(RawIOBase):
    def __init__(self, path: Path) -> None:
        self._read_bytes, self._most = 0, most_unpacked(path.stat().st_size)
        if path.suffix.lower() == ".gz":
            self._file: Any = gzip.GzipFile(path)
        else:
            import pyarrow  # a third of a second; this Python's library has no Zstandard

            self._file = pyarrow.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As many bytes as there are: short only at the end."""
        data = cast(bytes, self._file.read(len(buffer)))
        buffer[: len(data)] = data
        self._read_bytes += len(data)
        if self._read_bytes > self._most:
            raise OSError(f"{too_much_unpacked(self._most)}; unpack it yourself if it is right")
        return len(data)

    def tell(self) -> int:
        return self._read_bytes

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

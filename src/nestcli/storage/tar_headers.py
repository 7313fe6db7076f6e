"""Walk through an uncompressed tar, header by header: check sizes, extract nothing.

`tarfile` parses the single headers. It does not walk the tar, because it stops silently at a damaged header, and it
follows sparse maps, renaming headers and sizes without a limit.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator

BLOCK = tarfile.BLOCKSIZE  # bytes; everything in a tar begins at a multiple of it
_MAX_EXTENSION = 1 << 20  # bytes of a long name or of PAX records
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_WITHOUT_CONTENT = frozenset(  # these have no content, whatever size they state
    (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
)


class BrokenTarError(Exception):
    """The walk cannot continue; the text completes "FILE is ..."."""


def headers(descriptor: int) -> Iterator[tarfile.TarInfo]:
    """Yield every header of a tar, up to its end or the file's, with `offset_data` and `size` in bytes.

    Headers that extend the next one are yielded too; the next one carries their name, size and `pax_headers`.
    Raises BrokenTarError for a damaged header, and for content that reaches beyond the end of the file.
    """
    total, position = os.fstat(descriptor).st_size, 0
    name: str | None = None
    records: dict[str, str] = {}
    while position < total:
        block = os.pread(descriptor, BLOCK, position)
        if not any(block):
            return
        if position and len(block) < BLOCK:
            raise BrokenTarError(f"cut off: only {len(block)} bytes of the header at byte {position:,} are there")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            header.offset_data = position + BLOCK
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = _extension(descriptor, header).split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif header.type == tarfile.XHDTYPE:
                header.pax_headers = records = _pax_records(_extension(descriptor, header))
            else:
                header.name = records.get("path", name) or header.name
                header.size = int(records.get("size", header.size))
                header.pax_headers = records
                name, records = None, {}
        except (tarfile.HeaderError, ValueError) as error:
            raise BrokenTarError(f"not a tar file, or a damaged one: {error}, at byte {position:,}") from None
        length = 0 if header.type in _WITHOUT_CONTENT else header.size
        position = header.offset_data + -(-length // BLOCK) * BLOCK
        if length < 0 or header.offset_data + length > total:
            raise BrokenTarError(f"cut off: {header.name[:100]!r} claims more bytes than there are")
        yield header


def _extension(descriptor: int, header: tarfile.TarInfo) -> bytes:
    if not 0 <= header.size <= _MAX_EXTENSION:
        raise ValueError(f"a name or PAX header of {header.size:,} bytes")
    return os.pread(descriptor, header.size, header.offset_data)


def _pax_records(content: bytes) -> dict[str, str]:
    """Parse the records `LENGTH KEY=VALUE\\n` of a PAX header. Raises ValueError."""
    records, position = {}, 0
    while position < len(content):
        record = _PAX_RECORD.match(content, position)
        end = position + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(content):
            raise ValueError("a PAX header that cannot be read")
        value = content[record.end() : end - 1]
        records[record[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records

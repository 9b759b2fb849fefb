"""Text files, read whole."""

import hashlib
from pathlib import Path

from hylo.errors import UserError


def read_utf8(path: Path) -> str:
    """The text of a file, line ends as they are.

    Raises:
        UserError: the file cannot be read or is not UTF-8; the message has the offset of the first bad byte.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read text file '{path}': {error.strerror}") from None
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise UserError(f"text file '{path}' is not UTF-8: byte 0x{bad:02x} at offset {error.start}") from None


def file_hash(path: Path, what: str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; `what` the file is, for the message.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {what} '{path}': {error.strerror}") from None

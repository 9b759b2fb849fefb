"""The libraries we are compared with: one module a stem, with each one's call for our inputs, or why it is missing."""

import importlib
from typing import Any


class Missing(Exception):
    """This peer cannot take part; the message says why."""


def imported(module: str, name: str) -> Any:
    """A function of a library.

    Raises:
        Missing: it is not installed here.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error

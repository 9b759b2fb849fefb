"""Length extension shown on a small model: teacher, hybrids, short and long training, and what it did to them."""

from hylo.extension.recipe import Extension, load_extension
from hylo.extension.report import ExtensionReport
from hylo.extension.run import run_extension

__all__ = ["Extension", "ExtensionReport", "load_extension", "run_extension"]

"""The one exception that cprune raises for input it refuses."""

from __future__ import annotations


class CpruneError(Exception):
    """Refused input: one sentence that says what must hold and what was given, raised before any costly work.

    Not a ValueError, which parsers (of the command line, of JSON) catch and wrap in words of their own.
    """

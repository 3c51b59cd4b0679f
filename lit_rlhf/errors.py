"""The one exception for mistakes that the user can mend, and how its message reaches a terminal."""

import logging
import unicodedata


class UserError(ValueError):
    """A mistake in the user's input, config or surroundings.

    Its message is all that the command line prints, so it says what was wrong, with the values, and what to do.
    """


def printable(text: str) -> str:
    """Text for a terminal: control characters, which can rewrite what is on it, shown by their codes.

    Line breaks and tabs stay. So do letters of every script, but not the marks that turn the direction of writing.

    >>> printable("a\\tb\\x1b[2Jc\\u202e")
    'a\\tb\\\\x1b[2Jc\\\\u202e'
    """
    return "".join(c if c in "\n\t" or not _steers(c) else repr(c)[1:-1] for c in text)


class PrintableFormatter(logging.Formatter):
    """Of the lines of a log, which may quote a completion, a file or a server."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS


_DIRECTIONS = {*map(chr, (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))}

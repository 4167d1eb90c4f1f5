"""Files of data sets as people and tools leave them: names without suffix, any encoding."""

from __future__ import annotations

import codecs
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

_MARKS = (  # UTF-32's come first, for one of them begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)
_PROLOG = re.compile(rb"""<\?xml\b[^>]*?\sencoding\s*=\s*["']([\w.:-]+)["']""")
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030"}  # Files that name the one often hold the other.


class BadFileError(ValueError):
    """A file of a data set that is missing, broken or makes no sense; the message names it."""


class Files:
    """The files of a folder by the names that lists give them.

    Args:
        folder: may hold folders, for a name may have slashes.
        suffixes: in lower case, though files may have them in any. Where several files have one
            name, that with the earlier suffix is taken.
    """

    def __init__(self, folder: Path, suffixes: Sequence[str]) -> None:
        self.folder, self.suffixes = folder, tuple(suffixes)
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, name: str) -> Path | None:
        """The file ``name`` with a suffix added, else ``name`` itself if it has one."""
        usual = self.folder / f"{name}{self.suffixes[0]}"
        if os.path.isfile(usual):  # the folder need not be listed
            return usual
        listed = self._list(usual.parent)
        for suffix in (*self.suffixes, ""):
            if found := listed.get(_key(os.path.basename(name) + suffix)):
                return found
        return None

    def path(self, name: str) -> Path:
        """What ``find`` finds, or else where the file should be."""
        suffix = "" if self.stem(name) != name else self.suffixes[0]
        return self.find(name) or self.folder / f"{name}{suffix}"

    def stem(self, name: str) -> str:
        """``name`` without its suffix if that is one of these files'."""
        stem, suffix = os.path.splitext(name)
        return stem if suffix.lower() in self.suffixes else name

    def _list(self, folder: Path) -> dict[str, Path]:
        if folder not in self._listed:
            try:  # sorted, so that of a.PNG and a.png the latter stays
                entries = sorted(os.listdir(folder))
            except OSError:
                entries = []
            self._listed[folder] = {_key(entry): folder / entry for entry in entries}
        return self._listed[folder]


def _key(entry: str) -> str:
    stem, suffix = os.path.splitext(entry)
    return stem + suffix.lower()


def decoded(data: bytes) -> str:
    """The text of a file, without byte order marks.

    Its encoding is told by a mark; else by an XML prolog, in any encoding that Python knows; else
    by zero bytes, which make it UTF-16; else it is UTF-8 where the bytes are well-formed in that,
    Windows-1252 or Latin-1 where they are not.

    Raises:
        ValueError: it is no text, or not in the encoding that it says.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    # A prolog that can be read byte by byte is not in UTF-16, even if .NET's says so.
    if encoding is None and (prolog := _PROLOG.match(data)):
        named = prolog[1].decode("ascii", "replace")
        if not named.lower().startswith(("utf-16", "utf-32")):
            encoding = named
    if encoding is None and b"\0" in data:
        little = data[1::2].count(0) > data[::2].count(0)
        encoding = "utf-16-le" if little else "utf-16-be"
    for name in (encoding,) if encoding else ("utf-8", "cp1252", "latin-1"):
        try:
            text = data.decode(_WIDER.get(codecs.lookup(name).name, name)).replace("\ufeff", "")
            break
        except LookupError:
            raise ValueError(f"expected an encoding that Python knows, got {name!r}") from None
        except UnicodeError as error:
            problem = error
    else:
        raise ValueError(f"expected text in {name}, got other bytes ({problem})")
    if "\0" in text:
        raise ValueError("expected text, got zero bytes")
    return text


def read_lines(path: Path) -> list[str]:
    """Lines of a list that are not empty, without white space at their ends.

    Raises:
        BadFileError: it is no text that :func:`decoded` understands.
    """
    try:
        text = decoded(path.read_bytes())
    except ValueError as error:
        raise BadFileError(f"{path}: {error}; save it as UTF-8") from None
    return [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]

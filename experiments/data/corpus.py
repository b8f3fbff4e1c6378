"""War and Peace: `war_and_peace.txt` under the data root, or a download from Project Gutenberg.

The stored results come from the body of the book without chapter headings. Other editions are
accepted: their names end in the start of their checksum, and a warning prints the differences.
Gutenberg's header and licence are removed from any file.
"""

from __future__ import annotations

import hashlib
import re
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experiments.data.source import TEXT, Source
from experiments.files import write_bytes

NAME, LABEL, FILE = "war_and_peace", "War and Peace", "war_and_peace.txt"
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer
URL = "https://www.gutenberg.org/cache/epub/2600/pg2600.txt"

# The expected body, in UTF-8 with bare newlines.
SHA256 = "b0fc81c399971eaf738c8be89809e6a0d95c151749112b04f06b6af648d8a39f"
LENGTH = 3_196_211
OPENING = '"Well, Prince, so Genoa and Lucca'
CHARACTERS = "\n !\"'()*,-./0123456789:;=?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyzàäéê"

_HEADER = re.compile(r"^\*\*\* ?START OF TH(E|IS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)
_LICENCE = re.compile(r"^\*\*\* ?END OF TH(E|IS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)


@dataclass(frozen=True)
class Book:
    """A whole text, with bare newlines.

    Attributes:
        name: part of a run's identity.
        source: the file.
    """

    text: str
    source: str = FILE

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def name(self) -> str:
        return NAME if self.sha256 == SHA256 else f"{NAME}-{self.sha256[:8]}"

    @property
    def label(self) -> str:
        return label(self.name)

    def differences(self) -> list[str]:
        """The differences from the expected body, in words."""
        found = []
        if len(self.text) != LENGTH:
            found.append(f"it has {len(self.text):,} characters, not {LENGTH:,}")
        more, missing = set(self.text) - set(CHARACTERS), set(CHARACTERS) - set(self.text)
        for what, characters in (("has", more), ("lacks", missing)):
            if characters:
                some = "".join(sorted(characters)[:20])
                found.append(f"it {what} {len(characters)} distinct characters, such as {some!r}")
        if not self.text.startswith(OPENING):
            found.append(f"it begins {self.text[: len(OPENING)]!r}, not {OPENING!r}")
        return found or ["it differs somewhere inside"]


def label(name: str) -> str:
    edition = name.partition("-")[2]
    return f"{LABEL} (edition {edition})" if edition else LABEL


def _read(root: Path) -> Book | None:
    path = root / FILE
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 ({error}); remove it or set data.root to another folder"
        ) from None
    return Book(_stripped(text.replace("\r\n", "\n"), path))


def _stripped(text: str, path: Path) -> str:
    """Remove Project Gutenberg's header and licence, if the text has them."""
    header = _HEADER.search(text)
    if header is None:
        return text
    licence = _LICENCE.search(text, header.end())
    if licence is None:
        raise ValueError(
            f"{path} is cut short: it has Project Gutenberg's header, but not the licence at its "
            "end; remove it, and it is downloaded again"
        )
    return text[header.end() : licence.start()].strip()


def _download(path: Path) -> bool:
    """Download the book from Project Gutenberg; returns whether that worked."""
    try:
        with urllib.request.urlopen(URL, timeout=DOWNLOAD_TIMEOUT) as answer:
            content = answer.read()
    except OSError:
        return False
    if _HEADER.search(content.decode("utf-8-sig", errors="replace")) is None:
        return False  # another page
    write_bytes(path, content)
    return True


class Corpus(Source):
    """The book, in any edition."""

    def knows(self, name: str) -> bool:
        return name.partition("-")[0] == self.name

    def label_of(self, name: str) -> str:
        return label(name)

    def is_whole(self, name: str) -> bool:
        return name == self.name

    def load(self, name: str, root: str | Path) -> Book:
        found = _read(Path(root))
        if found is None:
            raise FileNotFoundError(f"there is no {FILE} under {root}")
        if found.name != name:
            raise ValueError(
                f"{FILE} under {root} is {found.label}, not {label(name)}; replace the file, or "
                "set data.root to the folder with the right edition"
            )
        return found

    def resolve(self, name: str, root: str | Path, download: bool) -> str:
        found = _read(Path(root))
        if found is None and download and _download(Path(root, FILE)):
            found = _read(Path(root))
        if found is None:
            raise ValueError(
                f"{LABEL} is not under {str(root)!r}"
                f"{' and it could not be downloaded' if download else ''}; put {FILE} (its text in "
                "UTF-8) there, or set data.root or HYPEROPT_DATA to its folder"
            )
        return found.name if name == self.name else self.load(name, root).name

    def warning(self, found: str, root: str | Path, download: bool) -> str:
        differences = "; ".join(self.load(found, root).differences())
        return (
            f"The book under {root!r} differs from the edition of the stored results: "
            f"{differences}.\n"
            "Perplexities are NOT comparable with the stored ones. All outputs are labelled "
            f"{label(found)}."
        )


BOOK = Corpus(NAME, LABEL, TEXT)
SOURCES = (BOOK,)

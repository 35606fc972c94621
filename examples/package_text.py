"""Text of another kind than source code that is on every machine: what installed packages say about themselves.

Licenses, notices, reStructuredText, plain text, and the long descriptions in packages' METADATA.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train_text import Text, to_tensor

NAMES = re.compile(r"(LICEN[CS]E|COPYING|NOTICE).*|METADATA|.*\.(rst|txt)", re.IGNORECASE)
# Lists of names rather than text.
LEFT_OUT_NAMES = {"top_level.txt", "entry_points.txt", "sources.txt", "requires.txt", "dependency_links.txt"}
LEFT_OUT_FOLDERS = {"test", "tests", "__pycache__"}
CODE = {".py", ".pyc", ".pyi"}  # a module may be called license.py
# Some packages carry the licenses of everything that they bundle: none is to make up most of the text.
DOCUMENT_BYTES = 64 * 1024
TOTAL_BYTES = 8 * 1024**2
LEAST_BYTES = 16 * 1024


def read_package_text(folder: Path | None = None) -> Text:
    """Reads the texts in `folder`, or for None of the installed packages, in sorted order, and splits them by file.

    The first of each ten files goes to validation. A paragraph that was read before, up to white space and case, is
    left out: many packages have the same license, which would make of validation a test of memory. Raises ValueError
    when there is too little to read.
    """
    root = Path(sysconfig.get_path("purelib")) if folder is None else folder
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    documents = list(_documents(root))
    total_bytes = sum(map(len, documents))
    if len(documents) < 2 or total_bytes < LEAST_BYTES:
        raise ValueError(
            f"{root} holds {len(documents)} files with {total_bytes} bytes of text (licenses, *.rst, *.txt, METADATA); "
            f"at least 2 with {LEAST_BYTES} are needed: name a folder that has more"
        )
    train = [content for index, content in enumerate(documents) if index % 10 != 0]
    source = "licenses and descriptions of installed packages" if folder is None else folder.resolve().name
    return Text(to_tensor(train), to_tensor(documents[::10]), source, len(documents))


def _documents(root: Path) -> Iterator[bytes]:
    """What is new in each file, in the order of their names, as long as there is room."""
    seen: set[bytes] = set()
    room_bytes = TOTAL_BYTES
    for path in sorted(path for path in root.rglob("*") if _is_text(path, root)):
        content = path.read_bytes()
        if b"\0" in content:
            continue
        if path.name == "METADATA":  # header lines, an empty line, and the description
            content = content.replace(b"\r\n", b"\n").partition(b"\n\n")[2]
        content = b"\n\n".join(_new_paragraphs(content[:DOCUMENT_BYTES], seen))
        room_bytes -= len(content)
        if room_bytes < 0:
            return
        if content:
            yield content


def _is_text(path: Path, root: Path) -> bool:
    wanted = NAMES.fullmatch(path.name) and path.suffix not in CODE and path.name.lower() not in LEFT_OUT_NAMES
    return bool(wanted) and not LEFT_OUT_FOLDERS & set(path.relative_to(root).parts) and path.is_file()


def _new_paragraphs(content: bytes, seen: set[bytes]) -> Iterator[bytes]:
    """The paragraphs of `content` that are not in `seen`, which they are added to."""
    for paragraph in re.split(rb"\n[ \t\r]*\n", content):
        key = b" ".join(paragraph.lower().split())
        if key and key not in seen:
            seen.add(key)
            yield paragraph.rstrip()

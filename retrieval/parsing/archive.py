"""Opens the archives that office documents and books are, and reads the XML in them.

The main rule: an archive is judged by its directory before anything is unpacked, nothing is ever written to a disk, and
no XML says what other file is to be read.
"""

import io
import posixpath
import zipfile
from collections.abc import Iterator
from typing import Any

from lxml import etree

from retrieval.documents import ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument

_SMALL_ENOUGH_BYTES = 10_000_000
# XML compresses about tenfold, thirtyfold at best; a bomb compresses a thousandfold.
_LARGEST_RATIO = 100
_MOST_PARTS = 20_000
_IS_ENCRYPTED = 0x1


def open_archive(content: bytes, limits: ParseLimits) -> zipfile.ZipFile:
    """Return the archive, if it is none of those that are made to harm.

    Raises:
        LimitExceeded: It would unpack to more than is allowed.
        UnreadableDocument: It is encrypted, or names parts outside of itself.
    """
    archive = zipfile.ZipFile(io.BytesIO(content))
    parts = archive.infolist()
    if len(parts) > _MOST_PARTS:
        message = f"the archive has {len(parts):,} parts; at most {_MOST_PARTS:,} are read: split it"
        raise LimitExceeded(message, "unpacked")
    unpacked = sum(part.file_size for part in parts)
    allowed = min(limits.max_uncompressed_bytes, max(_SMALL_ENOUGH_BYTES, _LARGEST_RATIO * len(content)))
    if unpacked > allowed:
        message = f"the archive unpacks to {unpacked:,} bytes; at most {allowed:,} are read: split it"
        raise LimitExceeded(message, "unpacked")
    for part in parts:
        if part.flag_bits & _IS_ENCRYPTED:
            raise UnreadableDocument("the archive is encrypted: save it without a password")
        if part.filename.startswith(("/", "\\")) or ".." in part.filename.replace("\\", "/").split("/"):
            raise UnreadableDocument(
                "the archive names a part outside of itself: it is damaged or hostile; save it anew"
            )
    return archive


def read_xml(archive: zipfile.ZipFile, name: str) -> Any:
    """Return the root of a part's XML, without comments.

    Raises:
        KeyError: The archive has no such part.
        UnreadableDocument: The part defines entities.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True)
    root = etree.fromstring(archive.read(name), parser)
    _refuse_entities(root)
    return root


def walk_xml(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[str, Any]]:
    """Yield `start` and `end` of a part's elements as they are read; whoever has seen enough of one clears it.

    Raises:
        KeyError: The archive has no such part.
        UnreadableDocument: The part defines entities.
    """
    with archive.open(name) as part:
        steps = etree.iterparse(
            part, events=("start", "end"), resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True
        )
        for index, (event, element) in enumerate(steps):
            if not index:
                _refuse_entities(element)
            yield event, element


def _refuse_entities(root: Any) -> None:
    declared = root.getroottree().docinfo.internalDTD
    if declared is not None and next(iter(declared.iterentities()), None) is not None:
        raise UnreadableDocument("its XML defines entities, as no program that writes documents does: save it anew")


def local(element: Any) -> str:
    """Return an element's name without its namespace, of which office documents have two sets."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def related(archive: zipfile.ZipFile, name: str) -> dict[str, tuple[str, str]]:
    """Return what a part is related to, by id: the last word of the relation's type, and the part's name."""
    folder, _, file = name.rpartition("/")
    try:
        root = read_xml(archive, f"{folder}/_rels/{file}.rels" if folder else f"_rels/{file}.rels")
    except KeyError:
        return {}
    return {
        element.get("Id", ""): (
            element.get("Type", "").rpartition("/")[2],
            part_beside(name, element.get("Target", "")),
        )
        for element in root
        if element.get("TargetMode") != "External"
    }


def part_beside(name: str, target: str) -> str:
    """Return the name of the part that `target` leads to from part `name`; it can lead nowhere else than inside."""
    return posixpath.normpath(posixpath.join("/", posixpath.dirname(name), target)).lstrip("/")


def title_in_properties(archive: zipfile.ZipFile) -> str | None:
    """Return the title that an office document's properties give it."""
    try:
        root = read_xml(archive, "docProps/core.xml")
    except KeyError:
        return None
    return next((element.text for element in root if local(element) == "title"), None)

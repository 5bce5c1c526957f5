"""`soci ztoc`: list and show tables of contents, and get a file out of a layer by one."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

from ..errors import Integrity, Invalid, NotFound
from ..formats import digest as digests
from ..formats import zinfo
from ..formats import ztoc as ztocs
from ..formats.digest import Digest
from ..formats.jsonfmt import encode
from ..formats.ztoc import Compression, Ztoc
from ..index.catalog import ZTOC_LIMIT, ListedBlob
from ..index.getfile import Contents, read_file
from .catalogs import AliasedGroup, opened
from .context import Globals
from .tables import print_json, print_table, rfc3339

# Entries of `ztoc info` written at once: layers have up to half a million.
_BATCH = 1000


@click.group(name="ztoc", cls=AliasedGroup)
def ztoc_command() -> None:
    """Manage ztocs, the tables of contents of layers."""


@click.command(name="list")
@click.option("--ztoc-digest", help="Only the ztoc of this digest.")
@click.option("--image-ref", help="Only ztocs of this image.")
@click.option("--quiet", "-q", is_flag=True, help="Print the digests only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_command(
    flags: Globals, *, ztoc_digest: str | None, image_ref: str | None, quiet: bool, as_json: bool
) -> None:
    """List the ztocs there are."""
    if quiet and as_json:
        raise Invalid("--quiet and --json exclude each other")
    wanted = digests.parse(ztoc_digest) if ztoc_digest else None
    with opened(flags) as here:
        indexes = here.of_image(image_ref) if image_ref else here.catalog.indexes()
        listed = [one for one in here.catalog.ztocs(indexes) if wanted in (None, one.digest)]
    if image_ref and wanted and not listed:
        raise NotFound(f"ztoc {wanted} is not here, or not one of image {image_ref}")
    if quiet:
        for one in listed:
            print(one.digest)
    elif as_json:
        print_json([_summary(one) for one in listed])
    else:
        rows = [(one.digest, str(one.size), one.layer_digest) for one in listed]
        print_table(("DIGEST", "SIZE", "LAYER DIGEST"), rows)


@click.command(name="info")
@click.argument("digest")
@click.option("--json", "as_json", is_flag=True, help="JSON it is in any case.")
@click.pass_obj
def info_command(flags: Globals, *, digest: str, as_json: bool) -> None:
    """Show what the ztoc DIGEST says of its layer, as JSON."""
    del as_json
    wanted = digests.parse(digest)
    with opened(flags) as here:
        try:
            data = here.catalog.read(wanted, ZTOC_LIMIT)
            ztoc = _decode(wanted, data)
        except Integrity:
            here.catalog.expect(wanted, "ztoc")
            raise
    for text in info_lines(ztoc, len(data)):
        print(text)


@click.command(name="get-file")
@click.argument("digest")
@click.argument("file")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to this file, not to stdout.")
@click.pass_obj
def get_file_command(flags: Globals, *, digest: str, file: str, output: Path | None) -> None:
    """Get FILE out of the layer that the ztoc DIGEST describes.

    The layer must be in containerd. Links are followed within it; FILE matches with and without ./ or / in front.
    """
    wanted = digests.parse(digest)
    with opened(flags) as here, contextlib.ExitStack() as stack:
        listed = here.catalog.ztoc(wanted)
        data = here.catalog.read(wanted, ZTOC_LIMIT)
        # Asked again when there was none: its error says why.
        client = here.client or stack.enter_context(flags.containerd())
        ztoc = _decode(wanted, data)
        entry = Contents(ztoc.entries).find(os.fsencode(file))
        layer = listed.layer_digest
        try:
            size = client.content.info(layer).size
        except NotFound:
            names = here.image_names().get(listed.image) or ("IMAGE",)
            raise NotFound(
                f"layer {layer} is not in containerd's content store (pulled lazily, or discarded after "
                f"unpacking); get it with: ctr content fetch {names[0]}"
            ) from None
        with _output(output) as out:
            try:
                for piece in read_file(
                    ztoc, data, entry, size, lambda offset, count: client.content.read(layer, offset, count)
                ):
                    out.write(piece)
            except Integrity as error:
                raise Integrity(f"layer {layer}: {error}") from None


def info_lines(ztoc: Ztoc, size: int) -> Iterator[str]:
    """The Go tool's JSON for a ztoc of `size` bytes, in pieces of whole lines."""
    spans = zinfo.span_table(ztoc)

    def span_of(offset: int) -> int:
        # As the Go tool counts, which does not look for the end of an uncompressed layer.
        tar = ztoc.compression is Compression.UNCOMPRESSED
        return offset // spans.span_size if tar else spans.span_at(offset)

    ranges = [(span_of(entry.offset), span_of(entry.offset + entry.size)) for entry in ztoc.entries]
    head: tuple[tuple[str, str | int], ...] = (
        ("version", ztoc.version),
        ("build_tool", ztoc.build_tool),
        ("size", size),
        ("span_size", spans.span_size),
        ("num_spans", len(spans)),
        ("num_files", len(ztoc.entries)),
        ("num_multi_span_files", sum(first != last for first, last in ranges)),
    )
    lines = ["{", *(f'  "{key}": {encode(value).decode()},' for key, value in head)]
    if not ztoc.entries:
        yield "\n".join([*lines, '  "files": null', "}"])
        return
    lines.append('  "files": [')
    for number, (entry, (first, last)) in enumerate(zip(ztoc.entries, ranges, strict=True), 1):
        lines += [
            "    {",
            f'      "filename": {encode(_text(entry.name)).decode()},',
            f'      "offset": {entry.offset},',
            f'      "size": {entry.size},',
            f'      "type": "{entry.type}",',
            f'      "start_span": {first},',
            f'      "end_span": {last}',
            "    }," if number < len(ztoc.entries) else "    }",
        ]
        if number % _BATCH == 0:
            yield "\n".join(lines)
            lines = []
    yield "\n".join([*lines, "  ]", "}"])


def _decode(digest: Digest, data: bytes) -> Ztoc:
    try:
        return ztocs.decode(data)
    except Integrity as error:
        raise Integrity(f"{digest}: {error}") from None


def _text(name: bytes) -> str:
    """A name as Go's JSON shows it: U+FFFD for each byte that is not part of UTF-8."""
    text = name.decode("utf-8", "surrogateescape")
    return "".join("\ufffd" if "\udc80" <= character <= "\udcff" else character for character in text)


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[BinaryIO]:
    """stdout, or a file that appears at `path` whole or not at all. What is no regular file is written into."""
    if path is None or str(path) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(os.path.realpath(path))  # a link stays, what it leads to is replaced
    if target.exists() and not target.is_file():
        with target.open("wb", buffering=0) as special:  # a directory is refused by the system
            yield special
        return
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _summary(one: ListedBlob) -> dict[str, object]:
    return {
        "digest": one.digest,
        "size": one.size,
        "layer_digest": one.layer_digest,
        "span_size": one.span_size or None,
        "index_digest": one.index,
        "created_at": rfc3339(one.created_ns),
        "content_store": one.store,
    }


ztoc_command.add_command(list_command)
ztoc_command.add_command(info_command)
ztoc_command.add_command(get_file_command)

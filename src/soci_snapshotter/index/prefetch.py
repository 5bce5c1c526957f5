"""The prefetch artifacts of an image: which spans the wanted files lie in, from the ztocs of all its layers.

Layers that are too small to get a ztoc in the index have one here all the same: a program's script often lies in
such a layer, and what it hides or links to in the others depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..formats import digest as digests
from ..formats import prefetch, ztoc
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.sociindex import PrefetchDescriptor
from ..formats.zinfo import span_table
from ..policy.prefetchset import LayerContents, Wanted, merged, plan
from .closure import closure
from .imagereader import ImageReader, LayerReader
from .images import LocalImage
from .places import ImageContent


@dataclass(frozen=True, slots=True)
class PrefetchRequest:
    """What a container should find at hand: paths and globs in the image, and, with `auto`, what its own program is
    made of.
    """

    wanted: tuple[Wanted, ...] = ()
    auto: bool = False

    def __bool__(self) -> bool:
        return bool(self.wanted) or self.auto


@dataclass(frozen=True, slots=True)
class Prefetched:
    """Artifacts in layer order, with their bytes; a line for each thing that could not be had, and a summary."""

    artifacts: tuple[tuple[PrefetchDescriptor, bytes], ...]
    warnings: tuple[str, ...]
    files: int
    size: int


def prefetch_artifacts(
    content: ImageContent,
    image: LocalImage,
    ztocs: Mapping[Digest, Path],
    indexed: frozenset[Digest],
    request: PrefetchRequest,
) -> Prefetched:
    """The artifacts of one image. `ztocs`: the ztoc's file by layer; `indexed`: the layers whose ztoc is published.

    Raises Integrity when a layer that --prefetch-auto reads is not what its ztoc says.
    """
    layers: list[LayerContents] = []
    readers: list[LayerReader | None] = []
    for layer in image.manifest.layers:
        contents, reader = _layer(content, layer, ztocs.get(layer.digest), published=layer.digest in indexed)
        layers.append(contents)
        readers.append(reader)
    tree = merged(layers)
    warnings = plan(layers, request.wanted, tree).warnings
    wanted = request.wanted
    if request.auto:
        found = closure(tree, image.config.config, ImageReader(readers))
        # Parts of it may lie in small layers, which are pulled whole: nobody need be warned of that.
        wanted = (*wanted, *map(Wanted, found.paths))
        warnings = (*warnings, *found.warnings)
    result = plan(layers, wanted, tree)
    artifacts = tuple(
        _artifact(digest, prefetch.encode(result.spans[digest]))
        for digest in dict.fromkeys(layer.digest for layer in image.manifest.layers)
        if result.spans.get(digest)
    )
    return Prefetched(artifacts, warnings, result.files, result.size)


def _layer(
    content: ImageContent, layer: Descriptor, file: Path | None, *, published: bool
) -> tuple[LayerContents, LayerReader | None]:
    if file is None:
        return LayerContents(layer.digest, None, None), None
    data = file.read_bytes()
    decoded = ztoc.decode(data)
    spans = span_table(decoded, layer.size)
    reader = LayerReader(spans, data, _reading(content, layer))
    return LayerContents(layer.digest, decoded.entries, spans if published else None), reader


def _reading(content: ImageContent, layer: Descriptor) -> Callable[[int, int], Iterable[bytes]]:
    return lambda offset, size: content.read_range(layer, offset, size)


def _artifact(layer: Digest, data: bytes) -> tuple[PrefetchDescriptor, bytes]:
    return PrefetchDescriptor(digests.sha256(data), len(data), layer), data

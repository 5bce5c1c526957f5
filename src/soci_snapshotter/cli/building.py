"""What `create` and `convert` share: their flags, and indexing images with a word about each layer."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from ..errors import Invalid, Unsupported
from ..formats import prefetch
from ..formats.digest import Digest
from ..formats.oci import Descriptor, Index, Platform
from ..index.create import (
    BUILD_TOOL,
    DEFAULT_MIN_LAYER_SIZE,
    DEFAULT_SPAN_SIZE,
    OPTIMIZATIONS,
    CreateOptions,
    Hooks,
    Indexed,
    Known,
    index_image,
)
from ..index.images import images_of
from ..index.known import known_ztocs
from ..index.outputs import Blob
from ..index.places import ImageContent, Place
from ..index.prefetch import Prefetched, PrefetchRequest
from ..index.sinks import Store
from ..index.workers import Built, Outcome
from ..policy.prefetchset import Wanted
from ..store.artifacts import Artifacts
from .context import Bytes, Globals, wanted_platforms
from .progress import Meter, Task, metering

_SHORT = 12


@dataclass(frozen=True, slots=True)
class BuildFlags:
    """The flags of create and convert, as they were given."""

    platforms: tuple[str, ...]
    all_platforms: bool
    span_size: int
    min_layer_size: int
    optimizations: tuple[str, ...]
    force: bool
    prefetch_files: tuple[str, ...]
    prefetch_files_json: Path | None
    prefetch_auto: bool
    quiet: bool
    build_tool: str
    standalone: bool
    from_registry: bool

    def options(self) -> CreateOptions:
        """As the index room takes them; Invalid names an unknown optimization."""
        for name in self.optimizations:
            if name not in OPTIMIZATIONS:
                raise Invalid(f"--optimizations {name!r}: unknown; there is: {', '.join(OPTIMIZATIONS)}")
        if self.standalone and self.from_registry:
            raise Invalid("--standalone and --from-registry exclude each other")
        return CreateOptions(
            span_size=self.span_size,
            min_layer_size=self.min_layer_size,
            optimizations=frozenset(self.optimizations),
            build_tool=self.build_tool,
            prefetch=self._prefetch(),
        )

    def _prefetch(self) -> PrefetchRequest:
        paths = prefetch.paths(self.prefetch_files)
        if self.prefetch_files_json is not None:
            paths = (*paths, *_listed(self.prefetch_files_json))
        return PrefetchRequest(tuple(map(Wanted, paths)), self.prefetch_auto)

    def wanted(self) -> list[Platform] | None:
        """The platforms; None for all."""
        return wanted_platforms(self.platforms, everything=self.all_platforms)


def build_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with the flags that say how to index; it gets them as `build`, a BuildFlags."""

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever click gives the command
        own = {each.name: kwargs.pop(each.name) for each in fields(BuildFlags)}
        return command(*args, build=BuildFlags(**own), **kwargs)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered


_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option("--platform", "-p", "platforms", multiple=True, help="os/arch[/variant]; may be repeated."),
    click.option("--all-platforms", is_flag=True, help="Every platform that is there."),
    click.option(
        "--span-size",
        type=Bytes(),
        default=DEFAULT_SPAN_SIZE,
        show_default=True,
        help="Uncompressed bytes between checkpoints.",
    ),
    click.option(
        "--min-layer-size",
        type=Bytes(zero=True),
        default=DEFAULT_MIN_LAYER_SIZE,
        show_default=True,
        help="Smaller layers get no ztoc and are pulled whole.",
    ),
    click.option(
        "--optimizations", multiple=True, metavar="NAME", help=f"Any of: {', '.join(OPTIMIZATIONS)}."
    ),
    click.option("--force", "-f", is_flag=True, help="Make ztocs again that are there already."),
    click.option(
        "--prefetch-file",
        "prefetch_files",
        multiple=True,
        metavar="PATH",
        help="A file, directory or glob of the image to fetch first; may be repeated.",
    ),
    click.option(
        "--prefetch-files-json",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A JSON array of such paths.",
    ),
    click.option(
        "--prefetch-auto",
        is_flag=True,
        help="Fetch first what the image's own program is made of: it, its interpreter and their libraries.",
    ),
    click.option(
        "--build-tool",
        default=BUILD_TOOL,
        show_default=True,
        help="The tool that the artifacts name; the same bytes as another tool's need its name.",
    ),
    click.option("--quiet", "-q", is_flag=True, help="Print the resulting digest only."),
    click.option(
        "--standalone", is_flag=True, help="Read an OCI layout (directory or tar); needs no containerd."
    ),
    click.option(
        "--from-registry", is_flag=True, help="Read from the registry and push the result; no containerd."
    ),
)


def _listed(path: Path) -> tuple[bytes, ...]:
    try:
        with path.open("rb") as file:
            data = file.read(prefetch.MAX_LIST + 1)
    except OSError as error:
        raise Invalid(f"--prefetch-files-json {path}: {error.strerror}") from None
    try:
        return prefetch.decode_list(data)
    except Invalid as error:
        raise Invalid(f"--prefetch-files-json {path}: {error}") from None


class Session:
    """One command's indexing: a scratch directory, bars, and a line per layer on stdout unless quiet."""

    def __init__(self, flags: BuildFlags, scratch: Path, meter: Meter) -> None:
        self._flags = flags
        self._options = flags.options()
        self._wanted = flags.wanted()
        self._scratch = scratch
        self._meter = meter
        self._tasks: dict[Digest, Task] = {}
        self._uploads: dict[Digest, Task] = {}
        self._lock = threading.Lock()
        self._known: Known | None = None

    @property
    def build_tool(self) -> str:
        """What the artifacts say that made them."""
        return self._options.build_tool

    def reuse(self, artifacts: Artifacts, store: Store, namespace: str) -> None:
        """Take ztocs from earlier indexes of this store, unless --force."""
        if not self._flags.force:
            records = artifacts.all()
            own = [
                each.digest for each in records if each.store == store.name and each.namespace == namespace
            ]
            self._known = known_ztocs(store, own)

    def say(self, text: str) -> None:
        """A line on stdout."""
        if not self._flags.quiet:
            print(text, flush=True)

    def result(self, text: str, digest: Digest) -> None:
        """The command's result: a line, or the digest alone with --quiet."""
        print(digest if self._flags.quiet else text, flush=True)

    def index(
        self, place: Place, content: ImageContent, name: str, root: Descriptor | Index
    ) -> list[Indexed]:
        """Index the wanted platforms of `root`.

        With several platforms one may have nothing to index; only if none has anything, that is an error.
        """
        implied = not self._flags.platforms
        images = images_of(content, root, name, self._wanted, implied=implied)
        indexed, refused = [], []
        for image in images:
            for layer in image.manifest.layers:
                if layer.digest not in self._tasks:
                    self._tasks[layer.digest] = self._meter.task(layer.digest.hex[:_SHORT], layer.size)
            try:
                done = index_image(place, content, image, self._options, self._scratch, self._hooks())
            except (Invalid, Unsupported) as error:
                refused.append(error)
                continue
            for skipped in done.skipped:
                self.say(f"layer {skipped.layer.digest} skipped: {skipped.why}")
            self._report(done.prefetch)
            indexed.append(done)
        if not indexed:
            raise refused[0]
        for refusal in refused:
            self.say(f"skipped: {refusal}")
        return indexed

    def _report(self, done: Prefetched) -> None:
        for warning in done.warnings:
            print(f"soci: warning: prefetch: {warning}", file=sys.stderr)
        for descriptor, _ in done.artifacts:
            self.say(f"layer {descriptor.layer_digest} -> prefetch {descriptor.digest}")
        if done.artifacts:
            self.say(f"prefetch: {done.files} files, {done.size} bytes")

    def advance(self, layer: Digest, count: int, state: str) -> None:
        """So many bytes of a layer are done."""
        if layer in self._tasks:
            self._tasks[layer].advance(count, state)

    def pushed(self, blob: Blob, count: int) -> None:
        """So many bytes of a blob were sent; negative: they have to go again. For any thread."""
        with self._lock:
            task = self._uploads.get(blob.digest)
            if task is None:
                label = blob.digest.hex[:_SHORT]
                task = self._uploads[blob.digest] = self._meter.task(label, blob.descriptor.size, "pushing")
        task.advance(count)

    def _hooks(self) -> Hooks:
        hooks = Hooks(told=lambda layer, count: self.advance(layer, count, "indexing"), outcome=self._outcome)
        return hooks if self._known is None else Hooks(hooks.told, hooks.outcome, self._remember)

    def _outcome(self, outcome: Outcome) -> None:
        if outcome.layer in self._tasks:
            self._tasks[outcome.layer].finish()
        if isinstance(outcome, Built):
            self.say(f"layer {outcome.layer} -> ztoc {outcome.digest} ({outcome.size} bytes)")

    def _remember(self, layer: Descriptor, span_size: int, tool: str) -> tuple[Digest, bytes] | None:
        known = None if self._known is None else self._known(layer, span_size, tool)
        if known is not None:
            self.say(f"layer {layer.digest} -> ztoc {known[0]} (already exists)")
            if layer.digest in self._tasks:
                self._tasks[layer.digest].finish("known")
        return known


@contextlib.contextmanager
def building(flags: BuildFlags) -> Iterator[Session]:
    """A Session; whatever it left in its scratch directory goes with it."""
    with tempfile.TemporaryDirectory(prefix="soci-") as scratch, metering(quiet=flags.quiet) as meter:
        yield Session(flags, Path(scratch), meter)


def summary(indexed: Indexed, digest: Digest) -> str:
    """One line about one platform's index."""
    layers = len(indexed.image.manifest.layers)
    return f"index {digest} ({indexed.image.platform}): {len(indexed.ztocs)} of {layers} layers"


def exclusive(globals_: Globals, flags: BuildFlags) -> None:
    """Invalid for a content store where none is used."""
    if (flags.standalone or flags.from_registry) and globals_.content_store != "containerd":
        how = "--standalone" if flags.standalone else "--from-registry"
        raise Invalid(
            f"--content-store {globals_.content_store!r} has no use with {how}, which stores nothing here"
        )

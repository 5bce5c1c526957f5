"""`soci prefetch`: list and show prefetch artifacts."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import click

from ..errors import Integrity, NotFound
from ..formats import digest as digests
from ..formats import prefetch
from ..formats.digest import Digest
from ..formats.prefetch import SpanRange
from ..index.catalog import ListedBlob
from ..store.artifacts import now_ns
from .catalogs import AliasedGroup, Opened, opened
from .context import Globals
from .tables import age, print_json, print_table, rfc3339


@click.group(name="prefetch", cls=AliasedGroup)
def prefetch_command() -> None:
    """Manage prefetch artifacts: what is fetched of a layer before anybody reads it."""


@click.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_command(flags: Globals, *, as_json: bool) -> None:
    """List the prefetch artifacts there are."""
    with opened(flags) as here:
        listed = here.catalog.prefetches(here.catalog.indexes())
        totals = [_total_or_none(here, one.digest) for one in listed]
    if as_json:
        print_json([_summary(one, total) for one, total in zip(listed, totals, strict=True)])
        return
    now = now_ns()
    rows = [
        (one.digest, one.layer_digest, "N/A" if total is None else str(total), age(one.created_ns, now))
        for one, total in zip(listed, totals, strict=True)
    ]
    print_table(("DIGEST", "LAYER DIGEST", "SPANS", "CREATED"), rows)


@click.command(name="info")
@click.argument("digest")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def info_command(flags: Globals, *, digest: str, as_json: bool) -> None:
    """Show the prefetch artifact DIGEST."""
    wanted = digests.parse(digest)
    with opened(flags) as here:
        one = here.catalog.prefetch(wanted)
        spans = prefetch.decode(here.catalog.read(wanted, prefetch.MAX_SIZE))
    if as_json:
        print_json(
            {
                "digest": one.digest,
                "version": prefetch.VERSION,
                "layer_digest": one.layer_digest,
                "size": one.size,
                "index_digest": one.index,
                "created_at": rfc3339(one.created_ns),
                "content_store": one.store,
                "total_spans": _total(spans),
                "prefetch_spans": [
                    {"start_span": span.start, "end_span": span.end, "priority": span.priority}
                    for span in spans
                ],
            }
        )
        return
    _print(one, spans)


def _print(one: ListedBlob, spans: Sequence[SpanRange]) -> None:
    """The Go tool's layout."""
    created = datetime.datetime.fromtimestamp(one.created_ns // 10**9).astimezone()
    print(f"Digest:        {one.digest}")
    print(f"Version:       {prefetch.VERSION}")
    print(f"Span Ranges:   {len(spans)}")
    print(f"Layer Digest:  {one.layer_digest}")
    print(f"Size:          {one.size} bytes")
    print(f"Created:       {created:%Y-%m-%d %H:%M:%S}")
    print("\nPrefetch Spans:")
    for number, span in enumerate(spans):
        count = span.end - span.start + 1
        print(f"  [{number}] StartSpan: {span.start}, EndSpan: {span.end} (covers {count} spans)")
        if span.priority:
            print(f"      Priority: {span.priority}")
    print(f"\nTotal spans to prefetch: {_total(spans)}")


def _total(spans: Sequence[SpanRange]) -> int:
    return sum(span.end - span.start + 1 for span in spans)


def _total_or_none(here: Opened, digest: Digest) -> int | None:
    """The number of spans; None for an artifact that cannot be read, which is listed all the same."""
    try:
        return _total(prefetch.decode(here.catalog.read(digest, prefetch.MAX_SIZE)))
    except (NotFound, Integrity):
        return None


def _summary(one: ListedBlob, total: int | None) -> dict[str, object]:
    created = rfc3339(one.created_ns)
    return {
        "digest": one.digest,
        "size": one.size,
        "layer_digest": one.layer_digest,
        "total_spans": total,
        "index_digest": one.index,
        "created_at": created,
        "content_store": one.store,
        # The Go tool's names for the same, which scripts know.
        "Digest": one.digest,
        "LayerDigest": one.layer_digest,
        "TotalSpans": -1 if total is None else total,
        "CreatedAt": created,
    }


prefetch_command.add_command(list_command)
prefetch_command.add_command(info_command)

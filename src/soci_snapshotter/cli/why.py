"""`soci why REF`: whether an image would be lazy here, layer by layer, and why not."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from ..daemon import config as configs
from ..formats import digest as digests
from ..formats.oci import parse_platform
from ..layers.why import Answer, LayerAnswer, Modes, explain
from .context import host_platform, image_reference
from .registries import RegistryFlags, open_registry, registry_options

# See --help of soci: not an error, but an answer that scripts ask for.
NOT_LAZY = 3


@click.command(name="why")
@click.argument("ref")
@click.option("--platform", "-p", help="os/arch[/variant]; default: this machine's.")
@click.option("--soci-index-digest", help="Use this SOCI index instead of looking for one.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="SOCI_SNAPSHOTTER_CONFIG",
    default=configs.DEFAULT_PATH,
    show_default=True,
    show_envvar=True,
    help="The daemon's config.toml: which indexes it looks for.",
)
@click.option("--quick", is_flag=True, help="Believe ztocs without fetching them.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one object with the notes and an array of layers."
)
@registry_options
@click.pass_context
def why_command(
    ctx: click.Context,
    *,
    ref: str,
    platform: str | None,
    soci_index_digest: str | None,
    config: Path,
    quick: bool,
    as_json: bool,
    registry: RegistryFlags,
) -> None:
    """Ask the registry of the image REF which of its layers would be lazy on this node, and why others would not.

    Exits with 0 when at least one layer would be lazy, with 3 when none would. containerd is not asked; whether this
    node can mount lazy layers at all is what `soci doctor` says.
    """
    reference = image_reference(ref)
    explicit = digests.parse(soci_index_digest) if soci_index_digest else None
    wanted = parse_platform(platform) if platform else host_platform()
    loaded, _ = configs.load(config)
    modes = Modes(
        v1=loaded.pull_modes.soci_v1.enable,
        v2=loaded.pull_modes.soci_v2.enable,
        tag=loaded.pull_modes.soci_v1.index_tag,
        min_layer_size=loaded.snapshotter.min_layer_size,
    )
    with open_registry(registry, reference) as client:
        answer = explain(client, reference, wanted, modes, explicit=explicit, quick=quick)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(_document(answer)), indent=2).decode())
    else:
        _print(answer)
    if not answer.lazy:
        ctx.exit(NOT_LAZY)


def _document(answer: Answer) -> dict[str, object]:
    """For --json: the answer's own fields, and `lazy` for the image and each layer."""
    layers = [{"lazy": layer.lazy, **_fields(layer)} for layer in answer.layers]
    return {"lazy": answer.lazy, **_fields(answer), "layers": layers}


def _fields(value: Answer | LayerAnswer) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(value, enc_hook=str)  # digests are more than text
    return fields


def _print(answer: Answer) -> None:
    print(f"{answer.reference} {answer.manifest}")
    if answer.index is None:
        print("no SOCI index")
    else:
        print(f"SOCI index {answer.index} (v{answer.version})")
    for note in answer.notes:
        print(f"note: {note}")
    for layer in answer.layers:
        click.secho("lazy   " if layer.lazy else "local  ", fg="green" if layer.lazy else "yellow", nl=False)
        print(f"{layer.digest} {layer.size} bytes: {_spoken(layer)}")
    lazy = sum(layer.lazy for layer in answer.layers)
    print(f"{lazy} of {len(answer.layers)} layers lazy")


def _spoken(layer: LayerAnswer) -> str:
    if layer.why is not None:
        return layer.why
    parts = [f"ztoc {layer.ztoc} ({layer.ztoc_size} bytes)"]
    if layer.span_size is not None:
        count = f"{layer.spans} " if layer.spans is not None else ""
        parts.append(f"{count}spans of {layer.span_size} bytes")
    if layer.files is not None:
        parts.append(f"{layer.files} entries")
    return ", ".join(parts)

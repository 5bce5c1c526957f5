"""Platforms: parsing `linux/arm64/v8`, normalising names, and which images run on which machine.

The rules are those of containerd's platforms package: they decide which image a pull takes.
"""

from __future__ import annotations

import re

from msgspec import Struct, field

from soci_snapshotter.errors import Invalid

_ARCHITECTURES = {
    "i386": ("386", ""),
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
}
_SYSTEMS = {"linux", "windows", "darwin", "freebsd"}
_PART = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


class Platform(Struct, frozen=True, omit_defaults=True):
    """An OCI platform; field order is the order of keys in JSON (FORMATS.md 5)."""

    architecture: str
    os: str
    os_version: str = field(name="os.version", default="")
    os_features: tuple[str, ...] = field(name="os.features", default=())
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def same_as(self, other: Platform) -> bool:
        """Equal system, architecture and variant; both must be normalised."""
        return (self.os, self.architecture, self.variant) == (other.os, other.architecture, other.variant)

    def normalized(self) -> Platform:
        """Aliases resolved and default variants in one form: amd64 v1 and arm64 v8 have none, arm is v7."""
        os = self.os.lower()
        architecture, implied = _ARCHITECTURES.get(self.architecture.lower(), (self.architecture.lower(), ""))
        variant = self.variant.lower() or implied
        if variant.isdigit():
            variant = "v" + variant
        if architecture == "arm" and not variant:
            variant = "v7"
        if (architecture, variant) in {("amd64", "v1"), ("arm64", "v8")}:
            variant = ""
        return Platform(
            architecture, "darwin" if os == "macos" else os, self.os_version, self.os_features, variant
        )


def parse_platform(text: str) -> Platform:
    """Parse `os/arch[/variant]` or `arch` alone (of Linux) and normalise it; Invalid names the text."""
    parts = text.split("/")
    if len(parts) > 3 or not all(_PART.fullmatch(part) for part in parts):
        raise Invalid(f"platform {text[:160]!r}: want os/architecture[/variant], such as linux/amd64")
    if len(parts) == 1:
        if parts[0].lower() in _SYSTEMS:
            raise Invalid(f"platform {text!r}: the architecture is missing; want linux/amd64, say")
        return Platform(parts[0], "linux").normalized()
    return Platform(parts[1], parts[0], variant=parts[2] if len(parts) == 3 else "").normalized()


def matching(platform: Platform) -> list[Platform]:
    """Platforms whose images run on `platform`, best first, itself in front (containerd's platforms.Only)."""
    own = platform.normalized()
    return [Platform(arch, own.os, variant=variant).normalized() for arch, variant in _runs(own)]


def _runs(own: Platform) -> list[tuple[str, str]]:
    arch, variant = own.architecture, own.variant
    level = int(variant[1:]) if re.fullmatch(r"v[1-9]", variant, re.ASCII) else 0
    if arch == "amd64":
        return [("amd64", f"v{lower}") for lower in range(level or 1, 0, -1)] + [("386", "")]
    if arch == "arm" and level:
        return [("arm", f"v{lower}") for lower in range(level, min(level, 5) - 1, -1)]
    if arch == "arm64":
        newer = [("arm64", f"v{lower}") for lower in range(level or 8, 7, -1)]
        return newer + [("arm", f"v{lower}") for lower in range(8, 4, -1)]
    return [(arch, variant)]

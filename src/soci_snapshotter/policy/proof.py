"""Whether a layer's bytes are what a snapshot says they are (HOUSE.md, "Proof").

A DiffID is the sha256 of a layer's tar; a chain ID names a layer on top of those below it (image-spec, config.md). A
snapshot says which chain ID it has. When its layer is complete the two are held against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import Invalid
from ..formats import digest as digests
from ..formats import oci
from ..formats.digest import Digest

# What containerd's unpacker sets since 1.7: the image config's DiffID of the layer.
DIFF_ID = "containerd.io/snapshot/diff-id"


@dataclass(frozen=True)
class Claim:
    """What one snapshot says of its layer.

    `target`: its chain ID. `parent_chain_id`: its parent's, "" for a bottom layer, None when the parent does not say.
    `diff_id`: what label DIFF_ID says, "" without one. `image` is for the log; `snapshot` is the row, 0 before there
    is one.
    """

    target: str
    parent_chain_id: str | None
    diff_id: str
    image: str
    snapshot: int = 0

    @property
    def provable(self) -> bool:
        """Whether a DiffID can be held against it."""
        return bool(self.diff_id) or self.parent_chain_id is not None

    def fits(self, diff_id: str) -> bool:
        """Whether a layer with this DiffID is what the snapshot says. False for a claim that proves nothing.

        The label goes first: a snapshot that is rebased on its parent at commit has none yet, and its chain ID says
        nothing about the layer alone.
        """
        if self.diff_id:
            return self.diff_id == diff_id
        if self.parent_chain_id is None:
            return False
        return chain_id(self.parent_chain_id, diff_id) == self.target


@dataclass(frozen=True)
class Judgement:
    """What becomes of a complete layer's snapshots. `condemned`: the claims it does not fit.

    `proven`: it fits one of them, or has none to fit. Otherwise the layer itself is not to be served.
    """

    condemned: tuple[Claim, ...]
    proven: bool


def claim_of(
    labels: Mapping[str, str], *, target: str, parent_chain_id: str | None, image: str, snapshot: int = 0
) -> Claim:
    """The claim of a snapshot with these labels; a label that is no digest counts as none."""
    label = labels.get(DIFF_ID, "")
    return Claim(target, parent_chain_id, label if _parsed(label) else "", image, snapshot)


def chain_id(parent: str, diff_id: str) -> str:
    """The chain ID of a layer above `parent` ("" for none); "" when one of the two is no digest."""
    layer, below = _parsed(diff_id), _parsed(parent)
    if layer is None or (parent and below is None):
        return ""
    if below is None:
        return str(layer)
    return str(oci.chain_ids([below, layer])[-1])


def judge(diff_id: str, claims: Iterable[Claim]) -> Judgement:
    """Hold a complete layer's DiffID against all its snapshots' claims."""
    claims = tuple(claims)
    condemned = tuple(claim for claim in claims if not claim.fits(diff_id))
    return Judgement(condemned, len(condemned) < len(claims) or not claims)


def _parsed(text: str) -> Digest | None:
    try:
        return digests.parse(text)
    except Invalid:
        return None

"""Which complete layers may serve which snapshots: a playbook."""

from __future__ import annotations

import pytest

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.policy.proof import DIFF_ID, Claim, chain_id, claim_of, judge

A, B, C = (digests.sha256(text) for text in (b"a", b"b", b"c"))
AB, ABC = oci.chain_id([A, B]), oci.chain_id([A, B, C])


def test_chain_ids_are_those_of_the_image_specification() -> None:
    """One layer on top of a chain gives what all layers together give; nonsense gives nothing."""
    assert chain_id("", A) == A
    assert chain_id(chain_id(A, B), C) == ABC
    assert chain_id("default/3/mine", B) == ""
    assert chain_id(A, "sha256:short") == ""


@pytest.mark.parametrize(
    ("claim", "diff_id", "fits"),
    [
        (Claim(A, "", "", "i"), A, True),
        (Claim(A, "", "", "i"), B, False),
        (Claim(AB, A, "", "i"), B, True),
        (Claim(AB, A, "", "i"), C, False),
        (Claim(AB, C, "", "i"), B, False),  # right bytes, wrong place
        (Claim(ABC, "", C, "i"), C, True),  # rebased at commit: only the label tells
        (Claim(AB, A, C, "i"), B, False),  # the label goes first
        (Claim(AB, None, "", "i"), B, False),  # nothing to hold it against
        (Claim(AB, None, B, "i"), B, True),
    ],
)
def test_claims(claim: Claim, diff_id: str, fits: bool) -> None:
    """By the label if there, else by chain(parent, DiffID) == target, else not at all."""
    assert claim.fits(diff_id) is fits


def test_labels_become_claims() -> None:
    """The label is taken when it is a digest; what is none counts as absent, and the chain decides."""
    assert claim_of({DIFF_ID: B}, target=AB, parent_chain_id=None, image="i").diff_id == B
    odd = claim_of({DIFF_ID: "sha256:zz"}, target=AB, parent_chain_id=A, image="i", snapshot=7)
    assert (odd.diff_id, odd.snapshot, odd.provable, odd.fits(B)) == ("", 7, True, True)
    assert not claim_of({}, target=AB, parent_chain_id=None, image="i").provable


def test_a_lie_harms_nobody_else() -> None:
    """A directory that one snapshot proves stays; the snapshots that it does not fit are condemned, and only they."""
    honest, liar = Claim(AB, A, "", "honest", 1), Claim(ABC, AB, "", "liar", 2)
    found = judge(B, [honest, liar])
    assert (found.condemned, found.proven) == ((liar,), True)
    found = judge(B, [liar])
    assert (found.condemned, found.proven) == ((liar,), False)
    assert judge(B, [honest]).condemned == ()
    assert judge(B, []).proven

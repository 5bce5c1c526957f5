"""What Prepare decides."""

from __future__ import annotations

import pytest

from soci_snapshotter.errors import Precondition
from soci_snapshotter.policy.prepare import (
    IMAGE_LAYERS,
    IMAGE_REF,
    INDEX_DIGEST,
    LAYER_DIGEST,
    MANIFEST_DIGEST,
    TARGET,
    Decision,
    Defer,
    Options,
    Ordinary,
    TryLazy,
    chain_id_of,
    decide,
    namespace_of,
)

D = ["sha256:" + char * 64 for char in "0123456789"]
PULL = {
    TARGET: D[0],
    IMAGE_REF: "docker.io/library/nginx:latest",
    MANIFEST_DIGEST: D[1],
    LAYER_DIGEST: D[2],
    IMAGE_LAYERS: f"{D[2]},{D[3]}",
}
KEY = f"k8s.io/12/extract-1-x {D[0]}"


def choose(labels: dict[str, str], key: str = KEY, namespace: str = "", discover: bool = True) -> Decision:
    return decide(key, labels, namespace=namespace, options=Options(discover=discover))


def test_no_target_is_ordinary() -> None:
    """Without snapshot.ref the snapshot is a container's, whatever else is labelled."""
    assert choose({}) == choose({**PULL, TARGET: ""}) == Ordinary()


def test_full_labels_try_lazy() -> None:
    """A pull that describes its image is tried lazily, in the key's namespace without a header."""
    expected = TryLazy("k8s.io", PULL[IMAGE_REF], D[1], D[2], (D[2], D[3]), None, D[0])
    assert choose(PULL) == expected


def test_header_beats_key() -> None:
    """The call's own namespace is used when there is one."""
    chosen = choose(PULL, namespace="moby")
    assert isinstance(chosen, TryLazy)
    assert chosen.namespace == "moby"


def test_namespace_is_required() -> None:
    """A lazy try without any namespace is an error, an ordinary snapshot is not."""
    with pytest.raises(Precondition, match="namespace is required"):
        choose(PULL, key="/tmp/x")
    assert choose({}, key="/tmp/x") == Ordinary()


@pytest.mark.parametrize("label", [IMAGE_REF, MANIFEST_DIGEST, LAYER_DIGEST])
def test_missing_label_defers(label: str) -> None:
    """A pull that does not describe its image is left to containerd, and the reason names the label."""
    chosen = choose({name: value for name, value in PULL.items() if name != label})
    assert isinstance(chosen, Defer)
    assert label in chosen.reason


@pytest.mark.parametrize("label", [TARGET, MANIFEST_DIGEST, LAYER_DIGEST, INDEX_DIGEST])
def test_bad_digest_defers(label: str) -> None:
    """A label that should be a digest and is not leaves the layer to containerd."""
    chosen = choose({**PULL, label: "sha256:../../etc"})
    assert isinstance(chosen, Defer)
    assert label in chosen.reason


def test_modes_off() -> None:
    """With every mode off only an index named by a label is tried."""
    assert isinstance(choose(PULL, discover=False), Defer)
    chosen = choose({**PULL, INDEX_DIGEST: D[9]}, discover=False)
    assert isinstance(chosen, TryLazy)
    assert chosen.index_digest == D[9]


def test_cut_layer_list() -> None:
    """The end of a layer list that the client cut inside a digest is dropped."""
    chosen = choose({**PULL, IMAGE_LAYERS: f"{D[2]},{D[3][:30]}"})
    assert isinstance(chosen, TryLazy)
    assert chosen.image_layers == (D[2],)


def test_keys() -> None:
    """Namespace and chain ID are read from keys of containerd's form only; the label beats the key."""
    assert namespace_of(f"default/3/{D[0]}") == "default"
    assert namespace_of("default/x/y") == namespace_of("/tmp/1/x") == namespace_of("x") == ""
    assert chain_id_of(f"default/3/{D[0]}", {}) == D[0]
    assert chain_id_of(f"default/3/{D[0]}", {TARGET: D[1]}) == D[1]
    assert chain_id_of(f"default/3/{D[0]}", {TARGET: "nonsense"}) == D[0]
    assert chain_id_of("default/3/committed", {}) is None

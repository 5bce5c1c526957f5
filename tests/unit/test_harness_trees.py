"""The benches' tree is the same everywhere and has the shape it claims."""

import hashlib
import statistics
import tarfile
from pathlib import Path

from harness import trees


def test_the_same_seed_gives_the_same_tar(tmp_path: Path) -> None:
    """Two runs agree byte for byte; another seed gives another tree."""
    digests = []
    for number, seed in enumerate((1, 1, 2)):
        target = tmp_path / str(number)
        trees.write_tar(target, 300, seed)
        digests.append(hashlib.sha256(target.read_bytes()).digest())
    assert digests[0] == digests[1] != digests[2]


def test_every_directory_comes_before_what_is_in_it(tmp_path: Path) -> None:
    """No implicit directories and no name twice: both would be another test's business."""
    tree = trees.write_tar(tmp_path / "tar", 1000)
    seen: set[str] = set()
    with tarfile.open(tmp_path / "tar") as archive:
        for member in archive:
            parent = member.name.rpartition("/")[0]
            assert not parent or parent in seen
            assert member.name not in seen
            seen.add(member.name)
    assert len(seen) == tree.files + tree.directories
    assert tree.files == 1000


def test_sizes_are_those_of_small_files() -> None:
    """Half of 20,000 files are under 3 KB, the mean is 6 to 10 KB, and a directory has about 15 of them."""
    found = list(trees.entries(20_000))
    sizes = [size for _, size in found]
    assert 2_400 < statistics.median(sizes) < 3_000
    assert 6_000 < statistics.mean(sizes) < 10_000
    assert 10 < len(found) / len({path.rpartition("/")[0] for path, _ in found}) < 30


def test_a_layer_is_what_the_program_made_of_the_tar(tmp_path: Path) -> None:
    """gzip and pigz give different blobs with one DiffID, that of the tar."""
    trees.write_tar(tmp_path / "tar", 200)
    (one, first), (two, second) = (trees.layer(tmp_path / "tar", each) for each in ("gzip", "pigz"))
    assert one != two
    assert first == second == "sha256:" + hashlib.sha256((tmp_path / "tar").read_bytes()).hexdigest()

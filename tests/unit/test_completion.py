"""Shell completion: the script, and what a shell is answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soci_snapshotter.cli.main import run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_asks_soci_itself(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each shell's script calls `soci` with the variable that main() looks for."""
    assert run(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert f"_SOCI_COMPLETE={shell}_complete" in out
    assert "soci" in out


def test_unknown_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Another shell is a bad argument: one line with the choices, exit 1."""
    assert run(["completion", "tcsh"]) == 1
    err = capsys.readouterr().err
    assert "tcsh" in err
    assert "zsh" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("soci pu", {"pull", "push"}),
        ("soci push --exist", {"--existing-index"}),
        ("soci completion f", {"fish"}),
    ],
)
def test_bash_completes(
    words: str, expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bash itself, with the script sourced: commands, flags and choices of arguments."""
    bash = shutil.which("bash")
    assert bash is not None
    program = tmp_path / "soci"
    program.write_text(f"#!{sys.executable}\nfrom soci_snapshotter.cli.main import main\nmain()\n")
    program.chmod(0o755)
    run(["completion", "bash"])
    script = capsys.readouterr().out
    done = subprocess.run(
        [
            bash,
            "--norc",
            "-c",
            script + "\nCOMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _soci_completion soci; "
            'printf "%s\\n" "${COMPREPLY[@]}"',
            "bash",
            words,
        ],
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == expected

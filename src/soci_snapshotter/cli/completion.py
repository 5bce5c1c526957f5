"""`soci completion SHELL`: the script that makes a shell complete commands and flags."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from .main import COMPLETE_VARIABLE

_WHERE = {
    "bash": "/etc/bash_completion.d/soci",
    "zsh": "a directory of $fpath, named _soci",
    "fish": "/etc/fish/completions/soci.fish",
}


@click.command(
    name="completion",
    epilog="\b\nWhere the output goes:\n"
    + "\n".join(f"  {shell:<5} {path}" for shell, path in _WHERE.items()),
)
@click.argument("shell", type=click.Choice(sorted(_WHERE)))
@click.pass_context
def completion_command(ctx: click.Context, *, shell: str) -> None:
    """Print a completion script for bash, zsh or fish."""
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click has these three
    root = ctx.find_root().command
    # The base class's own: bash's runs bash to ask for its version, which may not be installed here.
    print(ShellComplete.source(kind(root, {}, "soci", COMPLETE_VARIABLE)))

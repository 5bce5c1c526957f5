"""The `soci` command: global flags, and what becomes of an error (one line on stderr and an exit code)."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import click
from click.shell_completion import shell_complete

from .. import __version__
from ..containerd.client import DEFAULT_ADDRESS, DEFAULT_NAMESPACE
from ..errors import Remote, SociError
from .context import Globals, duration

DEFAULT_ROOT = "/var/lib/soci-snapshotter-grpc/"

# nerdctl takes the first number of --version for the Go tool's, and converts images with 0.10.0 and later only.
_AS_GO = "0.12.0"

# click's own name for the variable by which a completion script asks.
COMPLETE_VARIABLE = "_SOCI_COMPLETE"

# What a shell reports for a program that SIGINT, or SIGTERM, ended.
_INTERRUPTED = 130
_TERMINATED = 143
# The operating system refused: no file of ours is at fault, so no class in errors.py has it.
_SYSTEM = 10

# Kept in step with errors.py by a test.
_EXIT_CODES = """\b
Exit codes:
    0  done
    1  a bad argument, a problem that `soci doctor` found, or an error of no other kind
    2  a configuration file, flag or environment must be corrected
    3  `soci why`: no layer would be lazy
    4  not found
    5  exists already and may not be replaced
    6  not in the state that is needed
    7  bytes are not what a digest or a format says
    8  not supported by this program, kernel or filesystem
    9  a registry or containerd did not answer, or refused
   10  the operating system refused (full disk, permissions)
  130  interrupted
  143  terminated (SIGTERM)
"""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: workers and temporary files go with it."""


class _Commands(click.Group):
    """One module per command, imported when it is used: `create` needs no HTTP, say."""

    names = (
        "create",
        "convert",
        "pull",
        "push",
        "completion",
        "doctor",
        "index",
        "ztoc",
        "prefetch",
        "rebuild-db",
        "status",
        "why",
    )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """For --help."""
        del ctx
        return list(self.names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The module's `<name>_command`; a dash in the name is an underscore there."""
        del ctx
        if cmd_name not in self.names:
            return None
        name = cmd_name.replace("-", "_")
        module = importlib.import_module(f"{__package__}.{name}")
        command: click.Command = getattr(module, f"{name}_command")
        return command


@click.group(
    cls=_Commands,
    name="soci",
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--address",
    "-a",
    envvar="CONTAINERD_ADDRESS",
    default=DEFAULT_ADDRESS,
    show_default=True,
    show_envvar=True,
    help="containerd's socket.",
)
@click.option(
    "--namespace",
    "-n",
    envvar="CONTAINERD_NAMESPACE",
    default=DEFAULT_NAMESPACE,
    show_default=True,
    show_envvar=True,
    help="containerd's namespace.",
)
@click.option("--timeout", default="0", help="Give up after this long (30s, 5m); 0 is never.")
@click.option("--debug", is_flag=True, help="Log what happens, and show where an error came from.")
@click.option(
    "--content-store",
    type=click.Choice(["containerd", "soci"]),
    default="containerd",
    show_default=True,
    help="Where indexes are kept.",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=DEFAULT_ROOT,
    show_default=True,
    help="The snapshotter's directory, with the list of indexes.",
)
@click.version_option(
    __version__, "--version", message=f"soci version v{_AS_GO} soci-snapshotter-%(version)s"
)
@click.pass_context
def soci(
    ctx: click.Context,
    *,
    address: str,
    namespace: str,
    timeout: str,
    debug: bool,
    content_store: str,
    root: Path,
) -> None:
    """Start containers before their images are pulled: index, push and pull images."""
    _set_up_logging(debug=debug)
    ctx.with_resource(_deadline(duration(timeout), timeout))
    ctx.obj = Globals(address, namespace, debug, content_store, root)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; return the exit code. Writes at most one line about an error to stderr."""
    try:
        with soci.make_context("soci", list(arguments)) as ctx:
            soci.invoke(ctx)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except SociError as error:
        _report(str(error), arguments)
        return error.exit_code
    except click.ClickException as error:
        _report(error.format_message(), arguments)
        return 1
    except _Terminated:
        _report("terminated", ())
        return _TERMINATED
    except (click.Abort, KeyboardInterrupt):
        _report("interrupted", ())
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _report(str(error), arguments)
        return _SYSTEM
    return 0


def main() -> None:
    """The console script; also what a shell calls for completions (`soci completion`)."""
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        sys.exit(shell_complete(soci, {}, "soci", COMPLETE_VARIABLE, instruction))
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def _terminate(_number: int, _frame: FrameType | None) -> None:
    # A second one is impatient, and need not wait for the cleaning up.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise _Terminated


def _report(message: str, arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
    print("soci: " + " ".join(message.split("\n")), file=sys.stderr)


def _set_up_logging(*, debug: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("soci: %(message)s"))
    # Only our own loggers go below warnings: HTTP libraries log whole URLs, and a signed query is a secret.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("soci_snapshotter").setLevel(logging.DEBUG if debug else logging.WARNING)


@contextlib.contextmanager
def _deadline(seconds: float, text: str) -> Iterator[None]:
    """Raise Remote in the main thread when the time is up; 0 is never."""
    if seconds == 0:
        yield
        return

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise Remote(f"not finished within --timeout {text}")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


if __name__ == "__main__":
    main()

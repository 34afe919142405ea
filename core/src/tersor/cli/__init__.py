"""The command ``tersor``. Commands import what they need when they run, so that ``tersor list`` starts at once.

Exit codes: 0 done; 1 the answer is no (a check failed, a claim does not hold, a plugin is broken); 2 wrong usage or input;
3 the system refused (disk full, no permission, no such folder); 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from tersor import __version__
from tersor.errors import TersorError

_LAZY = {
    "list": "List the installed methods",
    "info": "Show all there is to know of one method",
    "compress": "Compress a file, or a whole model, with a method",
    "decompress": "Restore what a .tsr file holds",
    "export": "Write a compressed model in the format of an inference engine",
    "inspect": "Show what a .tsr file says of itself",
    "bench": "Compare methods on your own files",
    "check": "Run the conformance checks over a method",
    "verify": "Re-run the claims of a method and print both sides",
    "doctor": "Find broken plugins and show why",
    "new": "Write a new method's package",
    "completion": "Print the shell completion script",
}


class _Commands(click.Group):
    """A group whose commands live in :mod:`tersor.cli.commands` and are loaded when one of them runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_LAZY)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY:
            return None
        from tersor.cli import commands

        return getattr(commands, f"{cmd_name}_")  # type: ignore[no-any-return]

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in _LAZY:
            import difflib

            near = difflib.get_close_matches(args[0], _LAZY, 1)
            ctx.fail(
                f"no command {args[0]!r}" + (f"; did you mean {near[0]!r}?" if near else "") + f" Commands: {', '.join(_LAZY)}"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_LAZY.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="tersor")
def tersor() -> None:
    """Look a compression method up by name, apply it, and see what it cost and what it saved."""


def show_json(value: Any) -> None:
    """Print JSON-ready data."""
    click.echo(json.dumps(value, indent=1, default=str))


def main() -> None:
    """The entry point: runs a command and turns errors into one line and an exit code."""
    try:
        code = tersor.main(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except TersorError as error:
        click.echo(f"tersor: {type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        click.echo(f"tersor: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), err=True)
        sys.exit(3)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        import os

        if os.environ.get("TERSOR_DEBUG"):
            raise
        click.echo(f"tersor: internal error: {type(error).__name__}: {error} (TERSOR_DEBUG=1 shows the traceback)", err=True)
        sys.exit(2)

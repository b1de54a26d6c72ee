"""The typer application with all subcommands; nothing heavy is imported before a command runs."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from resu.cli._common import OneLineErrors

__all__ = ["COMMANDS", "build_app"]

# One module of resu.cli each; it defines `command` and EXAMPLE.
COMMANDS = (
    *("quickstart", "train", "finetune", "leaderboard", "prune", "reconstruct", "inspect"),
    *("validate", "convert", "export", "plan", "shrink", "spinn"),
)


def resu(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Make PyTorch networks sparse and keep them sparse."""
    if version:
        from resu import __version__

        print(f"resu {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def build_app() -> typer.Typer:
    """The application; each call makes a new one."""
    app = typer.Typer(
        name="resu",
        cls=OneLineErrors,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True, epilog="Example: resu quickstart")(resu)
    for name in COMMANDS:
        module = importlib.import_module(f"resu.cli.{name}")
        app.command(name, epilog=module.EXAMPLE)(module.command)
    return app

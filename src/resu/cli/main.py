"""Entry point of the command ``resu``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without its dependencies, say how to get them."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        missing = (error.name or "typer").partition(".")[0]
        print(f'resu: the command line needs {missing}: pip install "resu-torch[cli]"', file=sys.stderr)
        sys.exit(2)
    from resu.cli._app import build_app

    build_app()(prog_name="resu")


if __name__ == "__main__":
    main()

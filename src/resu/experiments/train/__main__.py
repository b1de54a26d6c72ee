"""``python -m resu.experiments.train OUT < config.json``: one run, or the rest of it."""

from __future__ import annotations

import json
import sys

from resu.experiments.train.interrupt import Interrupted
from resu.experiments.train.loop import run
from resu.experiments.train.reading import as_config


def main() -> None:
    """Train as standard input says; the last line of the output is the result."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m resu.experiments.train OUT < config.json")
    try:
        result = run(as_config(json.load(sys.stdin)), sys.argv[1], resume=True)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps({"val": result.val, "test": result.test, "seconds": result.seconds}))


if __name__ == "__main__":
    main()

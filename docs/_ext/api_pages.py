"""Writes docs/generated/<package>.rst before a build: one page per package of resu, one section per module.

Modules are found by their files, so a new one is documented without a line here. One that needs an absent
optional dependency is named with what it needs, and its docstrings are left out.
"""

import importlib
import re
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PACKAGE = HERE.parent / "src" / "resu"


def module_names(folder: Path) -> list[str]:
    """The public modules in a folder and below, packages before what they hold."""
    names = []
    for file in sorted(folder.rglob("*.py"), key=lambda f: (f.parent, f.name != "__init__.py", f.name)):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


def heading(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def section(name: str) -> list[str]:
    """The directives that document one module."""
    lines = heading(name, "-")
    try:
        module = importlib.import_module(name)
    except ImportError as missing:
        return [*lines, f"Needs an optional dependency: {missing}.", ""]
    lines += [f".. automodule:: {name}"]
    if hasattr(module, "__path__"):  # a package repeats names that its modules document
        lines += ["   :no-members:"]
    elsewhere = [
        member
        for member in getattr(module, "__all__", ())
        if getattr(getattr(module, member, None), "__module__", name) != name
    ]
    if elsewhere:  # exported here, documented where it is defined
        lines += [f"   :exclude-members: {', '.join(elsewhere)}"]
    return [*lines, ""]


def write_pages(app) -> None:
    target = HERE / "generated"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for folder in sorted(p for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))):
        lines = heading(f"resu.{folder.name}", "=")
        for name in module_names(folder):
            lines += section(name)
        (target / f"{folder.name}.rst").write_text("\n".join(lines), encoding="utf-8")


def escape_bars(app, what, name, obj, options, lines) -> None:
    """|w| is an absolute value in docstrings, not a substitution."""
    for i, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [re.sub(r"(?<!\\)\|", r"\\|", part) for part in parts[::2]]
        lines[i] = "``".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}

"""Writes docs/cli.md from the parsers: python docs/make_cli.py"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from transformers_liquid_cli import app
from transformers_liquid_cli.options import PROG


HEAD = """# The command line

<!-- written by docs/make_cli.py from the parsers -->
Every command has `--help`. What they promise to scripts, such as exit codes, pipes, JSON and completion:
[scripting.md](scripting.md).
"""


def commands(group: Any, names: str) -> Iterator[tuple[str, Any]]:
    """Names and commands, those of groups too."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{names} {name}")
        elif not command.hidden:
            yield f"{names} {name}", command


def section(name: str, command: Any) -> str:
    """One command: purpose, example, table of what it takes."""
    context = command.make_context(name, ["x"], resilient_parsing=True)
    # Paragraphs after \b are kept as they are, by typer too.
    purpose, *kept = command.help.split("\b\n")
    lines = [f"## {name.removeprefix(PROG).strip()}", "", " ".join(purpose.split())]
    for paragraph in kept:
        lines += ["", "```text", paragraph.strip("\n"), "```"]
    lines += ["", "| | |", "|---|---|"]
    for one in command.params:
        if (record := one.get_help_record(context)) is not None:
            shown = (
                " / ".join([*one.opts, *one.secondary_opts])
                if one.opts[0].startswith("-")
                else one.metavar or one.name.upper()
            )
            text = record[1].replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{shown}` | {text} |")
    return "\n".join(lines)


def page() -> str:
    sections = [section(name, command) for name, command in commands(typer.main.get_command(app), PROG)]
    return "\n\n".join([HEAD.rstrip(), *sections]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page(), encoding="utf-8")

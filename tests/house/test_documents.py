"""What the documents say exists, and tables in them are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from wire.errors import ExitCode
from wire.topics import TABLE

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").rglob("*.md")])


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/generate_docs.py", *arguments],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_tables_in_the_documents_are_those_of_the_code() -> None:
    checked = generate("--check")
    assert checked.returncode == 0, checked.stderr


def test_every_topic_and_exit_code_stands_in_its_document() -> None:
    topics = (REPOSITORY / "docs/topics.md").read_text()
    assert all(f"`{row.template}`" in topics for row in TABLE)
    codes = (REPOSITORY / "docs/exit-codes.md").read_text()
    assert all(f"| {int(code)} | {code.name.lower()} |" in codes for code in ExitCode)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_make_goals_and_scripts_that_documents_name_exist(page: Path) -> None:
    goals = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    commands = re.findall(r"^ {4}make ([a-z]+)|`make ([a-z]+)", text, re.MULTILINE)
    assert {one or other for one, other in commands} <= goals
    scripts = re.findall(r"`((?:tools|tests)/[\w./]+)`", text)
    assert [script for script in scripts if not (REPOSITORY / script).exists()] == []


def test_the_two_commands_stand_at_the_top_of_the_readme() -> None:
    top = (REPOSITORY / "README.md").read_text().splitlines()[:5]
    assert [line.split("#")[0].strip() for line in top if line.startswith("    ")] == ["make demo", "make test"]


def test_subcommands_and_options_that_the_readme_shows_exist() -> None:
    typer_main = pytest.importorskip("typer.main", reason="the coordinator extra is not installed")
    from coordinator import cli

    cli._add_heavier_commands()
    group = typer_main.get_command(cli.app)
    shown = re.findall(r"^ {4}edgelam ([^#\n]+)", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert shown
    for line in shown:
        command = group
        words = line.split()
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not group, f"edgelam {line}: no such command"
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line

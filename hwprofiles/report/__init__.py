"""A profile for people: `rows` and `warnings` decide what is said, `plain` and `markdown` only how it looks."""

from hwprofiles.report.render import markdown, plain
from hwprofiles.report.rows import Column, Table, rows, warnings

__all__ = ["Column", "Table", "markdown", "plain", "rows", "warnings"]

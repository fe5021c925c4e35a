"""Job files: TOML, checked as a whole, so that all that is wrong with one is said at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin

import msgspec
from msgspec import Struct

from coordinator.rounds.contradictions import contradictions
from coordinator.rounds.job import Adapter, Job, Rounds
from wire.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FILE_BYTES: Final = 1024 * 1024


def load_job(path: Path) -> Job:
    """Read a job file; raise UsageError that lists all that is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"job {path}: {(error.strerror or str(error)).lower()}", try_="edgelam tune JOB.toml"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"job {path}: more than {MAX_FILE_BYTES} bytes", try_="a TOML file, docs/tuning.md")
    try:
        raw = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"job {path}: not TOML: {error}", try_="docs/tuning.md") from None
    return job_of({"name": path.stem.lower().replace("_", "-"), **raw}, str(path))


def job_of(raw: Mapping[str, Any], where: str) -> Job:
    """The job that a table says; raise UsageError that lists all that is wrong with it."""
    problems: list[str] = []
    values = _fields(Job, raw, "", problems)
    if "name" in values:
        said = {problem.split(":")[0] for problem in problems}
        said |= {key.partition(".")[0] for key in said}  # a table with a wrong value is not missing
        said |= {"model", "data"} if "modalities" in said else set()  # and they may stand there
        problems += [problem for problem in contradictions(values) if problem.split(":")[0] not in said]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UsageError(f"job {where}:{lines}", try_="docs/tuning.md lists the keys")
    return Job(**values)


def checked(job: Job) -> Job:
    """A job that came as JSON, where each field is right by itself; raise UsageError as `job_of`."""
    return job_of(msgspec.to_builtins(job), job.name)


def _fields(kind: type[Struct], raw: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """The fields of a table, each checked for itself; what is wrong goes into `problems`."""
    if not isinstance(raw, Mapping):
        problems.append(f"{where.rstrip('.') or 'job'}: not a table")
        return {}
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    problems += [f"{where}{key}: no such key; there are {', '.join(fields)}" for key in raw if key not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in raw:
            if field.required:
                problems.append(f"{where}{name}: missing")
            continue
        inside = _tables_in(field.type)
        if inside is not None and isinstance(raw[name], Mapping | list | tuple):
            many = raw[name].items() if isinstance(raw[name], Mapping) else enumerate(raw[name])
            before = len(problems)
            made = {key: _fields(inside, one, f"{where}{name}.{key}.", problems) for key, one in many}
            if len(problems) > before:
                continue
            raw = {**raw, name: msgspec.to_builtins(made if isinstance(raw[name], Mapping) else list(made.values()))}
        table = _table_of(field.type) if inside is None else None
        if table is not None and (raw[name] is not None or field.default is not None):
            before = len(problems)
            inner = _fields(table, raw[name], f"{where}{name}.", problems)
            if len(problems) == before or table in (Adapter, Rounds):
                values[name] = table(**inner)
            continue
        try:
            values[name] = msgspec.convert(raw[name], type=field.type)
        except msgspec.ValidationError as error:
            problems.append(f"{where}{name}: {str(error).split(' - at ')[0]}")
    return values


def _tables_in(kind: Any) -> type[Struct] | None:
    """The struct of which a field holds many, in a row or by name."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    inside = {tuple: 0, dict: 1}.get(get_origin(plain))
    return None if inside is None else _table_of(get_args(plain)[inside])


def _table_of(kind: Any) -> type[Struct] | None:
    """The struct that a field is, or may be."""
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and issubclass(one, Struct):
            return one
    return None

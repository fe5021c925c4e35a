"""Arrays out of old files of numpy, which hold Python objects: such a file is a program that makes them. It is read
here and not run: nothing that it names is called, and what is no plain value or array of numbers is refused."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np

VALUES: Final = ("BININT", "BININT1", "BININT2", "BINUNICODE")
FIXED: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
ARRAY: Final = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")


@dataclass(eq=False)
class _Said:
    """Something that the file would have made: by what name, of what, and with what put into it."""

    name: str
    of: tuple[Any, ...] = ()
    state: Any = None


def objects_in(file: IO[bytes]) -> Any:
    """What a file of one object holds, its arrays as numpy's. Raises ValueError for anything else."""
    stack: list[Any] = []
    marks: list[int] = []
    known: dict[int, Any] = {}
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in VALUES:
            stack.append(argument)
        elif name in FIXED:
            stack.append(FIXED[name])
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            begin = marks.pop()
            items = stack[begin:]
            del stack[begin:]
            _put(stack, name, items)
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name in ("BINPUT", "LONG_BINPUT"):
            known[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(known[argument])
        elif name == "GLOBAL":
            stack.append(_Said(argument))
        elif name == "REDUCE":
            of = stack.pop()
            stack[-1] = _made(stack[-1], of)
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name == "STOP":
            return _plain(stack.pop())
        elif name != "PROTO":
            raise ValueError(f"{name} makes no plain value")
    raise ValueError("the file ends too early")


def _put(stack: list[Any], name: str, items: list[Any]) -> None:
    if name == "TUPLE":
        stack.append(tuple(items))
    elif name == "APPENDS":
        stack[-1].extend(items)
    else:
        stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _made(what: _Said, of: tuple[Any, ...]) -> Any:
    if what.name == "_codecs encode" and of[1:] == ("latin1",):
        return of[0].encode("latin1")
    if what.name in (*ARRAY, "numpy dtype"):
        return _Said(what.name, of)
    raise ValueError(f"{what.name} is no array")


def _plain(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _plain(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_plain(value) for value in found]
    if not isinstance(found, _Said):
        return found
    _, shape, dtype, by_column, data = found.state
    if dtype.of[0].startswith("O"):
        [only] = data
        return _plain(only)
    kind = np.dtype(dtype.of[0]).newbyteorder(dtype.state[1])
    return np.frombuffer(data, kind).reshape(shape, order="F" if by_column else "C")

"""Chat templates: a conversation -> the text a model was trained to see.

A template is a Jinja program that came with the weights, so it runs in a sandbox, with little to call: no format
strings, no attribute that changes anything, no filter that isn't listed here. It is also kept from eating time and
memory, because Jinja itself bounds neither: every loop turn, call and produced text is charged to a budget of
characters and checked against a deadline. The tree is rewritten for that before it is compiled.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, cast

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from wire.errors import Refused, UsageError

MAX_TEMPLATE_CHARS: Final = 131_072
"""The longest template of the supported families has about 10,000."""
MAX_RENDERED_CHARS: Final = 2_000_000
"""Four characters for each of MAX_PROMPT_TOKENS, and as much again four times for markup and long words."""
WORK_CHARS: Final = 8 * MAX_RENDERED_CHARS
"""Characters a rendering may produce on its way: templates trim and join each message a few times."""
DEADLINE_S: Final = 5.0
"""A template of a real model takes milliseconds."""
ROLES: Final = ("system", "user", "assistant", "tool")
MAX_INDENT: Final = 8
MAX_NUMBER: Final = 1 << 53

SAFE_METHODS: Final = frozenset(
    {
        *("capitalize", "count", "endswith", "find", "get", "index", "isdigit", "isspace", "items"),
        *("keys", "lower", "lstrip", "removeprefix", "removesuffix", "replace", "rfind", "rstrip", "split"),
        *("splitlines", "startswith", "strip", "title", "upper", "values"),
    }
)
PLAIN_FILTERS: Final = frozenset(
    {
        *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int"),
        *("items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
        *("rejectattr", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum"),
        *("title", "trim", "unique", "upper"),
    }
)

Message = Mapping[str, str]


class _Spent(Exception):
    """The rendering ran out of characters or time."""


class _Rewrite(NodeTransformer):
    """Puts each loop's iterable and each `~` through a filter of ours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("recursive loops are not supported")
        self.generic_visit(node)
        text_chars = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = _filtered(node.iter, "_turns", node.lineno, nodes.Const(text_chars, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join", node.lineno)


def _filtered(value: nodes.Node, name: str, line: int, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, value), name, list(arguments), [], None, None, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. Its budget makes it fit for one rendering at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "//", "/"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=self._output)
        self.filters = {name: function for name, function in self.filters.items() if name in PLAIN_FILTERS}
        self.filters |= {"_turns": self._turns, "join": self._join, "replace": self._replace, "tojson": _to_json}
        self.globals = {
            "range": self.globals["range"],
            "namespace": self.globals["namespace"],
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: now().strftime(str(form)[:64]),
        }
        self._chars_left = 0
        self._deadline_s = 0.0
        self._macro_chars = 0

    def start(self) -> None:
        self._chars_left = WORK_CHARS
        self._deadline_s = time.monotonic() + DEADLINE_S

    def charge(self, chars: int) -> None:
        self._chars_left -= chars
        if self._chars_left < 0 or time.monotonic() > self._deadline_s:
            raise _Spent

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        macros = [*tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]
        self._macro_chars = sum(len(text.data) for macro in macros for text in macro.find_all(nodes.TemplateData))
        rewritten: nodes.Template = _Rewrite().visit(tree)
        return rewritten

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and (not callable(value) or attr in SAFE_METHODS)

    def wrap_str_format(self, value: Any) -> None:
        """Leave str.format to `is_safe_attribute`, which denies it: a format string can ask for any width."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.charge(__self._macro_chars)
        subject = getattr(__obj, "__self__", None)
        if isinstance(subject, str) and getattr(__obj, "__name__", "") == "replace" and len(args) >= 2:
            return __self._replace(subject, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int | float) and isinstance(right, int | float):
            small = 64 if operator == "**" else MAX_NUMBER
            if abs(left) > MAX_NUMBER or abs(right) > small:
                raise SecurityError(f"numbers too large for {operator}")
        elif operator == "+":
            self.charge(_chars(left) + _chars(right))
        elif operator == "*":
            count = next((side for side in (left, right) if isinstance(side, int)), 1)
            self.charge(max(count, 0) * max(_chars(left), _chars(right)))
        else:
            raise SecurityError(f"{operator} is for numbers only")
        return super().call_binop(context, operator, left, right)

    def _output(self, value: Any) -> Any:
        self.charge(_chars(value) if isinstance(value, str) else 64)
        return value

    def _turns(self, values: Iterable[Any], text_chars: int) -> Iterator[Any]:
        for value in values:
            self.charge(text_chars)
            yield value

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        texts: list[str] = []
        for value in values:
            texts.append(str(value if attribute is None else self.getitem(value, attribute)))
            self.charge(len(texts[-1]) + len(separator))
        return separator.join(texts)

    def _replace(self, text: Any, old: Any, new: Any, count: int = -1) -> str:
        subject, found, instead = str(text), str(old), str(new)
        self.charge(len(subject) + subject.count(found) * len(instead))
        return subject.replace(found, instead, count)


def _chars(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _raise_exception(message: object) -> None:
    raise UsageError(f"the model's chat template refuses this conversation: {str(message)[:200]}")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(indent, MAX_INDENT))


class ChatTemplate:
    """A compiled template. Thread-safe: renderings wait for each other."""

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile; raise Refused, saying what is wrong with the template."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise Refused(f"chat template of {len(source)} characters: at most {MAX_TEMPLATE_CHARS} are supported")
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._lock = threading.Lock()
        self._sandbox = _Sandbox(now)
        try:
            self._template = self._sandbox.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise _failed(error) from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Give the text. Raises UsageError (the conversation is at fault) or Refused (the template is)."""
        check_messages(messages)
        given = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        pieces: list[str] = []
        left = MAX_RENDERED_CHARS
        with self._lock:
            self._sandbox.start()
            try:
                for piece in self._template.generate(**given, **self._tokens):
                    left -= len(piece)
                    if left < 0:
                        raise _Spent
                    pieces.append(piece)
            except _Spent as error:
                raise Refused(
                    f"the model's chat template made more than {MAX_RENDERED_CHARS} characters or took "
                    f"more than {DEADLINE_S:.0f} s",
                    try_="a shorter conversation, or edgelam run --raw",
                ) from error
            except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
                raise _failed(error) from error
            except (RecursionError, MemoryError) as error:
                raise _failed(error) from error
        return "".join(pieces)


def _failed(error: BaseException) -> Refused:
    return Refused(
        f"the model's chat template can't be used: {type(error).__name__}: {str(error)[:200]}",
        try_="edgelam run --raw, which sends the prompt as it is",
    )


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UsageError unless every message is a known role with a text."""
    if not messages:
        raise UsageError("a conversation without messages")
    total = 0
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UsageError(f"message with role {role!r}", try_=f"one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UsageError(f"message of role {role} without a text as its content")
        total += len(content)
    if total > MAX_RENDERED_CHARS:
        raise UsageError(f"a conversation of {total} characters: at most {MAX_RENDERED_CHARS} are taken")

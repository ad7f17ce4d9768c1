"""The Jinja sandbox of chat templates: what a template may name, and a budget for all that it does.

Jinja's own sandbox keeps a template away from Python's internals and from changing its inputs. It does not bound
time and memory: one filter (`center(10**9)`), one doubling in a loop, or a macro that calls itself twice is enough.
Here a template has a fixed vocabulary of nodes, filters and methods, and every loop step, call, filter, operator and
printed value is charged to a budget before or right after it runs. Each of them makes at most one value, of bounded
size, so that a template ends soon after it goes over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, ClassVar

from jinja2 import Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_VALUE_CHARS = 20_000_000  # of one value; also of the whole rendered text
MAX_WORK_CHARS = 10 * MAX_VALUE_CHARS  # of all values that are made on the way
MAX_STEPS = 300_000
MAX_SECONDS = 10.0
_NODE_CHARS = 256  # what an item of a list counts for
_MAX_BITS = 256

# fmt: off
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "join", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "safe",
    "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper", "wordcount",
)
_STR = {
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "join",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition",
    "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
}
# fmt: on
_GLOBALS = ("dict", "namespace")
_REFUSED = (
    nodes.Block,
    nodes.Extends,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.ScopedEvalContextModifier,
    nodes.EvalContextModifier,
    nodes.OverlayScope,
)


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps, self.chars, self.deadline = MAX_STEPS, MAX_WORK_CHARS, time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        """Charge loop steps, calls, filters. Raises SecurityError when too many, or too late."""
        self.steps -= count
        if self.steps < 0:
            raise SecurityError(f"over {MAX_STEPS} loop steps and calls")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"over {MAX_SECONDS:g} s")

    def make(self, chars: int) -> None:
        """Charge a value of this many characters. Raises SecurityError when it or all values are too large."""
        self.chars -= chars
        if chars > MAX_VALUE_CHARS or self.chars < 0:
            raise SecurityError(f"over {MAX_VALUE_CHARS} characters in one value or {MAX_WORK_CHARS} in all")

    def check(self, value: Any) -> Any:
        """Charge a value that has been made, and return it."""
        if isinstance(value, str):
            self.make(len(value))
        elif isinstance(value, list | tuple | dict):
            self.weigh(value)
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise SecurityError(f"a whole number of over {_MAX_BITS} bits")
        return value

    def text(self, value: Any) -> str:
        """Write a value as text; only data has one (a generator or an object would print its address)."""
        if isinstance(value, str):
            return value
        if isinstance(value, list | tuple | dict):
            self.weigh(value)
        else:
            _check_plain(value)
        return str(value)

    def weigh(self, value: Any) -> None:
        """Charge the items of a nested value as the tree that it is written as."""
        chars, todo = 0, [value]
        while todo:
            item = todo.pop()
            chars += _NODE_CHARS
            if isinstance(item, str):
                chars += len(item)
            elif isinstance(item, list | tuple):
                todo.extend(item)
            elif isinstance(item, dict):
                todo.extend((*item.keys(), *item.values()))
            else:
                _check_plain(item)
            if chars > MAX_VALUE_CHARS or len(todo) > MAX_VALUE_CHARS // _NODE_CHARS:
                raise SecurityError(f"a list or dict of over {MAX_VALUE_CHARS} characters")
        self.chars -= chars // 16  # looking is cheaper than copying


def _check_plain(value: Any) -> None:
    # Anything else would be written with its address in memory, or (a namespace) with all that it refers to.
    if not isinstance(value, int | float | Undefined | None):
        raise SecurityError(f"a {type(value).__name__} is not data")


class _Generation(Extension):
    """`{% generation %}` marks what the model writes in training templates; here it is transparent."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment whose templates cannot hang, fill the memory, or reach outside of their inputs."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, extra_filters: Mapping[str, Callable], extra_globals: Mapping[str, Callable]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._print,
            optimized=False,
        )
        self.budget = Budget()
        own = {"join": self._join, "replace": self._replace, "string": self._text, "safe": self._text}
        filters = {name: self.filters[name] for name in _FILTERS} | own | {"indent": self._indent} | dict(extra_filters)
        self.filters = {name: self._charged(function) for name, function in filters.items()}
        self.tests = {name: self._charged(function) for name, function in self.tests.items()}
        self.globals = {name: self.globals[name] for name in _GLOBALS} | {"range": self._range} | dict(extra_globals)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all(nodes.Node):
            if isinstance(node, _REFUSED):
                kind = type(node).__name__.lower()
                raise TemplateSyntaxError(f"{kind} is not available in a chat template", node.lineno)
        for loop in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            written = sum(len(text.data) for text in loop.find_all(nodes.TemplateData))
            if isinstance(loop, nodes.For):
                loop.iter = _call("walk", loop.iter).set_lineno(loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(_call("step_through", nodes.Const(written)), lineno=loop.lineno))
        return _charge_expressions(tree)

    def walk(self, values: Iterable[Any]) -> Iterator[Any]:
        """Iterate, one step an item (called by templates for what a loop runs over)."""
        for value in values:
            self.budget.step()
            yield value

    def made(self, value: Any) -> Any:
        """Let a list, tuple or dict pass that a template wrote down; `call` charges it (called by templates)."""
        return value

    def step_through(self, written: int) -> None:
        """Charge one pass through the body of a loop or macro, with its literal text (called by templates)."""
        self.budget.step()
        self.budget.make(written)

    def concat_text(self, *values: Any) -> str:
        """Compute `a ~ b ~ c` (called by templates)."""
        texts = [self._text(value) for value in values]
        self.budget.make(sum(map(len, texts)))
        return "".join(texts)

    def _charged_call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.budget.step()
        return self.budget.check(super().call(context, function, *args, **kwargs))

    call = _charged_call

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        # Repeating a string or raising to a power is how a short template fills the memory.
        if operator == "**" or (operator != "+" and not numbers):
            raise SecurityError(f"operator {operator!r} is not available for these values in a chat template")
        self.budget.step(0)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, list | tuple):
            self.budget.make(_NODE_CHARS * len(result))  # its items have been weighed or come from outside
            return result
        return self.budget.check(result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STR
        if isinstance(obj, dict):
            return attr in ("get", "items", "keys", "values")
        if isinstance(obj, list | tuple):
            return attr in ("count", "index")
        return isinstance(obj, LoopContext | Namespace) and not attr.startswith("_")

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` unsafe: a field may ask for any width."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        found = super().getattr(obj, attribute)
        # The methods of text that make longer text are replaced by the bounded filters of the same name.
        if isinstance(obj, str) and attribute == "replace":
            return lambda old, new, count=None: self._replace(obj, old, new, count)
        if isinstance(obj, str) and attribute == "join":
            return lambda values: self._join(values, obj)
        return found

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def _charged(self, function: Callable) -> Callable:
        @wraps(function)
        def _run(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            for value in (*args, *kwargs.values()):
                if isinstance(value, Namespace):
                    _check_plain(value)
            return self.budget.check(function(*args, **kwargs))

        return _run

    @pass_context  # needs none, but what takes it is never called at compile time
    def _print(self, _context: Any, value: Any) -> str:
        self.budget.step(0)
        text = self._text(value)
        self.budget.make(len(text))
        return text

    def _text(self, value: Any) -> str:
        return self.budget.text(value)

    def _range(self, *bounds: int) -> range:
        steps = range(*bounds)
        self.budget.step(len(steps))
        return steps

    def _replace(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        text = self._text(value)
        found = text.count(old) if count is None else min(count, text.count(old))
        self.budget.make(len(text) + found * (len(new) - len(old)))
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, values: Iterable[Any], separator: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            raise SecurityError("join takes no attribute in a chat template; use map(attribute=...) | join")
        texts: list[str] = []
        for value in values:
            self.budget.step()
            texts.append(self._text(value))
            self.budget.make(len(texts[-1]) + len(separator))
        return separator.join(texts)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self._text(value)
        if not isinstance(width, str):
            if width > 1000:
                raise SecurityError(f"indent by {width}")
            width = " " * width
        lines = text.split("\n")
        self.budget.make(len(text) + len(lines) * len(width))
        rest = [width + line if line or blank else line for line in lines[1:]]
        return "\n".join([width + lines[0] if first else lines[0], *rest])


def _call(name: str, *arguments: nodes.Node) -> nodes.Call:
    """A call of the environment's method that no variable of the template can shadow."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _charge_expressions(node: Any) -> Any:
    """Replace every `~` and every list, tuple and dict that a template writes down by a charged call."""
    for field, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, field, _charge_expressions(value))
        elif isinstance(value, list):
            setattr(node, field, [_charge_expressions(v) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(node, nodes.Concat):
        return _call("concat_text", *node.nodes).set_lineno(node.lineno)
    literal = isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    return _call("made", node).set_lineno(node.lineno) if literal else node

"""The methods, filters and tests that chat templates may use; there are no others.

Every function that can make something large, or take long, first pays for it from the budget.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from edge_client.template_values import UNDEFINED, Budget, TemplateError, text

MAX_SEPARATOR_CHARS = 8


def _string(value: Any, budget: Budget) -> str:
    made = text(value, budget)
    budget.characters(len(made))
    return made


def _to_json(budget: Budget, value: Any, indent: int | None = None, **options: Any) -> str:
    if indent is not None and not 0 <= int(indent) <= 8:
        raise TemplateError("tojson: indent must be 0 to 8")
    unknown = set(options) - {"ensure_ascii", "separators", "sort_keys"}
    if unknown:
        raise TemplateError(f"tojson: option {min(unknown)[:40]!r} is not allowed")
    separators = options.get("separators") or ()
    if not all(isinstance(part, str) and len(part) <= MAX_SEPARATOR_CHARS for part in separators):
        raise TemplateError(f"tojson: separators are texts of at most {MAX_SEPARATOR_CHARS} characters")
    budget.characters(budget.size(value) * (1 + (indent or 0)))
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **options})


def _replace(budget: Budget, value: Any, old: Any, new: Any, count: int = -1) -> str:
    subject, old, new = _string(value, budget), _string(old, budget), _string(new, budget)
    budget.characters((subject.count(old) + 1) * len(new))
    return subject.replace(old, new, count)


def _join(budget: Budget, values: Any, separator: Any = "", attribute: str | None = None) -> str:
    items = [_field(budget, item, attribute) if attribute else item for item in _listed(budget, values)]
    parts, between = [text(item, budget) for item in items], _string(separator, budget)
    budget.characters(sum(map(len, parts)) + len(parts) * len(between))
    return between.join(parts)


def _listed(budget: Budget, values: Any) -> list[Any]:
    if values is UNDEFINED:
        return []
    if not isinstance(values, str | list | tuple | dict | range):
        raise TemplateError(f"{type(values).__name__} is not a list")
    budget.characters(len(values))
    budget.step(len(values) // 8)
    return list(values)


def _field(budget: Budget, item: Any, path: str) -> Any:
    budget.step()
    for name in path.split(".") if isinstance(path, str) else _fail("an attribute is a name"):
        item = item.get(name, UNDEFINED) if isinstance(item, dict) else UNDEFINED
    return item


def _select(wanted: bool, by_attribute: bool) -> Callable[..., list[Any]]:
    def select(budget: Budget, values: Any, *args: Any) -> list[Any]:
        path, rest = (args[0], args[1:]) if by_attribute else (None, args)
        test = TESTS.get(str(budget.key(rest[0]))) if rest else (lambda budget, value: bool(value))
        if test is None:
            raise TemplateError(f"test {str(rest[0])[:40]!r} is not allowed")
        found = []
        for item in _listed(budget, values):
            subject = _field(budget, item, path) if path is not None else item
            if bool(test(budget, subject, *rest[1:])) == wanted:
                found.append(item)
        return found

    return select


def _map(budget: Budget, values: Any, name: str | None = None, *, attribute: str | None = None) -> list[Any]:
    items = _listed(budget, values)
    if attribute is not None:
        return [_field(budget, item, attribute) for item in items]
    chosen = FILTERS.get(str(budget.key(name)))
    if chosen is None:
        raise TemplateError(f"filter {str(name)[:40]!r} is not allowed")
    return [chosen(budget, item) for item in items]


def _items(budget: Budget, value: Any) -> list[Any]:
    if value is UNDEFINED:
        return []
    budget.characters(len(value))
    return list(value.items()) if isinstance(value, dict) else _fail("items of something that is no mapping")


def _fail(message: str) -> Any:
    raise TemplateError(message)


def _indent(budget: Budget, value: Any, width: int = 4, first: bool = False) -> str:
    subject = _string(value, budget)
    pad = " " * (width if 0 <= int(width) <= 16 else _fail("indent: width must be 0 to 16"))
    budget.characters((subject.count("\n") + 1) * len(pad))
    lines = subject.split("\n")
    rest = [pad + line if line else line for line in lines[1:]]
    return "\n".join([pad + lines[0] if first else lines[0], *rest])


def _int(budget: Budget, value: Any, default: int = 0) -> int:
    try:
        return int(budget.number(int(_string(value, budget)[:32])))
    except ValueError:
        return default


def _strip(budget: Budget, value: Any, chars: Any = None) -> str:
    subject = _string(value, budget)
    _pay_naive_search(budget, subject, (chars,))
    return subject.strip(chars)


def _pay_naive_search(budget: Budget, subject: str, args: tuple[Any, ...]) -> None:
    """Pay for a search that may compare every character with every other."""
    longest = max((len(arg) for arg in args if isinstance(arg, str)), default=0)
    budget.characters(len(subject) * (longest // 8))


def _method(name: str) -> Callable[..., Any]:
    """Return a method of str that makes no more text than it is given."""

    def call(budget: Budget, owner: str, *args: Any) -> Any:
        budget.characters(len(owner))
        if name in NAIVE:
            _pay_naive_search(budget, owner, args)
        if not all(isinstance(arg, str | int | tuple | None) for arg in args):
            raise TemplateError(f"{name}: arguments must be text or numbers")
        return getattr(owner, name)(*args)

    return call


def _title(value: str) -> str:
    """Jinja's own title case: unlike Python's, it leaves an apostrophe alone."""
    words = re.split(r"([-\s({\[<]+)", value)
    return "".join(word[:1].upper() + word[1:].lower() for word in words)


def _default(budget: Budget, value: Any, other: Any = "", boolean: bool = False) -> Any:
    return other if value is UNDEFINED or (boolean and not value) else value


_SAFE = (
    *("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "startswith", "endswith"),
    *("upper", "lower", "title", "capitalize", "find", "count"),
)
NAIVE = ("strip", "lstrip", "rstrip", "rsplit")  # in time, where the others search in linear time
METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {
        **{name: _method(name) for name in _SAFE},
        "replace": _replace,
        "join": lambda budget, owner, values: _join(budget, values, owner),
    },
    dict: {
        "items": _items,
        "keys": lambda budget, owner: _listed(budget, owner),
        "values": lambda budget, owner: [value for _, value in _items(budget, owner)],
        "get": lambda budget, owner, key, default=None: owner.get(budget.key(key), default),
    },
}
FILTERS: dict[str, Callable[..., Any]] = {
    "trim": _strip,
    "upper": lambda budget, value: _string(value, budget).upper(),
    "lower": lambda budget, value: _string(value, budget).lower(),
    "title": lambda budget, value: _title(_string(value, budget)),
    "capitalize": lambda budget, value: _string(value, budget).capitalize(),
    "string": lambda budget, value: _string(value, budget),
    "safe": lambda budget, value: _string(value, budget),
    "length": lambda budget, value: 0 if value is UNDEFINED else len(value),
    "first": lambda budget, value: next(iter(_listed(budget, value)), UNDEFINED),
    "last": lambda budget, value: next(iter(_listed(budget, value)[-1:]), UNDEFINED),
    "list": _listed,
    "items": _items,
    "join": _join,
    "replace": _replace,
    "tojson": _to_json,
    "indent": _indent,
    "int": _int,
    "default": _default,
    "map": _map,
    "select": _select(True, False),
    "reject": _select(False, False),
    "selectattr": _select(True, True),
    "rejectattr": _select(False, True),
}
FILTERS |= {"count": FILTERS["length"], "d": FILTERS["default"]}


def _is_sized(budget: Budget, value: Any) -> bool:
    return isinstance(value, str | list | tuple | dict | range) or value is UNDEFINED


TESTS: dict[str, Callable[..., Any]] = {
    "defined": lambda budget, value: value is not UNDEFINED,
    "undefined": lambda budget, value: value is UNDEFINED,
    "none": lambda budget, value: value is None,
    "string": lambda budget, value: isinstance(value, str),
    "mapping": lambda budget, value: isinstance(value, dict),
    "iterable": _is_sized,
    "sequence": _is_sized,
    "number": lambda budget, value: isinstance(value, int | float),
    "integer": lambda budget, value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda budget, value: isinstance(value, float),
    "boolean": lambda budget, value: isinstance(value, bool),
    "true": lambda budget, value: value is True,
    "false": lambda budget, value: value is False,
    "odd": lambda budget, value: budget.number(value) % 2 == 1,
    "even": lambda budget, value: budget.number(value) % 2 == 0,
    "in": lambda budget, value, other: budget.compare("in", value, other),
    "eq": lambda budget, value, other: budget.compare("eq", value, other),
    "ne": lambda budget, value, other: budget.compare("ne", value, other),
}
TESTS |= {"equalto": TESTS["eq"], "==": TESTS["eq"], "!=": TESTS["ne"]}

"""Values of chat templates, and the budget that everything done with them is paid from."""

from collections.abc import Callable
from typing import Any

MAX_NUMBER = 1 << 53
MAX_RANGE = 10_000
MAX_DEPTH = 64


class TemplateError(ValueError):
    """A chat template that is not accepted, or cannot be rendered."""

    def __init__(self, message: str) -> None:
        super().__init__(f"chat template: {message}")


class _Undefined:
    """What a missing name is: empty when printed, false when tested."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return ""


UNDEFINED = _Undefined()


class Namespace:
    """``namespace(...)``: the one thing whose attributes a template can set."""

    def __init__(self, *args: dict[str, Any], **values: Any) -> None:
        self.values = dict(*args, **values)


class Budget:
    """Steps and characters that one rendering may use."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._characters = 0

    def allow(self, *, characters: int, steps: int) -> None:
        """Set what is left."""
        self._characters, self._steps = characters, steps

    def step(self, count: int = 1) -> None:
        """Pay for ``count`` steps."""
        self._steps -= count
        if self._steps < 0:
            raise TemplateError("it takes too many steps (an endless loop?)")

    def characters(self, count: int) -> None:
        """Pay for ``count`` characters or list elements that are about to be made or read."""
        self._characters -= count
        if self._characters < 0:
            raise TemplateError("it makes too much text")

    def size(self, value: Any, depth: int = 0, *, printed: bool = False) -> int:
        """Return the size of a value with all it contains, in characters, paying a step for each part.

        ``printed``: whether it is to become text, which a function, say, cannot.
        """
        self.step()
        if depth > MAX_DEPTH:
            raise TemplateError(f"values nested more than {MAX_DEPTH} deep")
        if isinstance(value, str):
            return len(value) + 2
        if isinstance(value, dict):
            parts = (part for item in value.items() for part in item)
            return sum(self.size(part, depth + 1, printed=printed) + 2 for part in parts)
        if isinstance(value, list | tuple):
            return sum(self.size(item, depth + 1, printed=printed) + 2 for item in value)
        if printed and not isinstance(value, int | float | None | _Undefined):
            raise TemplateError(f"cannot print {type(value).__name__}")
        return 24

    def key(self, value: Any) -> Any:
        """Return what a mapping may be asked for: hashing nested tuples takes forever, or crashes."""
        if not isinstance(value, str | int | float | None):
            raise TemplateError(f"{type(value).__name__} cannot be a key")
        return value

    def number(self, value: Any) -> Any:
        """Return a number, if it is one of reasonable size."""
        if not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
            raise TemplateError("a number is too large, or text stands where a number is needed")
        return value

    def range(self, *bounds: int) -> range:
        """Return a range of reasonable length."""
        made = range(*(int(self.number(bound)) for bound in bounds))
        if len(made) > MAX_RANGE:
            raise TemplateError(f"a range of {len(made)} numbers, at most {MAX_RANGE} accepted")
        return made

    def compare(self, operator: str, left: Any, right: Any) -> bool:
        """Return the result of one comparison."""
        for side in (left, right):  # shared parts of nested lists would be compared again and again
            if isinstance(side, list | tuple | dict):
                self.characters(self.size(side))
            elif isinstance(side, str):
                self.characters(len(side) // 64)
        if operator in ("in", "notin"):
            return bool((left in right) == (operator == "in")) if right is not UNDEFINED else operator != "in"
        if operator in ("eq", "ne"):
            return bool((left == right) == (operator == "eq"))
        ordered: dict[str, Callable[[Any, Any], bool]] = {
            "lt": lambda a, b: a < b,
            "lteq": lambda a, b: a <= b,
            "gt": lambda a, b: a > b,
            "gteq": lambda a, b: a >= b,
        }
        return bool(ordered[operator](left, right))

    def arithmetic(self, operator: str, left: Any, right: Any) -> Any:
        """Return ``left operator right``: numbers, and ``+`` for two strings or two lists."""
        if operator == "+" and isinstance(left, str | list | tuple):
            if type(left) is not type(right):
                raise TemplateError(f"cannot add {type(right).__name__} to {type(left).__name__}")
            self.characters(len(left) + len(right))
            return left + right  # type: ignore[operator]
        a, b = self.number(left), self.number(right)
        if operator in ("/", "//", "%") and b == 0:
            raise TemplateError("division by zero")
        operations: dict[str, Callable[[], Any]] = {
            "+": lambda: a + b,
            "-": lambda: a - b,
            "*": lambda: a * b,
            "/": lambda: a / b,
            "//": lambda: a // b,
            "%": lambda: a % b,
        }
        return self.number(operations[operator]())


def text(value: Any, budget: Budget) -> str:
    """Return a value as it is printed."""
    if isinstance(value, str):
        return value
    budget.characters(budget.size(value, printed=True))
    return str(value)

"""The walk over a parsed chat template: scopes, statements and expressions, each paid for.

Knows only the nodes in `KNOWN`; `template.ChatTemplate` refuses all others before a walk begins.
"""

from typing import Any, NoReturn

from jinja2 import nodes

from edge_client.template_filters import FILTERS, METHODS, TESTS
from edge_client.template_values import UNDEFINED, Budget, Namespace, TemplateError, text

MAX_MACRO_DEPTH = 16


class LoopControl(Exception):
    """Signals to the loop around it; there may be none."""


class _Break(LoopControl):
    """A ``{% break %}``."""


class _Continue(LoopControl):
    """A ``{% continue %}``."""


class Scope:
    """Variables: assignments stay in the innermost loop or macro, as in Jinja."""

    def __init__(self, values: dict[str, Any], parent: "Scope | None" = None) -> None:
        self.values, self.parent = values, parent

    def find(self, name: str) -> Any:
        """Return a variable, or what stands for a missing one."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        return UNDEFINED


class Run:
    """One walk over the tree. ``out`` collects the text."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.out: list[str] = []
        self.depth = 0

    # --- statements ---------------------------------------------------------------------------------

    def body(self, statements: list[nodes.Node], scope: Scope) -> None:
        """Carry out statements, appending to ``out``."""
        for node in statements:
            self.budget.step()
            getattr(self, "_do_" + type(node).__name__.lower())(node, scope)

    def _do_output(self, node: nodes.Output, scope: Scope) -> None:
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                self._emit(part.data)
            else:
                self._emit(text(self.value(part, scope), self.budget))

    def _emit(self, piece: str) -> None:
        self.budget.characters(len(piece))
        self.out.append(piece)

    def _do_if(self, node: nodes.If, scope: Scope) -> None:
        for branch in (node, *node.elif_):
            if self.value(branch.test, scope):
                return self.body(branch.body, scope)
        return self.body(node.else_, scope)

    def _do_for(self, node: nodes.For, scope: Scope) -> None:
        source = self.value(node.iter, scope)
        if source is UNDEFINED:
            source = ()
        if not isinstance(source, list | tuple | dict | str | range):
            raise TemplateError(f"line {node.lineno}: cannot loop over {type(source).__name__}")
        items: list[Any] = []
        for item in source:
            self.budget.step()
            if node.test is not None:
                inner = Scope({}, scope)
                self._assign(node.target, item, inner)
                if not self.value(node.test, inner):
                    continue
            items.append(item)
        for index, item in enumerate(items):
            inner = Scope({"loop": _loop(items, index)}, scope)
            self._assign(node.target, item, inner)
            try:
                self.body(node.body, inner)
            except _Continue:
                continue
            except _Break:
                break
        if not items:
            self.body(node.else_, Scope({}, scope))

    def _do_break(self, node: nodes.Node, scope: Scope) -> NoReturn:
        raise _Break

    def _do_continue(self, node: nodes.Node, scope: Scope) -> NoReturn:
        raise _Continue

    def _do_assign(self, node: nodes.Assign, scope: Scope) -> None:
        self._assign(node.target, self.value(node.node, scope), scope)

    def _do_assignblock(self, node: nodes.AssignBlock, scope: Scope) -> None:
        if node.filter is not None:
            raise TemplateError(f"line {node.lineno}: a filtered set block is not allowed")
        self._assign(node.target, self._captured(node.body, Scope({}, scope)), scope)

    def _captured(self, statements: list[nodes.Node], scope: Scope) -> str:
        outer, self.out = self.out, []
        try:
            self.body(statements, scope)
            return "".join(self.out)
        finally:
            self.out = outer

    def _do_macro(self, node: nodes.Macro, scope: Scope) -> None:
        scope.values[node.name] = lambda *args, **named: self._call_macro(node, scope, args, named)

    def _call_macro(
        self, node: nodes.Macro, scope: Scope, args: tuple[Any, ...], named: dict[str, Any]
    ) -> str:
        if self.depth >= MAX_MACRO_DEPTH:
            raise TemplateError(f"line {node.lineno}: macros nested more than {MAX_MACRO_DEPTH} deep")
        names = [name.name for name in node.args]
        if len(args) > len(names) or set(named) - set(names):
            raise TemplateError(f"line {node.lineno}: macro called with unknown arguments")
        defaults = dict(zip(names[len(names) - len(node.defaults) :], node.defaults, strict=True))
        inner = Scope(dict(zip(names, args, strict=False)) | named, scope)
        for name in names:
            if name not in inner.values:
                inner.values[name] = self.value(defaults[name], inner) if name in defaults else UNDEFINED
        self.depth += 1
        try:
            return self._captured(node.body, inner)
        finally:
            self.depth -= 1

    def _assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope.values[target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = scope.find(target.name)
            if not isinstance(space, Namespace):
                raise TemplateError(f"line {target.lineno}: only a namespace's attributes can be set")
            space.values[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            if not isinstance(value, list | tuple) or len(value) != len(target.items):
                raise TemplateError(f"line {target.lineno}: cannot unpack into {len(target.items)} names")
            for part, item in zip(target.items, value, strict=True):
                self._assign(part, item, scope)
        else:
            raise TemplateError(f"line {target.lineno}: cannot assign to {type(target).__name__}")

    # --- expressions --------------------------------------------------------------------------------

    def value(self, node: nodes.Node, scope: Scope) -> Any:
        """Return the value of an expression."""
        self.budget.step()
        return getattr(self, "_of_" + type(node).__name__.lower())(node, scope)

    def _of_const(self, node: nodes.Const, scope: Scope) -> Any:
        return self.budget.number(node.value) if type(node.value) in (int, float) else node.value

    def _of_templatedata(self, node: nodes.TemplateData, scope: Scope) -> str:
        return node.data

    def _of_name(self, node: nodes.Name, scope: Scope) -> Any:
        return scope.find(node.name)

    def _of_list(self, node: nodes.List, scope: Scope) -> list[Any]:
        return [self.value(item, scope) for item in node.items]

    def _of_tuple(self, node: nodes.Tuple, scope: Scope) -> tuple[Any, ...]:
        return tuple(self.value(item, scope) for item in node.items)

    def _of_dict(self, node: nodes.Dict, scope: Scope) -> dict[Any, Any]:
        return {self.budget.key(self.value(p.key, scope)): self.value(p.value, scope) for p in node.items}

    def _of_condexpr(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        return self.value(node.expr2, scope) if node.expr2 is not None else UNDEFINED

    def _of_and(self, node: nodes.And, scope: Scope) -> Any:
        return self.value(node.left, scope) and self.value(node.right, scope)

    def _of_or(self, node: nodes.Or, scope: Scope) -> Any:
        return self.value(node.left, scope) or self.value(node.right, scope)

    def _of_not(self, node: nodes.Not, scope: Scope) -> bool:
        return not self.value(node.node, scope)

    def _of_concat(self, node: nodes.Concat, scope: Scope) -> str:
        parts = [text(self.value(part, scope), self.budget) for part in node.nodes]
        self.budget.characters(sum(map(len, parts)))
        return "".join(parts)

    def _of_compare(self, node: nodes.Compare, scope: Scope) -> bool:
        left = self.value(node.expr, scope)
        for operand in node.ops:
            right = self.value(operand.expr, scope)
            if not self.budget.compare(operand.op, left, right):
                return False
            left = right
        return True

    def _arithmetic(self, node: nodes.BinExpr, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        return self.budget.arithmetic(node.operator, left, right)

    _of_add = _of_sub = _of_mul = _of_div = _of_floordiv = _of_mod = _arithmetic

    def _of_neg(self, node: nodes.Neg, scope: Scope) -> Any:
        return self.budget.arithmetic("-", 0, self.value(node.node, scope))

    def _of_getattr(self, node: nodes.Getattr, scope: Scope) -> Any:
        return self._member(self.value(node.node, scope), node.attr, node.lineno)

    def _member(self, owner: Any, name: str, line: int) -> Any:
        """Return ``owner.name``: a listed method, a namespace's value, or a mapping's entry; nothing else."""
        if isinstance(owner, Namespace):
            return owner.values.get(name, UNDEFINED)
        method = METHODS.get(type(owner), {}).get(name)
        if method is not None:
            return lambda *args, **named: method(self.budget, owner, *args, **named)
        if owner is UNDEFINED:
            raise TemplateError(f"line {line}: {name[:40]!r} asked of something undefined")
        return owner.get(name, UNDEFINED) if isinstance(owner, dict) else UNDEFINED

    def _of_getitem(self, node: nodes.Getitem, scope: Scope) -> Any:
        owner = self.value(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            if not isinstance(owner, str | list | tuple):
                raise TemplateError(f"line {node.lineno}: cannot slice {type(owner).__name__}")
            ends = (node.arg.start, node.arg.stop, node.arg.step)
            bounds = [None if end is None else self.value(end, scope) for end in ends]
            self.budget.characters(len(owner))
            return owner[slice(*bounds)]
        key = self.value(node.arg, scope)
        if isinstance(owner, dict) and isinstance(key, str | int):
            return owner[key] if key in owner else self._member(owner, str(key), node.lineno)
        if isinstance(owner, str | list | tuple) and isinstance(key, int):
            return owner[key] if -len(owner) <= key < len(owner) else UNDEFINED
        if isinstance(key, str):
            return self._member(owner, key, node.lineno)
        raise TemplateError(f"line {node.lineno}: {type(owner).__name__} has no such element")

    def _of_call(self, node: nodes.Call, scope: Scope) -> Any:
        called = self.value(node.node, scope)
        if not callable(called) or node.dyn_args is not None or node.dyn_kwargs is not None:
            raise TemplateError(f"line {node.lineno}: this cannot be called")
        return called(*self._positional(node, scope), **self._named(node, scope))

    def _positional(self, node: Any, scope: Scope) -> list[Any]:
        return [self.value(arg, scope) for arg in node.args]

    def _named(self, node: Any, scope: Scope) -> dict[str, Any]:
        return {pair.key: self.value(pair.value, scope) for pair in node.kwargs}

    def _of_filter(self, node: nodes.Filter, scope: Scope) -> Any:
        if node.node is None:
            raise TemplateError(f"line {node.lineno}: filter blocks are not allowed")
        value = self.value(node.node, scope)
        args, named = self._positional(node, scope), self._named(node, scope)
        return FILTERS[node.name](self.budget, value, *args, **named)

    def _of_test(self, node: nodes.Test, scope: Scope) -> bool:
        value = self.value(node.node, scope)
        return bool(TESTS[node.name](self.budget, value, *self._positional(node, scope)))


# Everything that `Run` walks, and the parts of it.
KNOWN = {
    *("Template", "TemplateData", "Output", "If", "For", "Break", "Continue", "Assign", "AssignBlock"),
    *("Macro", "Const", "Name", "NSRef", "List", "Tuple", "Dict", "Pair", "Keyword", "CondExpr"),
    *("And", "Or", "Not"),
    *("Concat", "Compare", "Operand", "Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Neg"),
    *("Getattr", "Getitem", "Slice", "Call", "Filter", "Test"),
}


def _loop(items: list[Any], index: int) -> dict[str, Any]:
    count = len(items)
    return {
        "index": index + 1,
        "index0": index,
        "revindex": count - index,
        "revindex0": count - index - 1,
        "first": index == 0,
        "last": index == count - 1,
        "length": count,
        "previtem": items[index - 1] if index else UNDEFINED,
        "nextitem": items[index + 1] if index + 1 < count else UNDEFINED,
    }

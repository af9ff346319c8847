"""Chat templates from a cloud that is not trusted: evaluated here, never executed.

transformers compiles a template to Python and runs it in a sandbox that bounds neither time nor
memory. Here Jinja only parses it; the tree is walked by the code below, which knows the few constructs
that chat templates use. A template has no Python attribute to reach for, because nothing here looks one
up; it cannot run long or grow large, because every node visited and every character made is counted.
"""

from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from edge_client.template_filters import FILTERS, TESTS
from edge_client.template_run import KNOWN, LoopControl, Run, Scope
from edge_client.template_values import Budget, Namespace, TemplateError, text

__all__ = ["ChatTemplate", "TemplateError"]

MAX_TEMPLATE_CHARS = 64 * 1024  # the longest in use (tool calling, vision) have 20 thousand
MAX_STEPS = 500_000  # nodes visited in one rendering: under a second


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; its body is rendered as is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A parsed and checked chat template.

    Parameters
    ----------
    source
        Jinja text as found in ``tokenizer_config.json`` or ``chat_template.jinja``.

    Raises
    ------
    TemplateError
        If it is too long, does not parse, or uses anything that chat templates have no need of.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"{len(source)} characters, at most {MAX_TEMPLATE_CHARS} accepted")
        environment = Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        try:
            self._tree = environment.parse(source)
            self._check(self._tree)
        except TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {str(error.message)[:200]}") from None
        except (RecursionError, ValueError, OverflowError) as error:
            if isinstance(error, TemplateError):
                raise
            raise TemplateError("nested too deeply, or a number too long") from None

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Return the prompt for ``messages``; ``variables`` as for `apply_chat_template`.

        Raises
        ------
        TemplateError
            If the template raises, is wrong, or exceeds its budget of steps or characters.
        """
        data = {"messages": messages, **variables}
        budget = Budget(MAX_STEPS)
        given = budget.size(data)
        budget.allow(characters=(4 << 20) + 64 * given, steps=MAX_STEPS)
        run = Run(budget)
        scope = Scope({**data, "range": budget.range, "namespace": Namespace})
        scope.values["raise_exception"] = lambda message="": _raise(text(message, budget))
        scope.values["strftime_now"] = lambda form: datetime.now().strftime(text(form, budget)[:64])
        try:
            run.body(self._tree.body, scope)
        except RecursionError:
            raise TemplateError("recurses too deeply") from None
        except LoopControl:
            raise TemplateError("break or continue outside of a loop") from None
        except TemplateError:
            raise
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise TemplateError(f"{type(error).__name__}: {str(error)[:200]}") from None
        return "".join(run.out)

    def _check(self, tree: nodes.Node) -> None:
        """Refuse what the walk below does not know, before anything is rendered."""
        for node in [tree, *tree.find_all(nodes.Node)]:
            kind = type(node).__name__
            if kind not in KNOWN:
                raise TemplateError(f"line {node.lineno}: {kind} is not allowed in a chat template")
            name = getattr(node, "attr", None) or getattr(node, "name", None)
            if isinstance(node, nodes.Getattr | nodes.NSRef | nodes.Name) and str(name).startswith("_"):
                raise TemplateError(f"line {node.lineno}: names beginning with an underscore are not allowed")
            if isinstance(node, nodes.Filter) and name not in FILTERS:
                raise TemplateError(f"line {node.lineno}: filter {str(name)[:40]!r} is not allowed")
            if isinstance(node, nodes.Test) and name not in TESTS:
                raise TemplateError(f"line {node.lineno}: test {str(name)[:40]!r} is not allowed")
            if isinstance(node, nodes.For) and node.recursive:
                raise TemplateError(f"line {node.lineno}: recursive loops are not allowed")


def _raise(message: str) -> NoReturn:
    raise TemplateError(f"the template refuses this conversation: {message[:200]}")

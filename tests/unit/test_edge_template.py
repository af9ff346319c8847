"""Chat templates: the same text as transformers renders, and nothing that a hostile one can do."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from edge_client.template import ChatTemplate, TemplateError

# ruff: noqa: E501 - templates are what they are

# One of each style in use: plain loops, namespaces, macros, tests and filters, nested content, tools.
TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' +
message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}{% endif %}""",
    "alternating": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' ~ role ~ '\n' ~ (system if loop.first else '') ~ message.content | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "namespace": """{%- set ns = namespace(system='', last=-1, thinking=false) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if m.role == 'user' and ns.last < 0 %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.content is string %}{% set content = m.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '[' + m.role + (' last' if loop.index0 == ns.last else '') + ']' + content }}
    {%- if not loop.last %}{{ '|' }}{% elif enable_thinking is defined and enable_thinking %}!{% endif %}
{%- endfor %}""",
    "tools": """{%- if tools %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
{% endfor %}{% endif %}
{%- for m in messages %}
  {{ m.role }}: {{ m['content'] }}
  {% if m.get('tool_calls') %}{% for call in m.tool_calls %}<call>{{ call.name }} {{ call.arguments | tojson }}
  {%- for key, value in call.arguments.items() %} {{ key }}={{ value }}{% endfor %}</call>{% endfor %}{% endif %}
{% endfor %}""",
    "macro": """{%- macro turn(role, text, end='</s>') -%}
    <{{ role }}>{{ text | trim | upper }}{{ end }}
{%- endmacro -%}
{%- for m in messages if m.role != 'system' -%}
    {{ turn(m.role, m.content) if loop.last else turn(m.role, m.content, end='\n') }}
    {%- if loop.nextitem is defined %}next: {{ loop.nextitem.role }}{% endif %}
{%- else %}nobody{% endfor -%}
{% set joined %}{% for m in messages %}{{ m.role }}{{ ", " if not loop.last }}{% endfor %}{% endset %}{{ joined }}""",
    "parts": """{% for m in messages %}{% if m.content is iterable and m.content is not string %}
{%- for part in m.content %}{% if part['type'] == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{%- else %}{{ m.content }}{% endif %}{{ none }}{{ missing }}{{ true }}{{ 1.5 }}{{ [1, 'a'] }}
{% endfor %}{{ messages | map(attribute='role') | join('+') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages | first | length }}{{ (messages | last).role.startswith('a') }}{{ 'a-b'.replace('-', '+') | title }}
{%- for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i == 2 %}{% break %}{% endif %}{% endfor %}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "scoping": """{% set x = 'outer' %}{% for m in messages %}{{ x }}{% set x = 'inner' %}{{ x }}{% endfor %}{{ x }}
{%- if true %}{% set x = 'branch' %}{% endif %}{{ x }}{% set a, b = 'p', 'q' %}{{ b ~ a }}{{ 'yes' if x in ['branch'] else 'no' }}
{{- 7 // 2 }}{{ 7 % 4 }}{{ 2 * 3 - 1 }}{{ -3 }}{{ 'ab'[0] }}{{ 'abc'[1:] }}{{ (1, 2)[-1] }}{{ x is not none and x != 'y' }}""",
}
CHATS = {
    "one": [{"role": "user", "content": " Hi there \n"}],
    "turns": [
        {"role": "user", "content": "Ünï <b>&amp;</b> {{ x }}"},
        {"role": "assistant", "content": "<think>a</think>\n\nfine", "tool_calls": [{"name": "f", "arguments": {"a": 1, "b": "é"}}]},
        {"role": "user", "content": "and now?"},
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ],
}  # fmt: skip
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": True}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": [1, 2, None, True]}}}]


@pytest.mark.parametrize("chat", list(CHATS))
@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(name, chat, prompt):
    for tools in (None, TOOLS):
        ours = ChatTemplate(TEMPLATES[name]).render(
            CHATS[chat], tools=tools, documents=None, add_generation_prompt=prompt, **VARIABLES
        )
        theirs, _ = render_jinja_template(
            [CHATS[chat]],
            tools=tools,
            chat_template=TEMPLATES[name],
            add_generation_prompt=prompt,
            **VARIABLES,
        )
        assert ours == theirs[0]


LISTS = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
TUPLES = "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
# 200 thousand deep: Python's own hash of it overflows the stack, and the process is gone.
DEEP = (
    "{% set n = namespace(x=1) %}{% for i in range(5000) %}{% set n.x = "
    + "(" * 40
    + "n.x"
    + ",)" * 40
    + " %}{% endfor %}"
)
LONG = (
    "{% set n = namespace(x='x', y='y') %}{% for i in range(19) %}"
    "{% set n.x = n.x ~ n.x %}{% set n.y = n.y ~ n.y %}{% endfor %}"
)

HOSTILE = {
    "doubling as a number": LISTS + "{{ n.x | int }}",
    "doubling as an error": LISTS + "{{ raise_exception(n.x) }}",
    "doubling as a date": LISTS + "{{ strftime_now(n.x) }}",
    "doubling replaced": LISTS + "{{ 'a' | replace(n.x, 'b') }}",
    "doubling between": LISTS + "{{ ['a', 'b'] | join(n.x) }}",
    "doubling as a path": LISTS + "{{ messages | map(attribute=n.x) | list }}",
    "doubling as a test": LISTS + "{{ messages | select(n.x) | list }}",
    "doubling as a filter": TUPLES + "{{ messages | map(n.x) | list }}",
    "doubling as a key": TUPLES + "{{ {n.x: 1} }}",
    "doubling asked for": TUPLES + "{{ {}.get(n.x) }}",
    "deep key": DEEP + "{{ {n.x: 1} }}",
    "deep key asked for": DEEP + "{{ messages[0].get(n.x) }}",
    "deep filter": DEEP + "{{ messages | map(n.x) | list }}",
    "long separators": LONG + "{{ range(9000) | list | tojson(separators=(n.x, ':')) | length }}",
    "slow strip": LONG + "{{ n.x.strip(n.y ~ 'x') }}",
    "slow trim": LONG + "{{ n.x | trim(n.y ~ 'x') }}",
    "slow rsplit": LONG + "{{ n.x.rsplit('xy' ~ n.x[:200000]) }}",
    "functions in a list": "{{ [range, strftime_now] }}",
    "namespace in a list": "{{ [namespace()] }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ ['']|map('attr', '__class__')|list }}",
    "class by select": "{{ messages | map(attribute='__class__') | join }}{{ lipsum.__globals__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "percent format": "{{ '%999999999d' % 1 }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "endless nesting": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "huge range": "{% for a in range(10000000000) %}{% endfor %}",
    "long text": "{{ 'a' * 10000000000 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "big product": "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by plus": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling lists": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "doubling json": "{% set ns = namespace(x=[1]) %}{% for i in range(50) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "doubling compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "doubling searched": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x in [n.y] }}",
    "doubling blocks": "{% set x0 %}aaaaaaaaaa{% endset %}"
    + "".join(f"{{% set x{i + 1} %}}{{{{ x{i} }}}}{{{{ x{i} }}}}{{% endset %}}" for i in range(60)),
    "growing list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "replace": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(20) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaa') %}{% endfor %}",
    "join": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(20) %}{% set ns.x = ns.x.join(['', '', '', '', '', '']) %}{% set ns.x = ns.x | list | join(ns.x) %}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(15) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "indent": "{{ 'a\nb' | indent(999999999) }}",
    "center": "{{ 'a' | center(999999999) }}",
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long number": "{{ " + "9" * 50000 + " }}",
    "too long": "x" * 100_000,
    "syntax": "{% for %}",
    "unknown tag": "{% debug %}",
    "call block": "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}x{% endcall %}",
    "calls a string": "{{ 'a'() }}",
    "mutation": "{{ messages.append(1) }}",
    "pop": "{{ messages[0].pop('role') }}",
    "starred": "{{ range(*[1, 2]) }}",
    "strange test": "{{ 1 is callable }}",
    "self": "{{ self._TemplateReference__context }}",
    "self loop in namespace": "{% set n = namespace() %}{% set n.x = n %}{{ n.x.x.x }}",
    "key is unhashable": "{{ {[1]: 2} }}",
}


@pytest.mark.timeout(600)  # a template that loops must end by its budget, long before this
@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_templates_are_refused_quickly(name):
    with pytest.raises(TemplateError, match="chat template: "):
        text = ChatTemplate(HOSTILE[name]).render(CHATS["one"])
        # What reaches here must have reached nothing: attributes that do not exist print as nothing.
        assert "class" not in text and len(text) < 100
        raise TemplateError("harmless")


def test_underscore_item_of_a_mapping_is_only_data():
    assert ChatTemplate("{{ messages[0]['__class__'] }}").render(CHATS["one"]) == ""


def test_errors_do_not_repeat_the_conversation():
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("{{ messages[0].content + 1 }}").render([{"role": "user", "content": "secret"}])
    assert "secret" not in str(caught.value)


def test_long_conversations_fit_the_budget():
    chat = [{"role": ("user", "assistant")[i % 2], "content": "word " * 2000} for i in range(100)]
    text = ChatTemplate(TEMPLATES["alternating"]).render(chat, add_generation_prompt=True, bos_token="")
    assert len(text) > 900_000


@settings(max_examples=150)
@given(st.text(alphabet="{}%#|()[]'\"~+*-.:,=_ abfinorsetmx019\n", max_size=120))
def test_any_text_renders_or_is_refused(source):
    with contextlib.suppress(TemplateError):
        ChatTemplate("{% set x = messages %}" + source).render(CHATS["turns"])

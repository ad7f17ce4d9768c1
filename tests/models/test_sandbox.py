"""A chat template is untrusted code: whatever it tries ends soon, as one DataError."""

from __future__ import annotations

import time

import pytest

from ppojax.errors import DataError
from ppojax.models import sandbox
from ppojax.models.chat import MAX_TEMPLATE_CHARS, ChatTemplate

USER = {"role": "user", "content": "x" * 2000}


def grow(step: str, start: str = "'ab'", last: str = "") -> str:
    """A template that grows a value 60 times."""
    body = "{% for i in range(60) %}{% set ns.s = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(s=" + start + ") %}" + body + last


SIZE = "characters"
BLOWUPS = {
    # filters and methods that ask for any width
    "center": ("{{ 'a' | center(10000000000) }}", "No filter named 'center'"),
    "center method": ("{{ 'a'.center(10000000000) }}", "attribute 'center' of 'str' object is unsafe"),
    "ljust": ("{{ 'a'.ljust(10000000000) }}", "unsafe"),
    "zfill": ("{{ 'a'.zfill(10000000000) }}", "unsafe"),
    "expandtabs": ("{{ '\t'.expandtabs(10000000000) }}", "unsafe"),
    "translate": ("{{ 'a'.translate({97: 'b'}) }}", "unsafe"),
    "format filter": ("{{ '%10000000000d' | format(1) }}", "No filter named 'format'"),
    "format method": ("{{ '{:>10000000000}'.format(1) }}", "attribute 'format' of 'str' object is unsafe"),
    "format item": ("{{ ''['format'](1) }}", "unsafe"),
    "format_map": ("{{ '{:>10000000000}'.format_map({}) }}", "unsafe"),
    "percent": ("{{ '%10000000000d' % 1 }}", "operator '%'"),
    "indent": ("{{ 'a' | indent(10000000000, true) }}", "indent by"),
    "indent text": (grow("'a' | indent(ns.s ~ ns.s, true)"), SIZE),
    "tojson indent": ("{{ [[1]] | tojson(indent=10000000000) }}", "tojson indents by at most 16"),
    "batch": ("{{ [1] | batch(10000000000, 'x') | list }}", "No filter named 'batch'"),
    "round": ("{{ 1.5 | round(10000000000, 'ceil') }}", "No filter named 'round'"),
    # operators
    "text times": ("{{ 'a' * 10000000000 }}", r"operator '\*'"),
    "list times": ("{{ [1] * 10000000000 }}", r"operator '\*'"),
    "tuple times": ("{{ (1,) * 10000000000 }}", r"operator '\*'"),
    "power": ("{{ 9 ** 99999999 }}", r"operator '\*\*'"),
    "squares": (grow("ns.s * ns.s", "3"), "whole number of over 256 bits"),
    "plus": (grow("ns.s + ns.s"), SIZE),
    "concat": (grow("ns.s ~ ns.s"), SIZE),
    "list plus": (grow("ns.s + ns.s", "[1]"), SIZE),
    # values that hold themselves many times
    "lists": (grow("[ns.s, ns.s]", "[1]"), SIZE),
    "tuples": (grow("(ns.s, ns.s)", "[1]"), SIZE),
    "dicts": (grow("{'a': ns.s, 'b': ns.s}", "[1]"), SIZE),
    "dict calls": (grow("dict(a=ns.s, b=ns.s)", "[1]"), SIZE),
    "defaults of map": (grow("[1, 2] | map(attribute='z', default=ns.s) | list", "[1]"), SIZE),
    "namespaces": (grow("namespace(a=ns.s, b=ns.s)", "1", "{{ ns.s }}"), "a Namespace is not data"),
    "namespaces in a filter": (grow("namespace(a=ns.s, b=ns.s)", "1", "{{ ns.s | upper }}"), "not data"),
    "namespaces in a list": (grow("namespace(a=ns.s, b=ns.s)", "1", "{{ [ns.s] | upper }}"), "not data"),
    "namespaces in an error": (grow("namespace(a=ns.s, b=ns.s)", "1", "{{ raise_exception(ns.s) }}"), "not data"),
    "nesting": (
        "{% set n = namespace(s=[]) %}{% for i in range(2000) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s }}",
        "recursion",
    ),
    # text made of text
    "replace": (grow("ns.s | replace('a', 'aaaa')"), SIZE),
    "replace method": (grow("ns.s.replace('', 'aaaa')"), SIZE),
    "join": (grow("[ns.s, ns.s, ns.s] | join"), SIZE),
    "join method": (grow("ns.s.join(ns.s)"), SIZE),
    "set blocks": (
        grow("1").replace("{% set ns.s = 1 %}", "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}"),
        SIZE,
    ),
    "literal text in a loop": (
        "{% set t %}{% for i in range(19999) %}" + "a" * 99_999 + "{% endfor %}{% endset %}",
        SIZE,
    ),
    "constants in a loop": (
        "{% set t %}{% for i in range(19999) %}{{ '" + "a" * 99_999 + "' }}{% endfor %}{% endset %}",
        SIZE,
    ),
    "much output": ("{% for i in range(19999) %}" + "a" * 99_999 + "{% endfor %}", SIZE),
    # time
    "ranges": ("{% for i in range(19999) %}{% for j in range(19999) %}{% endfor %}{% endfor %}", "loop steps"),
    "a long range": ("{{ range(10000000000) | list }}", "loop steps"),
    "a longer range": ("{{ range(99999999999999999999) }}", "too large"),
    "loops over text": (
        "{% for a in m %}{% for b in m %}{% for c in m %}{% endfor %}{% endfor %}{% endfor %}",
        "steps",
    ),
    "a loop that takes nothing": (
        "{% for i in range(999) %}{% for a in m if false %}{% endfor %}{% endfor %}",
        "steps",
    ),
    "a macro in itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a macro twice in itself": (
        "{% macro f(n) %}{% if n %}{% set x = f(n - 1) %}{% set y = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
        "loop steps and calls",
    ),
    "a loop in itself": ("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursion"),
    # ways out
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "class item": ("{{ messages['__class__'].x }}", "unsafe"),
    "attr": ("{{ messages | attr('__class__') }}", "No filter named 'attr'"),
    "init": ("{{ namespace.__init__.__globals__ }}", "unsafe"),
    "self": ("{{ self }}", "not data"),
    "generators": ("{{ messages | map('upper') }}", "a generator is not data"),
    "changing a list": ("{{ messages.append(1) }}", "unsafe"),
    "changing a dict": ("{{ messages[0].update({}) }}", "unsafe"),
    "globals": ("{{ lipsum(1000) }}", "'lipsum' is undefined"),
    "include": ("{% include 'a' %}", "include is not available"),
    "import": ("{% import 'a' as b %}", "import is not available"),
    "extends": ("{% extends 'a' %}", "extends is not available"),
    "autoescape": ("{% autoescape true %}{% endautoescape %}", "not available"),
    # plain faults
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "index": ("{{ 'a'.index('b') }}", "not found"),
    "types": ("{{ messages[0]['content'] + 1 }}", "cannot render"),
    "raise": ("{{ raise_exception('no tools') }}", "no tools"),
    "syntax": ("{% for %}", "does not compile"),
    "parentheses": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "does not compile"),
    "nested loops": ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "does not compile"),
    "nested conditions": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "does not compile"),
    "length": ("x" * (MAX_TEMPLATE_CHARS + 1), "200001 characters, expected at most 200000"),
}


@pytest.mark.parametrize("case", BLOWUPS)
def test_what_templates_try_ends_soon(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 30_000)  # checking types makes each step ten times as slow
    source, text = BLOWUPS[case]
    start = time.process_time()
    with pytest.raises(DataError, match=f"chat template: .*{text}") as error:
        ChatTemplate("{% set m = messages[0].content %}" * (" m " in source) + source).render([USER])
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 500


def test_time_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    source = "{% for i in range(200000) %}{% set x = i ~ i %}{% endfor %}"
    with pytest.raises(DataError, match=r"over 0\.05 s"):
        ChatTemplate(source).render([USER])


def test_what_templates_need_is_there() -> None:
    source = (
        "{%- macro show(x, y='-') %}{{ x ~ y }}{% endmacro -%}"
        "{%- for m in messages if m.role != 'system' %}{{ loop.index }}{{ m['content'].strip() | upper }};{% endfor -%}"
        "{{ show('a') }}{{ ' b ' | trim }}{{ ['x', 1] | join(', ') }}{{ {'k': [1, none]} | tojson }}"
        "{{ 'a-b'.split('-')[-1] }}{{ 'abc'[::-1] }}{{ 'aXa'.replace('a', 'b', 1) }}{{ [3, 1] | sort | first }}"
        "{%- set ns = namespace(n=0) %}{% for k, v in {'p': 2}.items() %}{% set ns.n = ns.n + v * 3 %}{% endfor %}"
        "{{ ns.n }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'x' in ('x', 'y') }}{{ unknown }}"
        "{% call(z) show2() %}{{ z }}{% endcall %}"
    ).replace("{% call(z)", "{% macro show2() %}<{{ caller(7) }}>{% endmacro %}{% call(z)")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " u "}]
    assert ChatTemplate(source).render(messages) == '1U;a-bx, 1{"k": [1, null]}bcbabXa161True<7>'


def test_long_conversations_fit() -> None:
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    text = ChatTemplate(source).render([{"role": "user", "content": "word " * 1000}] * 2000)
    assert len(text) == 2000 * 5006

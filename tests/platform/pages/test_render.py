"""Templates escape every text, refuse what is missing, and allow only the scripts of their page."""

from __future__ import annotations

import pytest
from jinja2 import DictLoader, UndefinedError

from deta.platform.pages import render as module
from deta.platform.pages.render import (
    PLOTLY,
    content_policy,
    plotly_source,
    policy_hash,
    read_asset,
    render,
    script_source,
    style_source,
)


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch):
    """Renders a text as a template, with the settings of all templates."""

    def render_text(text: str, **values: object) -> str:
        environment = module._environment().overlay(loader=DictLoader({"t": text}))
        monkeypatch.setattr(module, "_environment", lambda: environment)
        return render("t", **values)

    return render_text


def test_text_is_escaped_and_cleaned(template):
    assert (
        template("<b>{{ a }}</b>", a="<i> & \u202e'\"") == "<b>&lt;i&gt; &amp; \ufffd&#39;&#34;</b>"
    )


def test_a_missing_value_is_an_error(template):
    with pytest.raises(UndefinedError, match="'a' is undefined"):
        template("{{ a }}")


def test_an_address_that_could_run_a_script_is_an_error(template):
    with pytest.raises(ValueError, match="no http"):
        template('<a href="{{ a|checked_address }}">', a="javascript:alert(1)")


def test_an_asset_that_ends_its_element_is_refused():
    with pytest.raises(RuntimeError, match=r"a\.js holds text that would end its element"):
        module._part_of_page("x = '</SCRIPT>'", "a.js")


def test_a_report_allows_its_scripts_and_any_style():
    policy = content_policy([PLOTLY, "pages/figures.js"])
    assert policy == (
        f"default-src 'none'; script-src {policy_hash(plotly_source())} "
        f"{policy_hash(read_asset('pages/figures.js'))}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    assert "script-src 'none';" in content_policy([])


def test_a_served_page_may_ask_its_server_and_nobody_else():
    policy = content_policy(
        ["pages/slideshow.js"],
        styles=["pages/images.css"],
        is_served=True,
        has_served_scripts=True,
    )
    style = policy_hash(style_source(["pages/images.css"]))
    assert f"script-src {policy_hash(script_source('pages/slideshow.js'))} 'self';" in policy
    assert f"style-src {style};" in policy
    assert policy.endswith("connect-src 'self'; frame-ancestors 'none'")

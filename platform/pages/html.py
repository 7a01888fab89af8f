"""HTML elements made in Python, for the pages that are not templates yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from deta.platform.pages.render import plotly_source, policy_hash
from deta.platform.pages.safe_text import checked_address, json_text, without_unseen

__all__ = [
    "Markup", "document", "element", "join", "json_text", "paragraph", "plotly_source",
    "policy_hash",
]  # fmt: skip
VOID = {"meta", "br", "col", "link", "input"}


def element(name: str, *content: str, **attributes: str) -> Markup:
    parts = [f"<{name}"]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if key.startswith("on") or key in ("src", "srcdoc", "action", "formaction"):
            raise ValueError(f"<{name}> may not have the attribute {key!r}: it could run a script")
        if key == "href":
            checked_address(value)
        parts.append(f' {key}="{_escaped(value)}"')
    parts.append(">")
    if name in VOID:
        return Markup("".join(parts))
    parts += [item if isinstance(item, Markup) else _escaped(item) for item in content]
    parts.append(f"</{name}>")
    return Markup("".join(parts))


def join(parts: Iterable[str], between: str = "") -> Markup:
    return Markup(
        _escaped(between).join(p if isinstance(p, Markup) else _escaped(p) for p in parts)
    )


def paragraph(*content: str, class_: str = "") -> Markup:
    return element("p", *content, class_=class_) if class_ else element("p", *content)


def document(
    title: str,
    styles: Sequence[str],
    body: Sequence[Markup],
    *,
    policy: str | None = None,
    **attributes: str,
) -> Markup:
    by_policy = element("meta", http_equiv="Content-Security-Policy", content=policy or "")
    head = [
        element("meta", charset="utf-8"),
        *([by_policy] if policy else []),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("meta", name_="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup("".join(styles))),
    ]
    html = element("html", element("head", *head), element("body", *body, **attributes), lang="en")
    return join([Markup("<!DOCTYPE html>\n"), html, Markup("\n")])


def _escaped(text: str) -> str:
    return str(escape(without_unseen(text)))

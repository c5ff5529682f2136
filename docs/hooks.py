"""LaTeX between dollar signs -> MathML in the pages of the site, as in the report: no script and no request."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

BEFORE_ESCAPES = 185  # after code between backticks (190), before a backslash means anything (180)


class _Formula(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        display = "block" if m[1] == "$$" else "inline"
        return self.md.htmlStash.store(convert(m[2], display=display)), m.start(0), m.end(0)


class Mathematics(Extension):
    """One or two dollar signs, as GitHub has it."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Formula(r"(\$\$?)([^$]+)\1", md), "mathematics", BEFORE_ESCAPES)


def on_config(config: Any) -> Any:
    """MkDocs calls this once it has read its settings."""
    config.markdown_extensions.append(Mathematics())
    return config

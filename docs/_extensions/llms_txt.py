"""Writes ``llms.txt`` into the site: each page with its first sentence, for language models."""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx


def _summary(tree: nodes.document) -> str:
    """The first paragraph of a page."""
    for paragraph in tree.findall(nodes.paragraph):
        return " ".join(paragraph.astext().split())
    return ""


def write(app: Sphinx, failure: Exception | None) -> None:
    """List the pages in the order of the table of contents."""
    if failure is not None or app.builder.format != "html":
        return
    environment = app.env
    pages, todo = [], [environment.config.root_doc]
    while todo:
        page = todo.pop(0)
        if page not in pages:
            pages.append(page)
            todo = [*environment.toctree_includes.get(page, []), *todo]
    lines = [f"# {app.config.project}", ""]
    for page in pages:
        title = environment.titles[page].astext()
        summary = _summary(environment.get_doctree(page))
        lines.append(f"- [{title}]({app.builder.get_target_uri(page)}): {summary}")
    Path(app.outdir, "llms.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the event."""
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

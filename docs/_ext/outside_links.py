"""Links of Markdown pages that lead out of docs, which work on GitHub, work in the site too.

One to a file that a page of the site includes (`included_files`) leads to that page. One to any other file of the
repository leads to it at `repository_url`; where no URL is set, it becomes the path, as code.
"""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class OutsideLinks(SphinxTransform):
    """Takes place before Sphinx copies what is linked to, and before MyST looks for pages."""

    default_priority = 5

    def apply(self, **kwargs: object) -> None:
        docs = Path(self.env.srcdir).resolve()
        root = docs.parent
        pages = self.config.included_files
        # Links in an included file are relative to where it is.
        is_included = self.env.docname in pages.values()
        base = root if is_included else docs.joinpath(self.env.docname).parent
        links = [*self.document.findall(addnodes.pending_xref), *self.document.findall(addnodes.download_reference)]
        for link in links:
            if link.get("reftype") != "myst" or link["reftarget"] in self.env.found_docs:
                continue
            if link["refdomain"] == "doc":  # Markdown, but no page: its path without the suffix
                path, fragment = Path(f"{link['reftarget']}.md"), link["reftargetid"] or ""
            else:
                name, _, fragment = link["reftarget"].partition("#")
                path = (base / name).resolve()
            if path == base or not path.exists() or not path.is_relative_to(root):
                continue  # MyST warns
            outside = path.relative_to(root).as_posix()
            inside = self.env.path2doc(str(path)) if path.is_relative_to(docs) and path.suffix == ".md" else None
            page = pages.get(outside) or inside
            if page is not None:
                link.replace_self(_to_page(link, page, fragment))
            elif not path.is_relative_to(docs):
                link.replace_self(self._to_repository(link, outside, is_folder=path.is_dir()))

    def _to_repository(self, link: nodes.Element, path: str, *, is_folder: bool) -> list[nodes.Node]:
        if self.config.repository_url:
            url = f"{self.config.repository_url}/{'tree' if is_folder else 'blob'}/main/{path}"
            return [nodes.reference("", "", *_children(link), refuri=url)]
        text = link.astext()
        if path.endswith(text) or any(link.findall(nodes.literal)):
            return [nodes.literal(text, text)]
        return [*_children(link), nodes.Text(" ("), nodes.literal(path, path), nodes.Text(")")]


def _to_page(link: nodes.Element, page: str, fragment: str) -> addnodes.pending_xref:
    """As MyST writes a link to a page."""
    attributes = {**link.attributes, "refdomain": "doc", "reftarget": page, "reftargetid": fragment or None}
    inner = nodes.inline("", "", *_children(link), classes=["xref", "myst"])
    return addnodes.pending_xref("", inner, **attributes)


def _children(link: nodes.Element) -> list[nodes.Node]:
    """What is shown, without the element that MyST puts around it."""
    [inner] = link.children if len(link.children) == 1 else [link]
    return [child.deepcopy() for child in (inner.children if isinstance(inner, nodes.inline) else link.children)]


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_config_value("repository_url", None, "env", types=(str, type(None)))
    app.add_config_value("included_files", {}, "env", types=(dict,))
    app.add_transform(OutsideLinks)
    return {"parallel_read_safe": True}

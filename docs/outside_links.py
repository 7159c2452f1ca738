"""A hook of MkDocs: links from a page to files beside docs/ lead to the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)([)#])")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace relative links that leave the folder of documents by links into the repository.

    Raises:
        PluginError: If there is no such file.
    """
    docs = Path(config["docs_dir"])
    root, folder = docs.parent, (docs / page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        path = (folder / link[2]).resolve()
        if path.is_relative_to(docs):
            return link[0]
        if not (path.is_relative_to(root) and path.exists()):
            raise PluginError(f"{page.file.src_uri}: {link[2]} leads to no file of the repository")
        kind = "tree" if path.is_dir() else "blob"
        return f"{link[1]}{config['repo_url']}/{kind}/main/{path.relative_to(root).as_posix()}{link[3]}"

    return _LINK.sub(replaced, markdown)

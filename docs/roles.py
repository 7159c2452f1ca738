"""An extension of griffe: Sphinx's roles in docstrings become plain code, which Markdown knows how to show."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Replaces a role by the name in it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite an object's docstring, before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)

"""For mkdocstrings: the docstrings' `Example:` is the section that it knows as `Examples:`."""

import re

import griffe


class Examples(griffe.Extension):
    """Renames the section, so that doctests are shown as code and not read as markdown."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Rename the section of one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)

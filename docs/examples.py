"""For mkdocstrings: docstrings in the form that it knows, with `Examples:` and one argument an entry."""

import re

import griffe


class Examples(griffe.Extension):
    """Renames the section `Example:`, so that doctests are code, and parts arguments that share a description."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)$", _parted, text, flags=re.M)


def _parted(found: re.Match) -> str:
    indent, names, text = found.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))

"""Docstrings for the site, read by mkdocstrings (``mkdocs.yml``): they are written to be read in the source.

Roles such as ``:func:`dwattn.score``` become links, or code where the site has no such page, and parameters that share
an entry (``device, dtype: ...``) get one each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?\.?([\w.]+)`")
SHARED = re.compile(r"( +)(\w+(?:, \w+)+): ")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda found: _link(obj, found[1]), obj.docstring.value)
            obj.docstring.value = "\n".join(_entries(text.split("\n")))


def _link(obj: griffe.Object, name: str) -> str:
    try:
        target = obj.resolve(name)
    except (griffe.NameResolutionError, griffe.AliasResolutionError):
        target = name
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'


def _entries(lines: list[str]) -> list[str]:
    """The lines, with entries of several parameters repeated for each of them."""
    done: list[str] = []
    while lines:
        line, *lines = lines
        found = SHARED.match(line)
        if found is None:
            done.append(line)
            continue
        deeper = found[1] + "    "
        count = next((i for i, x in enumerate(lines) if not x.startswith(deeper)), len(lines))
        for name in found[2].split(", "):
            done += [f"{found[1]}{name}: {line[found.end() :]}", *lines[:count]]
        lines = lines[count:]
    return done

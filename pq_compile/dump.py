"""Numbered text files of one compilation, and the one way files are written here: whole or not."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from .errors import Refused
from .plan import Groups

UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Dump:
    """A folder for ``00_capture.txt``, ``01_groups.txt`` and so on; without one, nothing happens.

    The same compilation writes the same bytes in every process, and each file appears whole, so
    that processes may share a folder.
    """

    folder: Path | None
    prefix: str = ""

    def write(self, name: str, text: str) -> None:
        """Write ``text`` as ``name``, a stage such as "01_groups" or a file with its suffix.

        Raises ``Refused`` where the folder cannot be written.
        """
        self._write(f"{self.prefix}{_safe(name)}", text, suffix=".txt")

    def kernel(self, name: str, source: str) -> None:
        """Write a kernel's source as ``kernels/name.py``; graphs share kernels, so no prefix."""
        self._write(f"kernels/{_safe(name)}.py", source, suffix=".py")

    def _write(self, name: str, text: str, suffix: str) -> None:
        if self.folder is None:
            return
        path = self.folder / name
        write_whole(path if path.suffix else path.with_name(path.name + suffix), text)


def write_whole(path: Path, text: str) -> None:
    """Replace ``path`` by UTF-8 ``text`` in one step, making its folder if there is none.

    A reader, another writer or an interrupt meets the old file or the new one, never a part.
    Raises ``Refused`` where the path is a folder or cannot be written.
    """
    if path.is_dir():
        raise Refused(f"permuquant: cannot write {path}: it is a folder; name a file inside it")
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as failure:
        raise Refused(
            f"permuquant: cannot write {path}: {failure.strerror or failure}; "
            "name a place that can be written"
        ) from failure


def constraints(groups: Groups) -> str:
    """The groups as a Graphviz graph: an ellipse per group (dashed: pinned), a box per axis."""
    lines = ["graph constraints {", "    rankdir=LR; node [fontname=monospace];"]
    for index, group in enumerate(groups.groups):
        verdict = "free" if group.free else f"pinned by {'; '.join(group.pinned_by)}"
        style = "solid" if group.free else "dashed"
        label = _quoted(f"{group.structure}\n{verdict}")
        lines.append(f"    g{index} [shape=ellipse, style={style}, label={label}];")
        for axis in group.axes:
            lines.append(f"    {_quoted(str(axis))} [shape=box];")
            lines.append(f"    g{index} -- {_quoted(str(axis))};")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _safe(name: str) -> str:
    """``name`` as a plain file name: a kernel or stage never names a place outside the folder."""
    return UNSAFE.sub("_", name).lstrip(".") or "_"

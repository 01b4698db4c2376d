"""What all reports share: figures without a display, Markdown as HTML, and one page with all in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scamo.motion.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}img{max-width:100%}
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:2px 8px;text-align:right}"""


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def colours(keys: Iterable[Any]) -> dict[Any, Any]:
    """A colour for every different key, from dark to light in their order."""
    from matplotlib import colormaps

    keys = sorted(set(keys))
    return dict(zip(keys, colormaps["viridis"](np.linspace(0, 0.9, max(len(keys), 1))), strict=True))


def as_html(markdown: str) -> str:
    """Headings, paragraphs, tables and lists of one level, as our reports write them."""
    blocks = []
    for kind, lines in groupby(markdown.splitlines(), key=lambda line: line[:1] if line[:2] != "- " else "-"):
        if kind == "|":
            rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
            head = "".join(f"<th>{cell}</th>" for cell in rows[0])
            body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows[2:])
            blocks.append(f"<table><tr>{head}</tr>{body}</table>")
        elif kind == "-":
            blocks.append("<ul>" + "".join(f"<li>{html.escape(line[2:])}</li>" for line in lines) + "</ul>")
        elif kind == "#":
            for line in lines:
                level, _, text = line.partition(" ")
                blocks.append(f"<h{len(level)}>{html.escape(text)}</h{len(level)}>")
        else:
            blocks += [f"<p>{html.escape(line)}</p>" for line in lines if line]
    return "\n".join(blocks)


def write_pictures(folder: Path, pictures: Mapping[str, tuple[str, Figure]]) -> tuple[list[Path], str]:
    """Write FOLDER/NAME.png of each name: (title, figure). Returns the files, and HTML that holds them."""
    written, parts = [], []
    for name, (title, drawn) in pictures.items():
        path = folder / f"{name}.png"
        with replacing(path) as partial:
            drawn.savefig(partial, dpi=110, format="png")
        written.append(path)
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(title)}</h2>\n"
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    return written, "\n".join(parts)


def write_page(path: Path, title: str, body: str) -> Path:
    """Write an HTML page that needs nothing from elsewhere."""
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body></html>
"""
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path

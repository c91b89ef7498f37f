"""How do counts, values and pictures look on a page without a script? As plain HTML, SVG and small PNGs inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS = ("#2563a8", "#c2571a", "#3b7d3f", "#8a4f9e", "#a3862a", "#5a6672", "#b03a5b", "#1f7f86")
"""Told apart also by people who do not see red and green alike, and on both backgrounds."""
TILE = 112
_BINS = 64


def text(value: object) -> str:
    """Anything, safe inside HTML; bytes of file names that are no text come out as question marks."""
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A table that scrolls by itself on a narrow screen; `numbers` are the columns set to the right."""

    def cells(kind: str, row: Sequence[object]) -> str:
        return "".join(
            f"<{kind}{' class=number' if at in numbers else ''}>{text(cell)}</{kind}>" for at, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(counts: Mapping[str, int], total: int | None = None) -> str:
    """One bar for each name with its count; shares are of `total`, or of the sum."""
    whole = total if total is not None else sum(counts.values())
    most = max(counts.values(), default=0)
    lines = []
    for at, (name, count) in enumerate(counts.items()):
        width = 100 * count / most if most else 0
        share = f"{100 * count / whole:.1f} %" if whole else ""
        lines.append(
            f'<div class="bar"><span class="name">{text(name or "not named")}</span><span class="track"><span '
            f'class="fill" style="width:{width:.1f}%;background:{COLOURS[at % len(COLOURS)]}"></span></span>'
            f'<span class="count">{count:,} <small>{share}</small></span></div>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def keys(names: Sequence[str]) -> str:
    """What each colour stands for, in the order of names."""
    return "".join(
        f'<span class="key"><i style="background:{COLOURS[at % len(COLOURS)]}"></i>{text(name or "not named")}</span>'
        for at, name in enumerate(names)
    )


def histogram(groups: Mapping[str, NDArray[np.float32]]) -> str:
    """Curves of how often each value occurs, one for each group of values, on a square-root scale."""
    every = [values for values in groups.values() if values.size]
    if not every:
        return ""
    low, high = min(float(v.min()) for v in every), max(float(v.max()) for v in every)
    high = high if high > low else low + 1.0
    shares = {
        name: np.sqrt(np.histogram(values, _BINS, (low, high))[0] / values.size)
        for name, values in groups.items()
        if values.size
    }
    top = max(float(line.max()) for line in shares.values()) or 1.0
    curves = []
    for at, line in enumerate(shares.values()):
        colour = COLOURS[at % len(COLOURS)]
        points = " ".join(
            f"{10 + 620 * bin_ / (_BINS - 1):.1f},{150 - 135 * y / top:.1f}" for bin_, y in enumerate(line)
        )
        curves.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return (
        '<figure><svg viewBox="0 0 640 175" role="img" aria-label="Histogram of image values">'
        '<line x1="10" y1="150" x2="630" y2="150" class="axis"/>'
        f"{''.join(curves)}"
        f'<text x="10" y="168">{low:.3g}</text><text x="630" y="168" text-anchor="end">{high:.3g}</text></svg>'
        f'<figcaption class="legend">{keys(list(shares))}</figcaption></figure>'
    )


def tile(image: NDArray[np.float32], mask: NDArray[np.uint8] | None, caption: str) -> str:
    """A thumbnail of float32 [channels, *size] with its mask laid over; of a volume, the middle slice (with a mask:
    the slice that it marks most)."""
    from PIL import Image as Pillow

    picture = Pillow.fromarray(_pixels(image, mask))
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    out = io.BytesIO()
    picture.resize(size, Pillow.Resampling.BILINEAR).save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    words = text(caption)
    return (
        f'<figure class="tile"><img src="data:image/png;base64,{data}" width="{size[0]}" height="{size[1]}" '
        f'alt="{words}" title="{words}"><figcaption>{words}</figcaption></figure>'
    )


def _pixels(image: NDArray[np.float32], mask: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    image = np.asarray(image)
    if image.ndim == 4:
        marked = None if mask is None else (mask > 0).sum(axis=(1, 2))
        at = image.shape[1] // 2 if marked is None or not marked.any() else int(marked.argmax())
        image, mask = image[:, at], None if mask is None else mask[at]
    planes = image if len(image) == 3 else np.repeat(image[:1], 3, axis=0)
    low, high = np.percentile(planes, (0.5, 99.5))
    shown: NDArray[Any] = np.clip((planes - low) / (high - low if high > low else 1.0), 0.0, 1.0)
    pixels = np.moveaxis(shown, 0, -1)
    for value in np.unique(mask) if mask is not None else ():
        if value:
            colour = COLOURS[(int(value) - 1) % len(COLOURS)]
            rgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
            pixels[mask == value] = 0.5 * pixels[mask == value] + 0.5 * rgb
    return np.asarray(pixels * 255, dtype=np.uint8)

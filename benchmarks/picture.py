"""Draws the README's picture, bytes of optimizer state per parameter, from the rows of `bench_masked_adamw.py`.

python benchmarks/picture.py    # writes docs/state.svg
"""

from __future__ import annotations

from pathlib import Path

from report import Rows, pick, read, share

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "state.svg"

BARS = {  # provider in the rows: label, colour
    "torch AdamW(fused=True)": ("AdamW, all weights", "#8c959f"),
    "MaskedAdamW": ("MaskedAdamW, 20 % of the weights", "#2f81f7"),
    "MaskedAdamW, 8-bit states": ("the same with 8-bit states", "#54aeff"),
}
STYLE = """text { font: 14px system-ui, sans-serif; fill: #1f2328 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }"""


def draw(rows: Rows) -> str:
    """The SVG: a bar for each provider, for XLM-R-base (277,414,656 float32 entries) at a density of 20 %."""
    rows = pick(rows, op="masked_adamw_", metric="state", dtype="float32", n=277_414_656)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 128" width="720" height="128" role="img">',
        "<title>Bytes of optimizer state per parameter</title>",
        f"<style>{STYLE}</style>",
        '<text x="0" y="16">Optimizer state of XLM-R-base, bytes per parameter</text>',
    ]
    for place, (provider, (label, colour)) in enumerate(BARS.items()):
        found = next(row for row in pick(rows, provider=provider) if share(row) == "20 %")
        held, y = float(found["p50"]), 32 + 32 * place
        width = round(50 * held)
        lines += [
            f'<text x="0" y="{y + 17}">{label}</text>',
            f'<rect x="240" y="{y}" width="{width}" height="24" rx="3" fill="{colour}"/>',
            f'<text x="{248 + width}" y="{y + 17}" font-weight="600">{held:.2f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(read(ROOT / "benchmarks" / "results" / "cpu")))
    print(PICTURE)

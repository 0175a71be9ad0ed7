"""Figures of the documentation, drawn as SVG: `python tools/draw_figures.py` writes them."""

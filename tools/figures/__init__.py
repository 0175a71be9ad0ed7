"""The documentation's drawings, as SVG written by hand: `python tools/draw_figures.py`."""

"""Reports on a request: a table and a heat map for the terminal, a page for the browser.

Belongs here: what people are shown of answers: heatmaps, tables, pages.
Not here: measuring, and whatever knows how an answer was made; a report is given its numbers.
"""

from ifkv.report.data import AnswerRow, Report
from ifkv.report.heatmap import Heatmap
from ifkv.report.html import render_html, write_html
from ifkv.report.pieces import token_pieces
from ifkv.report.table import comparison_table

__all__ = [
    "AnswerRow",
    "Heatmap",
    "Report",
    "comparison_table",
    "render_html",
    "token_pieces",
    "write_html",
]

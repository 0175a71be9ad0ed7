"""Heat map of attention norms over the text, in the terminal."""

from __future__ import annotations

import dataclasses

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.style import Style
from rich.text import Text

from ifkv.report.data import Report
from ifkv.report.shading import STEPS, DocumentShare, document_shares, richest, runs, visible

# Every shade sets both colours, so that it reads on dark and light terminals.
_SHADES = (
    Style(),
    Style(color="#fff1dc", bgcolor="#4a3000"),
    Style(color="#fff6e8", bgcolor="#744a00"),
    Style(color="#000000", bgcolor="#b87a00"),
    Style(color="#000000", bgcolor="#f0a30a"),
    Style(color="#000000", bgcolor="#ffd45e", bold=True),
)


@dataclasses.dataclass(frozen=True)
class Heatmap:
    """Heat map for a rich console: a panel per document, shaded by score.

    Recomputed tokens are underlined. If the console has no styles, as when writing to a file, a
    line of marks below the text replaces them.

    Attributes:
        report: The report that is shown.
        documents: Number of documents shown, those with the most attention; all if None.
        lines: Number of lines shown of each, those with the most attention; all if None.
        question: True to show the question above.
        legend: True to show a legend below.
    """

    report: Report
    documents: int | None = None
    lines: int | None = None
    question: bool = True
    legend: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the panels for a console of this width."""
        shares, measure = document_shares(self.report), self.report.measure
        shown = richest(shares, len(shares) if self.documents is None else self.documents)
        # A console without colours writes no underlines either.
        mark = None if console.color_system else "‾"
        if self.question:
            yield Text(visible(self.report.question), style="bold")
        # A panel's border and padding take four columns.
        width = max(8, options.max_width - 4)
        for index in shown:
            share = shares[index]
            yield Panel(
                Group(*self._lines(console, share, width, mark)),
                title=Text(f"{share.number} · {share.title}"),
                title_align="left",
                subtitle=Text(_summary(share, measure)),
                subtitle_align="right",
            )
        if len(shown) < len(shares):
            rest = sum(share.mass for index, share in enumerate(shares) if index not in shown)
            count = len(shares) - len(shown)
            noun = "document" if count == 1 else "documents"
            yield Text(f"{count} more {noun} with {rest:.0%} of the {measure}", style="dim")
        if self.legend:
            yield _legend(mark, measure)

    def _lines(
        self, console: Console, share: DocumentShare, width: int, mark: str | None
    ) -> list[Text]:
        """Return the wrapped text, cut to the lines with the most attention if asked."""
        text = Text()
        for run in runs(self.report, share.slots):
            density = Style(meta={"density": run.weight / len(run.text)})
            style = _SHADES[run.level] + Style(underline=run.recomputed) + density
            text.append(visible(run.text), style)
        text.rstrip()
        lines = [line for line in text.wrap(console, width) if line.plain.strip()]
        kept = list(range(len(lines)))
        if self.lines is not None:
            kept.sort(key=lambda index: (-_weight(lines[index]), index))
            kept = sorted(kept[: max(1, self.lines)])
        cut: list[Text] = []
        for before, index in zip([-1, *kept], [*kept, len(lines)], strict=True):
            if index > before + 1:
                cut.append(Text("⋯", style="dim"))
            if index < len(lines):
                cut.append(lines[index])
                if mark and (below := _marks(lines[index], mark)):
                    cut.append(below)
        return cut


def _marks(line: Text, sign: str) -> Text:
    """Return a line of signs below the recomputed characters of ``line``, for plain consoles."""
    marked = [False] * len(line.plain)
    for span in line.spans:
        if isinstance(span.style, Style) and span.style.underline:
            marked[span.start : span.end] = [True] * (span.end - span.start)
    cells = (
        (sign if mark else " ") * cell_len(char)
        for char, mark in zip(line.plain, marked, strict=True)
    )
    return Text("".join(cells).rstrip())


def _weight(line: Text) -> float:
    """Return the attention of a wrapped line of runs."""
    return sum(
        (span.end - span.start) * float(span.style.meta.get("density", 0.0))
        for span in line.spans
        if isinstance(span.style, Style)
    )


def _summary(share: DocumentShare, measure: str) -> str:
    blocks = "█" * round(share.mass * 20)
    return (
        f"{blocks} {share.mass:.1%} of the {measure} · "
        f"{share.recomputed} of {share.tokens} tokens recomputed"
    ).strip()


def _legend(mark: str | None, measure: str) -> Text:
    if mark:
        return Text(f"{mark * 3} below a token: recomputed")
    legend = Text(f"{measure} per token, × the mean: ", style="dim")
    for style, step in zip(_SHADES[1:], STEPS, strict=True):
        legend.append(f" ≥ {step:g} ", style)
    legend.append("   ")
    legend.append("recomputed", Style(underline=True))
    return legend

"""A reader of HTML pages for the tests, which refuses tags that do not nest."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks that tags nest, and collects the documents' texts, ids and references."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.recomputed = ""
        self.tags: set[str] = set()
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"] or "")
        self.references += [value or "" for name, value in attrs if name in ("href", "src")]
        if found.get("class") == "text":
            self.texts.append("")
        if tag not in self.VOID:
            self.open.append("text" if found.get("class") == "text" else tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() in (tag, "text"), tag

    def handle_data(self, data: str) -> None:
        if "text" in self.open:
            self.texts[-1] += data
            if "u" in self.open:
                self.recomputed += data

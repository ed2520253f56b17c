"""What commands print: tables and times."""

UNBOUNDED = 10_000  # columns; without it rich measures within 80


def duration(seconds: float | None) -> str:
    """A time to read at a glance.

    >>> duration(8.4), duration(200), duration(7500), duration(None)
    ('8 s', '3 min', '2 h 05 min', 'unknown')
    """
    if seconds is None:
        return "unknown"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table to standard output, as wide as it needs where nobody looks on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a file has no width to fit into
        console.width = UNBOUNDED
        console.width = console.measure(table).maximum
    console.print(table)


def visible(text: str) -> str:
    r"""Text that a terminal or a page can show: control characters are spelt out.

    >>> visible("a\x1b[31mb\n")
    'a\\x1b[31mb\\n'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )

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


def printable(text: str) -> str:
    """Text whose control characters are written out, as names of files may hold any.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)

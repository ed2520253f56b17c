"""``opd-geometry report``: tables of ``measure`` and ``trajectory`` to one page."""

from pathlib import Path

import click


@click.command()
@click.argument("tables", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The page, such as report.html.",
)
@click.option("--title", help="What the page calls the model; default: TABLE's name.")
@click.option("--force", is_flag=True, help="Replace a page that is there.")
def report(tables: tuple[Path, ...], out: Path, title: str | None, force: bool) -> None:
    """Draw measured checkpoints as one page that needs nothing beside it.

    TABLES are what measure and trajectory wrote, one of each at most: .csv, .parquet
    or .json. The paper's numbers and this book's models stand beside yours.

    \b
    Examples:
      opd-geometry report pair.csv --out report.html
      opd-geometry report pair.parquet steps.csv --out report.html --title "My 8B, OPD"
    """
    from opd_geometry.report import write_report

    page = write_report(tables, out, title, force)
    click.echo(f"Open {page}")

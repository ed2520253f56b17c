"""The book: execute chapters, put the pages together, build them, check them.

papermill executes a notebook into a chapter, Jupyter Book renders chapters that
are already executed, and :func:`check_site` finds what Jupyter Book lets pass.
A reader's own run is staged under ``_build/``: nothing here writes to ``book/``
unless it is told to by the path of an output.
"""

import ast
import base64
import html
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import yaml
from bs4 import BeautifulSoup, Tag
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from PIL import Image

from opd_geometry import sources
from opd_geometry.analysis.claims import read_claims
from opd_geometry.book import board
from opd_geometry.files import replacing

JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"

# A path that exists on one machine only. In a text the first folder gives it away.
MACHINE_PATH = re.compile(
    r"(?<![\w.~*/-])/(?:home|root|Users|tmp|mnt|opt|private|var|work|workspace"
    r"|builds|usr/(?:local|lib))/[\w.-]+|\b[A-Z]:\\+Users\b"
)
LONGEST_TABLE = 9  # rows that are shown unfolded, the head among them
LONGEST_CODE = 8  # lines, likewise, of code that asserts nothing
LIMITS = "<details"  # begins the folded tail of a caption, which stands below it
FOLDED = {"hide-input", "remove-input", "remove-cell", "hide-output", "hide-cell"}
HERO = ("fig-printed", "fig-ladder")  # of the first page: the first that is there
SUPERFLUOUS = ("**/*.map", "_static/locales/*", "**/*.ttf", "_static/**/*.scss")
STUMBLES = {
    # A picture's title would be a text that the button's name lacks.
    ' data-mode="light" title="Light"': ' data-mode="light"',
    ' data-mode="dark"  title="Dark"': ' data-mode="dark"',
    ' data-mode="auto"  title="System Settings"': ' data-mode="auto"',
    ' role="doc-biblioentry"': ' role="listitem"',
    ' aria-label="Toggle hidden content"': "",
    'search-button-field search-button__button pst-js-only" title="Search" '
    'aria-label="Search"': 'search-button-field search-button__button pst-js-only"',
    'class="bd-sidebar-primary bd-sidebar"': 'class="bd-sidebar-primary bd-sidebar" '
    'role="region" aria-label="Sidebar"',
    "<th></th>": '<th><span class="visually-hidden">row</span></th>',
    "<td></td>": "<td>–</td>",
}
WEB_ADDRESS = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
CSS_ADDRESS = re.compile(r"(?:url\(|@import)\s*['\"]?\s*((?:https?:)?//[^'\")\s;]+)")
LOADS_NOTHING = {"canonical", "index", "next", "prev", "search"}  # <link rel="...">
SCRIPT_ADDRESS = re.compile(
    r"(?:import|fetch|\.src\s*=|\.open|importScripts|EventSource|WebSocket)"
    r"[^\n;]{0,40}?['\"`]((?:https?:|wss?:)?//[^'\"`\s]+)"
)

# What a reader sees when markup was not understood.
UNRENDERED = {
    "glue": re.compile(r"\{glue:?[a-z]*\}\S*"),
    "role or directive": re.compile(r"\{(?!glue)[a-zA-Z][\w:.-]*\}`[^`]*`?|:::|```"),
    "maths": re.compile(r"\$\$|(?<![\w\\$])\$(?:\S|\S[^$\n]*\S)\$|\\[a-zA-Z]{2,}"),
    "link": re.compile(r"\]\([^)\s]+\)"),
}


# --- chapters ------------------------------------------------------------------


def execute_chapter(
    notebook: Path, output: Path, parameters: Mapping[str, Any], cwd: Path
) -> None:
    """Execute a notebook with papermill and write it, cleaned, as a chapter.

    Its metadata says which notebook and library it was executed from, see ``sources``.
    The output appears whole or not at all: a failed execution leaves the file
    that was there before.

    Args:
        notebook: source with one cell tagged ``parameters``.
        output: where the executed chapter goes; its folder is made.
        parameters: values for the parameters cell, as Python objects.
        cwd: working directory of the kernel, usually the root of the repository.

    Raises:
        ValueError: the notebook is missing or no notebook, has no parameters cell,
            or a cell is no Python, failed or was not reached.
    """
    # Heavy, and needed by nobody who only builds or checks.
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellControlSignal, DeadKernelError
    from papermill.exceptions import PapermillException, PapermillExecutionError

    if not any("parameters" in _tags(c) for c in read_notebook(notebook).cells):
        raise ValueError(
            f"{notebook.name} has no cell tagged 'parameters': tag the cell with "
            "the defaults"
        )
    stamp = sources.stamp(notebook)  # what the kernel is about to read
    try:
        executed = papermill.execute_notebook(
            str(notebook),
            None,
            parameters=dict(parameters),
            cwd=str(cwd),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            coalesce_streams=True,
        )
    except PapermillExecutionError as error:
        raise ValueError(
            f"{notebook.name} failed in cell [{error.exec_count}]: {error.ename}: "
            f"{_first_line(error.evalue)}"
        ) from error
    except (PapermillException, CellControlSignal, DeadKernelError, NoSuchKernel) as e:
        raise ValueError(
            f"{notebook.name} could not be executed: {_first_line(e)}"
        ) from e
    _reject_unfinished(executed, notebook.name)
    executed.metadata[sources.STAMP] = stamp
    text = relative_paths(nbformat.writes(clean_chapter(executed)), cwd)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as draft:
        draft.write_text(f"{text}\n", encoding="utf8")


def known_parameters(notebook: Path, given: Mapping[str, object]) -> dict[str, object]:
    """The given parameters that a notebook has.

    Args:
        notebook: with one cell tagged ``parameters``.
        given: name to value.

    Raises:
        ValueError: as ``read_notebook``.
    """
    cells = [c for c in read_notebook(notebook).cells if "parameters" in _tags(c)]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return {name: value for name, value in given.items() if name in own}


def clean_chapter(notebook: NotebookNode) -> NotebookNode:
    """Drop what differs between two executions with the same results.

    Removes timings, execution states, file paths, widget states and the patch
    release of Python; gives the injected parameters a fixed id and folds them.

    Args:
        notebook: as executed; changed in place.

    Returns:
        The same notebook.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    parameters = notebook.metadata.get("papermill", {}).get("parameters", {})
    notebook.metadata["papermill"] = {"parameters": parameters}
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in _tags(cell):
            # Shown unfolded it would look like a second parameters cell.
            cell.metadata["tags"] = ["injected-parameters", "hide-input"]
            cell["id"] = "injected-parameters"
    return notebook


def relative_paths(text: str, cwd: Path) -> str:
    """Write paths below a folder as relative to it, and those below home with ~.

    >>> relative_paths("saved /data/book/a.csv in /data/book", Path("/data/book"))
    'saved a.csv in .'
    """
    for folder, inside, itself in ((cwd.resolve(), "", "."), (Path.home(), "~/", "~")):
        if len(folder.parts) > 1:  # in a bare container home may be the root
            path = rf"(?<![\w.~/-]){re.escape(str(folder))}"
            text = re.sub(rf"{path}/", inside, text)
            text = re.sub(rf"{path}(?![\w.-])", itself, text)
    return text


def _reject_unfinished(executed: NotebookNode, name: str) -> None:
    # sys.exit() in a cell ends the kernel and looks like success to papermill.
    code = [c for c in executed.cells if c.cell_type == "code" and c.source.strip()]
    for number, cell in enumerate(code, start=1):
        if cell.execution_count is None:
            raise ValueError(
                f"{name} stopped before code cell {number}: remove the call that "
                "ends the kernel"
            )


def read_notebook(path: Path) -> NotebookNode:
    """A notebook from a file.

    Raises:
        ValueError: no such file, or it is no valid notebook.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        return notebook
    except FileNotFoundError:
        raise ValueError(f"no notebook at {path}: give one of notebooks/") from None
    except Exception as error:  # nbformat raises many kinds for a damaged file
        raise ValueError(f"{path} is no notebook: {_first_line(error)}") from error


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags") or [])


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# --- staging and building ------------------------------------------------------


def stage_site(
    root: Path, target: Path, chapters: Sequence[Path], announcement: str
) -> Path:
    """Put together the sources of a book that shows the given chapters.

    Args:
        root: repository with ``_config.yml``, ``_toc.yml`` and ``book/``.
        target: folder for the copy, emptied first, such as ``_build/book/source``.
        chapters: executed notebooks; they take the place of ``book/chapters/``.
        announcement: plain text of the banner on every page: the profile, seeds
            and machine that the numbers come from.

    Returns:
        The target.

    Raises:
        ValueError: no announcement, a chapter that is missing, or a target that is
            not a folder for staging.
    """
    if not announcement.strip():
        raise ValueError("no announcement: say which run the numbers come from")
    for chapter in chapters:
        if not chapter.is_file():
            raise ValueError(f"no chapter at {chapter}: execute the notebooks first")
    if target.exists() and (
        root.resolve().is_relative_to(target.resolve())
        or not (target / "_toc.yml").is_file()
    ):
        raise ValueError(f"{target} holds no staged book: give a folder of its own")
    # Copied before the old copy goes: the chapters may lie inside it.
    fresh = target.with_name(f"{target.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(
        root / "book", fresh / "book", ignore=shutil.ignore_patterns("chapters", ".*")
    )
    (fresh / "book" / "chapters").mkdir()
    for chapter in chapters:
        stage_chapter(chapter, fresh / "book" / "chapters" / chapter.name)
    shutil.copy(root / "_toc.yml", fresh)
    (fresh / "data").mkdir()
    for path in root.glob("data/confinement.csv"):  # a page shows what differs in it
        table = pd.read_csv(path, dtype=str)
        same = [column for column in table if table[column].nunique() < 2]
        table.drop(columns=same).to_csv(fresh / "data" / path.name, index=False)
    with _edited(root / "_config.yml", fresh / "_config.yml") as config:
        said = html.escape(announcement.strip())
        config.setdefault("html", {})["announcement"] = said
    _replace_folder(fresh, target)
    return target


def add_claims(source: Path, claims_csv: Path) -> None:
    """Put the table of claims into a staged book: boards, marks at chapters, the csv.

    Args:
        source: of ``stage_site``.
        claims_csv: of ``claims.write_claims``; from the same runs as the chapters.
    """
    (source / "data").mkdir(exist_ok=True)
    shutil.copy(claims_csv, source / "data" / "claims.csv")
    findings = read_claims(claims_csv)
    for name, brief in (("board", False), ("board-brief", True)):
        text = board.board(findings, brief)
        (source / "book" / f"{name}.html").write_text(text, encoding="utf8")
    tally = board.tally(findings)
    with _edited(source / "_toc.yml") as toc:
        for entry in (entry for part in toc["parts"] for entry in part["chapters"]):
            chapter = Path(entry["file"]).name
            if chapter in tally:
                page = read_notebook(source / f"{entry['file']}.ipynb")
                entry["title"] = f"{title_of(page)} {tally[chapter]}"


def add_hero(source: Path, names: Sequence[str] = HERO) -> None:
    """Give the first page the figure that tells the story, with its words.

    Args:
        source: of ``stage_site``; receives ``hero.png`` and ``hero.inc``.
        names: of figures, in the metadata of their cells; the first one that is there.

    Raises:
        ValueError: no chapter has such a figure.
    """
    found = {
        cell.metadata["mystnb"]["figure"]["name"]: cell
        for chapter in (source / "book" / "chapters").glob("*.ipynb")
        for cell in read_notebook(chapter).cells
        if "figure" in cell.metadata.get("mystnb", {})
    }
    there = [found[name] for name in names if name in found]
    if not there:
        raise ValueError(f"no figure {' or '.join(names)}: name a chapter's figure so")
    shown = there[0].metadata["mystnb"]
    (picture,) = [o.data["image/png"] for o in there[0].outputs if "data" in o]
    (source / "book" / "hero.png").write_bytes(base64.b64decode(picture))
    alt, caption = shown["image"]["alt"], shown["figure"]["caption"]
    text = f"```{{figure}} hero.png\n:alt: {alt}\n\n{caption.strip()}\n```\n"
    (source / "book" / "hero.inc").write_text(text, encoding="utf8")


def add_page(source: Path, name: str, text: str) -> None:
    """Put a page that was made from runs first among those of what came out.

    Args:
        source: of ``stage_site``.
        name: of the page, without its suffix.
        text: Markdown.
    """
    (source / "book" / f"{name}.md").write_text(text, encoding="utf8")
    with _edited(source / "_toc.yml") as toc:
        toc["parts"][0]["chapters"].insert(0, {"file": f"book/{name}"})


def title_of(notebook: NotebookNode) -> str:
    """The first heading of a notebook."""
    text = "\n".join(cell.source for cell in notebook.cells)
    return text.partition("# ")[2].partition("\n")[0]


def stage_chapter(chapter: Path, staged: Path) -> None:
    """Write an executed chapter as its page is to show it, see ``as_page``."""
    nbformat.write(as_page(read_notebook(chapter)), staged)


def as_page(notebook: NotebookNode) -> NotebookNode:
    """A chapter as a page has it: captions at their figures, what came out first.

    In a notebook the caption is the output of the cell below the figure, since it holds
    numbers and metadata cannot; there that cell is tagged ``caption``. What sums the
    chapter up is computed last, and tagged ``lead``.

    Args:
        notebook: as executed; changed in place.

    Raises:
        ValueError: a caption without a figure above it, or not executed.
    """
    kept: list[NotebookNode] = []
    for cell in notebook.cells:
        if "caption" not in _tags(cell):
            kept.append(cell)
            continue
        options = kept[-1].metadata.get("mystnb", {}) if kept else {}
        texts = [o.data["text/markdown"] for o in cell.outputs if "data" in o]
        if "figure" not in options or not texts:
            raise ValueError(f"no figure for the caption, or none executed: {cell.id}")
        told, _, limits = texts[0].partition(LIMITS)
        options["figure"]["caption"] = told.rstrip()
        if limits:
            kept.append(new_markdown_cell(f"{LIMITS}{limits}", id=cell.id))
    first = [cell for cell in kept if "lead" in _tags(cell)]
    rest = [cell for cell in kept if "lead" not in _tags(cell)]
    first.sort(key=_draws)  # the sentence, then its table
    for cell in first:  # a page begins with what came out, not with a bar of code
        if cell.cell_type == "code":
            cell.metadata["tags"] = ["lead", "remove-input"]
    for cell in rest:
        if "parameters" in _tags(cell):  # after what came out, and folded
            cell.metadata["tags"] = ["parameters", "hide-input"]
        elif cell.cell_type == "code" and (
            "chapters.check_" in cell.source or not _shows(cell)
        ):
            cell.metadata["tags"] = ["remove-cell"]
        elif (_draws(cell) or _is_long(cell)) and not FOLDED & {*_tags(cell)}:
            cell.metadata["tags"] = [*_tags(cell), "hide-input"]
    for cell in rest:
        _name_fold(cell)
        if "alt" in cell.metadata:  # where nbconvert looks for it
            cell.metadata["mystnb"]["image"] = {"alt": cell.metadata["alt"]}
    notebook.cells = [*rest[:1], *first, *rest[1:]]
    return notebook


def _is_long(cell: NotebookNode) -> bool:
    """Whether a cell is code that its outputs can be read without."""
    case = "assert " in cell.source
    return not case and len(cell.source.splitlines()) > LONGEST_CODE


def _shows(cell: NotebookNode) -> bool:
    """Whether a reader sees an output of it: what is only published is for pages."""
    kept = "application/papermill.record/"
    return any(
        not all(kind.startswith(kept) for kind in output.get("data", {"text": ""}))
        for output in cell.outputs
    )


def _draws(cell: NotebookNode) -> bool:
    """Whether a cell ends with a table or a figure, whose code is folded."""
    kinds = {"text/html", "image/png"}
    return any(kinds & {*o.get("data", {})} for o in cell.get("outputs", []))


def _name_fold(cell: NotebookNode) -> None:
    """Fold a long table under its caption, and call every fold what is in it."""
    html_texts = [o.data["text/html"] for o in cell.get("outputs", []) if _is_table(o)]
    if not html_texts:
        return
    tags, folded = {*_tags(cell)}, {"hide-output", "hide-cell"}
    long = max(text.count("<tr") for text in html_texts) > LONGEST_TABLE
    if long or ("hide-output" in tags and "assert " not in cell.source):
        tags = tags - {"hide-input", "hide-output"} | {"hide-cell"}
    if tags & folded:
        (caption,) = re.findall("<caption>(.*?)</caption>", html_texts[0]) or [""]
        prompt = html.unescape(caption) or "Show {type}"
        cell.metadata.setdefault("mystnb", {})["code_prompt_show"] = prompt
        cell.metadata["mystnb"]["code_prompt_hide"] = prompt
    cell.metadata["tags"] = sorted(tags)


def _is_table(output: NotebookNode) -> bool:
    return "<table" in output.get("data", {}).get("text/html", "")


@contextmanager
def _edited(path: Path, target: Path | None = None) -> Iterator[dict[str, Any]]:
    """The settings of Jupyter Book in a file, written afterwards: there, or elsewhere.

    Raises:
        ValueError: no YAML, or not a table of settings with a table ``html``.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} is no YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("html", {}), dict):
        raise ValueError(f"{path}: expected settings, and settings below html")
    yield settings
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (target or path).write_text(text, encoding="utf8")


def _replace_folder(fresh: Path, target: Path) -> None:
    """Give a finished folder its name; what had it goes only after it has lost it.

    Killed in between, this leaves no folder of that name, never half of one.
    """
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def build_site(source: Path, out: Path) -> Path:
    """Build the HTML of a staged book; every warning is an error.

    All pages are built each time: an incremental build would leave old numbers on
    the pages that glue them from a chapter.

    Args:
        source: a folder with ``_config.yml`` and ``_toc.yml``.
        out: folder that receives ``index.html``; replaced whole, or left as it was.

    Returns:
        The path of the first page.

    Raises:
        ValueError: Jupyter Book failed; the message holds its first complaint, and
            ``out`` with the suffix .log all it said.
    """
    work, log = out.with_name(f"{out.name}.partial"), out.with_suffix(".log")
    log.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    strict = ["--all", "-W", "--keep-going", "-n"]
    command = ["build", str(source), "--path-output", str(work), *strict]
    done = subprocess.run(
        [sys.executable, "-c", JUPYTER_BOOK, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    built = work / "_build" / "html"
    if done.returncode != 0 or not (built / "index.html").is_file():
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)  # colours
        log.write_text(text, encoding="utf8")
        shutil.rmtree(work)
        said = [
            line
            for line in text.splitlines()
            if re.search("WARNING|E(?:RROR|rror):", line)
        ]
        first = said[0].replace(f"{source.resolve()}{os.sep}", "") if said else "?"
        raise ValueError(f"the book does not build: {first} (all of it: {log})")
    slim(built)
    mend(built)
    _replace_folder(built, out)
    shutil.rmtree(work)
    return out / "index.html"


def slim(html_dir: Path) -> None:
    """Take out of a built site what no reader needs: a third of its weight.

    Maps of sources, languages other than the book's, fonts in older formats; pictures
    keep 256 colours.
    """
    for pattern in SUPERFLUOUS:
        for path in html_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in html_dir.glob("_images/*.png"):
        with Image.open(path) as picture:
            small = picture.convert("RGBA").quantize(256, Image.Quantize.FASTOCTREE)
        small.save(path, optimize=True)
    for path in html_dir.glob("_sources/**/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:  # the repository has them with their outputs
            cell.pop("outputs", None)
            if cell.cell_type == "code":
                cell["outputs"] = []
        nbformat.write(notebook, path)


def mend(html_dir: Path) -> None:
    """Set right what Sphinx and its theme write and a screen reader stumbles over."""
    for path in html_dir.rglob("*.html"):
        text = path.read_text(encoding="utf8")
        for wrong, right in STUMBLES.items():
            text = text.replace(wrong, right)
        path.write_text(text, encoding="utf8")


# --- checks --------------------------------------------------------------------


class Page(NamedTuple):
    """One HTML page: its path below the site's root, with slashes, and its tree."""

    name: str
    tree: BeautifulSoup


def check_site(html_dir: Path, source: Path) -> list[str]:
    """Find what a strict build of Jupyter Book lets pass.

    Args:
        html_dir: the built site.
        source: the staged sources it was built from.

    Returns:
        Problems, one line each, ``page: what is wrong``; empty for a good book.
    """
    pages = read_pages(html_dir)
    problems = [*config_problems(source), *missing_pages(html_dir, source)]
    problems += link_problems(pages, html_dir)
    problems += style_problems(html_dir)
    for page in pages:
        for check in (
            heading_problems,
            output_problems,
            unrendered_problems,
            image_problems,
            request_problems,
            banner_problems,
        ):
            problems += [f"{page.name}: {problem}" for problem in check(page)]
    problems += path_problems(html_dir)
    return problems


def read_pages(html_dir: Path) -> list[Page]:
    """Parse the pages of a site by name, less those that only forward to another."""
    pages = []
    for path in sorted(html_dir.rglob("*.html")):
        name = path.relative_to(html_dir).as_posix()
        tree = BeautifulSoup(path.read_text(encoding="utf8"), "html.parser")
        forward = tree.find("meta", attrs={"http-equiv": re.compile("(?i)refresh")})
        if not name.startswith(("_static", "_sources")) and forward is None:
            pages.append(Page(name, tree))
    return pages


def config_problems(source: Path) -> list[str]:
    """Keys and values of ``_config.yml`` that Jupyter Book ignores or only warns of."""
    from jupyter_book.config import PATH_YAML_DEFAULT, get_validator

    config = yaml.safe_load((source / "_config.yml").read_text(encoding="utf8"))
    defaults = yaml.safe_load(PATH_YAML_DEFAULT.read_text(encoding="utf8"))
    validator = get_validator()
    unknown = _unknown_keys(config, defaults, validator.schema)
    return [f"_config.yml: unknown key {key}" for key in unknown] + [
        f"_config.yml: {'.'.join(map(str, error.path))}: {error.message}"
        for error in validator.iter_errors(config)
    ]


def _unknown_keys(config: Any, defaults: Any, schema: Any, at: str = "") -> list[str]:
    # Neither of Jupyter Book's two lists is complete: a key is known if one has it.
    # Where both list nothing (sphinx.config), Sphinx itself warns of unknown names.
    defaults = defaults if isinstance(defaults, dict) else {}
    properties = schema.get("properties", {})
    known = defaults.keys() | properties.keys()
    if not isinstance(config, dict) or not known:
        return []
    unknown = [f"{at}{key}" for key in config if key not in known]
    for key in config.keys() & known:
        deeper = defaults.get(key), properties.get(key, {})
        unknown += _unknown_keys(config[key], *deeper, at=f"{at}{key}.")
    return unknown


def missing_pages(html_dir: Path, source: Path) -> list[str]:
    """Pages in ``_toc.yml`` that were not built, and pages that it does not list."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    listed = set(parse_toc_yaml(source / "_toc.yml"))
    written = {
        path.relative_to(source).with_suffix("").as_posix()
        for path in (source / "book").rglob("*")
        if path.suffix in (".md", ".ipynb") and "_static" not in path.parts
    }
    unlisted = [f"{name}: not in _toc.yml" for name in sorted(written - listed)]
    return unlisted + [
        f"{name}.html: in _toc.yml, but not built"
        for name in sorted(listed)
        if not (html_dir / f"{name}.html").is_file()
    ]


def heading_problems(page: Page) -> Iterator[str]:
    """A page has one first-level heading: its title."""
    # The theme repeats the title for printing.
    titles = [_words(h) for h in page.tree.select("h1:not(.onlyprint h1)")]
    if len(titles) != 1:
        yield f"{len(titles)} first-level headings instead of one: {titles}"


def output_problems(page: Page) -> Iterator[str]:
    """No output of a cell is a traceback or came through stderr."""
    for output in page.tree.select(".output.traceback, .output.stderr"):
        kind = "traceback" if "traceback" in output["class"] else "stderr"
        yield f"{kind} in an output: {_words(output)[:80]!r}"
    for output in page.tree.select(".cell_output"):
        if "Traceback (most recent call last)" in output.get_text():
            yield "traceback printed in an output"


def unrendered_problems(page: Page) -> Iterator[str]:
    """No markup is left as text, and nothing was replaced by an error message."""
    for message in page.tree.select(".system-message, .problematic"):
        yield f"error message in the page: {_words(message)[:80]!r}"
    for text in page.tree.body.find_all(string=True) if page.tree.body else []:
        if text.find_parent(["pre", "code", "script", "style"]) is None and (
            text.find_parent(class_="math") is None
        ):
            for kind, pattern in UNRENDERED.items():
                if found := pattern.search(text):
                    yield f"unrendered {kind}: {found[0][:80]!r}"


def image_problems(page: Page) -> Iterator[str]:
    """Every image says in words what it shows; a file name is no description."""
    for image in page.tree.find_all("img"):
        alt, source = str(image.get("alt", "")).strip(), str(image.get("src", ""))
        looks_like_file = re.search(r"\.(png|svg|jpe?g|gif|webp)$", alt, re.IGNORECASE)
        if looks_like_file or len(alt.split()) < 3:
            yield f"image {source!r} without an alternative text in words: {alt!r}"


def request_problems(page: Page) -> Iterator[str]:
    """Opening a page asks no other host for anything."""
    for tag in page.tree.find_all(True):
        loaded = [tag.get("src"), tag.get("data"), tag.get("poster")]
        loaded += [part.split()[0] for part in _srcset(tag)]
        if tag.name == "link" and LOADS_NOTHING.isdisjoint(tag.get("rel") or []):
            loaded.append(tag.get("href"))
        loaded += CSS_ADDRESS.findall(str(tag.get("style", "")))
        if tag.name == "style":
            loaded += CSS_ADDRESS.findall(tag.get_text())
        if tag.name == "script":
            loaded += SCRIPT_ADDRESS.findall(tag.get_text())
        for address in loaded:
            if address and WEB_ADDRESS.match(str(address)):
                yield f"external request by <{tag.name}>: {address}"


def _srcset(tag: Tag) -> list[str]:
    return [part for part in str(tag.get("srcset", "")).split(",") if part.strip()]


def banner_problems(page: Page) -> Iterator[str]:
    """Every page says which run its numbers come from."""
    banner = page.tree.select_one(".bd-header-announcement")
    if banner is None or not _words(banner):
        yield "no banner that names the run"


def style_problems(html_dir: Path) -> Iterator[str]:
    """No style sheet of the site loads anything from another host."""
    for path in sorted(html_dir.rglob("*.css")):
        for address in CSS_ADDRESS.findall(path.read_text(encoding="utf8")):
            yield f"{path.relative_to(html_dir).as_posix()}: external {address}"


def path_problems(html_dir: Path) -> Iterator[str]:
    """Neither a page nor a source shown beside it tells a path of this machine."""
    for path in sorted(html_dir.rglob("*")):
        name = path.relative_to(html_dir).as_posix()
        shown = path.suffix == ".html" or name.startswith("_sources/")
        if not path.is_file() or not (shown or name == "searchindex.js"):
            continue
        if found := MACHINE_PATH.search(path.read_text(encoding="utf8")):
            yield f"{name}: path of a machine: {found[0]}"


def link_problems(pages: Sequence[Page], html_dir: Path) -> Iterator[str]:
    """Every link inside the site leads to a file, and its fragment to a place in it."""
    places = {page.name: _places(page) for page in pages}
    for page in pages:
        for tag in page.tree.find_all(["a", "img", "link", "script"]):
            address = str(tag.get("href") or tag.get("src") or "")
            link = urlsplit(address)
            if not address or link.scheme or link.netloc:
                continue
            path = html_dir / page.name
            if link.path:
                path = path.parent / unquote(link.path)
            try:
                target = path.resolve().relative_to(html_dir.resolve()).as_posix()
            except ValueError:
                yield f"{page.name}: link leaves the site: {address}"
                continue
            place = unquote(link.fragment)
            if not path.is_file():
                yield f"{page.name}: broken link: {address}"
            elif place and target in places and place not in places[target]:
                yield f"{page.name}: no such place in {target}: {address}"


def _places(page: Page) -> set[str]:
    named = page.tree.select("[id], a[name]")
    return {str(tag.get("id") or tag.get("name")) for tag in named}


def _words(tag: Tag) -> str:
    return " ".join(tag.get_text().replace("#", "").split())

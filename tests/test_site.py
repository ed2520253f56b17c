"""The site checks report each fault that is planted, and nothing in a good page."""

import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml

from opd_geometry import sources
from opd_geometry.book import site

ROOT = Path(__file__).resolve().parents[1]

GOOD = """
<aside class="bd-header-announcement">Profile laptop, seed 0, two cores.</aside>
<div class="onlyprint"><h1>Results</h1></div>
<h1 id="results">Results<a class="headerlink" href="#results">#</a></h1>
<p>It costs $5 or 5 $ and <code>{ref}`x` $a$</code>, in [0, 1] (closed).</p>
<p><span class="math">\\(\\sigma_1\\)</span> <a href="https://arxiv.org/abs/1">a</a>
<a href="other.html#there">there</a> <a href="#results">here</a></p>
<img src="figure.png" alt="Stable rank of three arms over training.">
<div class="cell_output"><pre>{glue:text} stays in code</pre></div>
"""
OTHER = GOOD.replace("<p>", '<p id="there">', 1).replace("#there", "#results")

PageProblems = Callable[..., list[str]]


@pytest.fixture
def check(tmp_path: Path) -> PageProblems:
    """Check a site of two pages, the first of which gets the given HTML."""

    def problems(
        body: str = "", *, head: str = "", replace: tuple[str, str] = ("", "")
    ) -> list[str]:
        html, source = tmp_path / "html", tmp_path / "source"
        write_source(source, {})
        first = GOOD.replace(*replace) if replace[0] else GOOD
        page = f"<head>{head}</head><body>{first}{body}</body>"
        write(html / "book/index.html", page)
        write(html / "book/other.html", f"<body>{OTHER}</body>")
        write(html / "book/figure.png", "")
        write(html / "index.html", FORWARD)
        return site.check_site(html, source)

    return problems


FORWARD = '<meta http-equiv="Refresh" content="0; url=book/index.html">'


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")


def write_source(source: Path, config: dict) -> None:
    toc = {"format": "jb-book", "root": "book/index"}
    toc["chapters"] = [{"file": "book/other"}]
    write(source / "_toc.yml", yaml.safe_dump(toc))
    write(source / "_config.yml", yaml.safe_dump({"title": "A book", **config}))
    for name in ("index", "other"):
        write(source / f"book/{name}.md", "# Results\n")


def test_good_site_has_no_problems(check: PageProblems) -> None:
    assert check() == []


# A path of a machine, put together here because no file of this project holds one.
HOME_PATH = "/" + "home/ada/opd/run.json"

PLANTED = {
    "second title": ("<h1>Again</h1>", "2 first-level headings"),
    "traceback": ('<div class="output traceback">ValueError</div>', "traceback in"),
    "printed traceback": (
        '<div class="cell_output"><pre>Traceback (most recent call last)</pre></div>',
        "traceback printed",
    ),
    "stderr": ('<div class="output stderr">careful</div>', "stderr in an output"),
    "glue": ("<p>{glue:text}`rank:.2f`</p>", "unrendered glue"),
    "plain glue": ("<p>{glue}`rank`</p>", "unrendered glue"),
    "role": ("<p>see {numref}`fig-rank`</p>", "unrendered role"),
    "directive": ("<p>:::{note}</p>", "unrendered role or directive"),
    "inline maths": ("<p>the gap $r_t$ of</p>", "unrendered maths"),
    "display maths": ("<p>$$ x $$</p>", "unrendered maths"),
    "macro": (r"<p>\frac{a}{b}</p>", "unrendered maths"),
    "markdown link": ("<p>[notation](notation.md)</p>", "unrendered link"),
    "docutils error": ('<div class="system-message">no x</div>', "error message in"),
    "problematic": ('<span class="problematic">*x</span>', "error message in"),
    "no alt": ('<img src="figure.png">', "without an alternative text"),
    "empty alt": ('<img src="figure.png" alt=" ">', "without an alternative text"),
    "path as alt": (
        '<img src="figure.png" alt="../_images/0 1 2.png">',
        "without an alternative text",
    ),
    "one word as alt": ('<img src="figure.png" alt="Figure">', "in words: 'Figure'"),
    "script": ('<script src="https://cdn.example/m.js"></script>', "by <script>"),
    "protocol-relative": ('<script src="//cdn.example/m.js"></script>', "by <script>"),
    "image": (
        '<img src="http://example.org/x.png" alt="A plot of ranks.">',
        "by <img>",
    ),
    "srcset": (
        '<img src="figure.png" srcset="figure.png 1x, https://e.org/2.png 2x" '
        'alt="A plot of ranks.">',
        "by <img>: https://e.org/2.png",
    ),
    "frame": ('<iframe src="https://example.org"></iframe>', "by <iframe>"),
    "inline style": ('<p style="background:url(https://e.org/b.png)">', "by <p>"),
    "module": ('<script>import("https://e.org/x.mjs")</script>', "by <script>"),
    "missing page": ('<a href="gone.html">x</a>', "broken link: gone.html"),
    "missing image": ('<img src="g.png" alt="A plot of ranks.">', "broken link: g"),
    "missing place": ('<a href="other.html#gone">x</a>', "no such place in book/other"),
    "missing place here": ('<a href="#gone">x</a>', "no such place in book/index"),
    "absolute link": ('<a href="/book/index.html">x</a>', "leaves the site"),
    "machine path": (f"<pre>saved {HOME_PATH}</pre>", "path of a machine"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_the_one_problem(check: PageProblems, fault: str) -> None:
    body, said = PLANTED[fault]
    problems = check(body)
    assert len(problems) == 1
    assert problems[0].startswith("book/index.html: ")
    assert said in problems[0]


@pytest.mark.parametrize(
    "head",
    [
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link rel="preload" href="https://fonts.example/a.woff2">',
        '<link rel="icon" href="//example.org/icon.png">',
        "<style>@import 'https://fonts.example/css';</style>",
        "<style>p { src: url(//fonts.example/a.woff2) }</style>",
    ],
)
def test_request_of_the_head_is_reported(check: PageProblems, head: str) -> None:
    (problem,) = check(head=head)
    assert "external request by <" in problem


def test_a_caption_goes_to_its_figure() -> None:
    v4 = nbformat.v4
    data = {"text/markdown": "**A quarter.** Means over 5 seeds."}
    figure = v4.new_code_cell("draw()", metadata={"mystnb": {"figure": {"name": "f"}}})
    caption = v4.new_code_cell(
        "chapters.say(...)",
        metadata={"tags": ["caption", "remove-input"]},
        outputs=[v4.new_output("execute_result", data, execution_count=1)],
    )
    (cell,) = site.as_page(v4.new_notebook(cells=[figure, caption])).cells
    options = {"name": "f", "caption": "**A quarter.** Means over 5 seeds."}
    assert cell.metadata["mystnb"]["figure"] == options
    tail = "<details><summary>Detection limits</summary>\n\n3 points.\n\n</details>"
    caption.outputs[0].data["text/markdown"] += f"\n\n{tail}"
    figure.metadata["mystnb"]["figure"] = {"name": "f"}
    figure.metadata["alt"] = "A line."
    drawn, limits = site.as_page(v4.new_notebook(cells=[figure, caption])).cells
    assert drawn.metadata["mystnb"]["figure"] == options
    assert drawn.metadata["mystnb"]["image"] == {"alt": "A line."}
    assert limits.source == tail
    for cells in ([caption], [v4.new_code_cell("x"), caption]):
        with pytest.raises(ValueError, match="no figure for the caption"):
            site.as_page(v4.new_notebook(cells=cells))
    lead = v4.new_code_cell("chapters.say(...)", metadata={"tags": ["lead"]})
    title = v4.new_markdown_cell("# Title")
    cells = site.as_page(v4.new_notebook(cells=[title, figure, lead])).cells
    assert cells == [title, lead, figure]
    caption.outputs = []
    with pytest.raises(ValueError, match="or none executed"):
        site.as_page(v4.new_notebook(cells=[figure, caption]))


def test_a_page_folds_code_and_long_tables_and_drops_what_shows_nothing() -> None:
    v4 = nbformat.v4

    def cell(source: str, *tags: str, **data: str) -> nbformat.NotebookNode:
        outputs = [v4.new_output("display_data", data)] if data else []
        return v4.new_code_cell(source, metadata={"tags": [*tags]}, outputs=outputs)

    kept = {"application/papermill.record/text/plain": "1"}
    caption = "<caption>Rows &amp; more</caption>"
    table = {"text/html": f"<table class='x'>{caption}<tr></tr></table>"}
    long = {"text/html": table["text/html"].replace("<tr>", 10 * "<tr>")}
    cells = [
        v4.new_markdown_cell("# Title\n\n## Rows & more"),
        cell("publish()", **kept),
        cell("show()", **table),
        cell("show(long)", **long),
        cell("print(1)", **{"text/plain": "1"}),
        cell("\n".join(10 * ["x = 1"]), **{"text/plain": "1"}),
        cell("\n".join(10 * ["assert x"]), **{"text/plain": "1"}),
        cell("say()", "hide-input", "lead", **table),
    ]
    title, first, published, shown, folded, printed, *code = site.as_page(
        v4.new_notebook(cells=cells)
    ).cells
    assert title.source.startswith("# Title")
    assert first.metadata["tags"] == ["lead", "remove-input"]
    assert published.metadata["tags"] == ["remove-cell"]
    assert shown.metadata["tags"] == ["hide-input"]
    assert printed.metadata["tags"] == []
    assert [cell.metadata["tags"] for cell in code] == [["hide-input"], []]
    assert folded.metadata["tags"] == ["hide-cell"]
    assert folded.metadata["mystnb"]["code_prompt_show"] == "Rows & more"


def test_the_first_page_gets_the_first_figure_that_is_there(tmp_path: Path) -> None:
    v4 = nbformat.v4
    shown = {"figure": {"name": "fig-b", "caption": "**B.**"}, "image": {"alt": "A b."}}
    picture = v4.new_output("display_data", {"image/png": "aGk="})
    cell = v4.new_code_cell("b()", metadata={"mystnb": shown}, outputs=[picture])
    toy = nbformat.writes(v4.new_notebook(cells=[cell]))
    write(tmp_path / "book/chapters/01_toy.ipynb", toy)
    site.add_hero(tmp_path, ["fig-a", "fig-b"])
    assert (tmp_path / "book/hero.png").read_bytes() == b"hi"
    text = (tmp_path / "book/hero.inc").read_text()
    assert text == "```{figure} hero.png\n:alt: A b.\n\n**B.**\n```\n"
    with pytest.raises(ValueError, match="no figure fig-a or fig-c"):
        site.add_hero(tmp_path, ["fig-a", "fig-c"])


def test_claims_put_marks_at_their_chapters(root: Path) -> None:
    toc = {"format": "jb-book", "root": "book/index"}
    toc["parts"] = [{"chapters": [{"file": "book/chapters/02_distance"}]}]
    write(root / "_toc.yml", yaml.safe_dump(toc))
    title = nbformat.v4.new_markdown_cell("# How many?\n\nText.")
    page = nbformat.writes(nbformat.v4.new_notebook(cells=[title]))
    write(root / "book/chapters/02_distance.ipynb", page)
    site.add_claims(root, ROOT / "data" / "claims.csv")
    (entry,) = yaml.safe_load((root / "_toc.yml").read_text())["parts"][0]["chapters"]
    assert entry["title"].startswith("How many? ")
    assert set(entry["title"].removeprefix("How many? ")) <= set("✓✗?≈– 0123456789")
    assert "claims-brief" in (root / "book/board-brief.html").read_text()
    site.add_page(root, "yours", "# Yours\n")
    parts = yaml.safe_load((root / "_toc.yml").read_text())["parts"]
    assert parts[0]["chapters"][0] == {"file": "book/yours"}


def test_what_nobody_reads_leaves_the_site(tmp_path: Path) -> None:
    write(tmp_path / "_static/a.js.map", "x" * 100)
    write(tmp_path / "_static/locales/fr/a.json", "{}")
    write(tmp_path / "_static/a.js", "x")
    output = nbformat.v4.new_output("stream", text="x")
    cell = nbformat.v4.new_code_cell("x", outputs=[output])
    source = tmp_path / "_sources/book/a.ipynb"
    write(source, nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))
    site.slim(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.js", "a.ipynb"]
    assert nbformat.read(source, 4).cells[0].outputs == []


def test_what_a_screen_reader_stumbles_over_is_mended(tmp_path: Path) -> None:
    write(tmp_path / "a.html", '<div role="doc-biblioentry"></div><th></th>')
    site.mend(tmp_path)
    text = (tmp_path / "a.html").read_text()
    assert 'role="listitem"' in text
    assert "<th></th>" not in text


def test_canonical_address_is_no_request(check: PageProblems) -> None:
    assert check(head='<link rel="canonical" href="https://example.org/book">') == []


def test_page_without_title_or_banner_is_reported(check: PageProblems) -> None:
    assert "0 first-level" in check(replace=('<h1 id="results"', '<h2 id="results"'))[0]
    assert check(replace=("bd-header-announcement", "aside")) == [
        "book/index.html: no banner that names the run"
    ]
    banner = "Profile laptop, seed 0, two cores."
    assert "no banner" in check(replace=(banner, " "))[0]


def test_style_sheet_and_hidden_sources_are_read(
    check: PageProblems, tmp_path: Path
) -> None:
    write(tmp_path / "html/_static/a.css", "@font-face {src: url('https://e.org/f')}")
    write(tmp_path / "html/_sources/book/index.md", f"in {HOME_PATH}")
    style, hidden = check()
    assert style == "_static/a.css: external https://e.org/f"
    assert hidden.startswith("_sources/book/index.md: path of a machine: ")


def test_pages_and_table_of_contents_agree(check: PageProblems, tmp_path: Path) -> None:
    check()
    html, source = tmp_path / "html", tmp_path / "source"
    (html / "book/other.html").unlink()
    write(source / "book/draft.md", "# Draft\n")
    assert site.missing_pages(html, source) == [
        "book/draft: not in _toc.yml",
        "book/other.html: in _toc.yml, but not built",
    ]


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        ({"html": {"announcement": "x"}, "only_build_toc_files": True}, []),
        ({"sphinx": {"config": {"any_name": 1}}, "bibtex_bibfiles": ["a.bib"]}, []),
        ({"exclude_pattern": ["x"]}, ["unknown key exclude_pattern"]),
        ({"html": {"announcment": "x"}}, ["unknown key html.announcment"]),
        ({"html": {"analytics": {"id": 1}}}, ["unknown key html.analytics.id"]),
        ({"execute": {"timeout": "soon"}}, ["execute.timeout: 'soon' is not of type"]),
    ],
)
def test_configuration(tmp_path: Path, config: dict, problems: list[str]) -> None:
    write_source(tmp_path, config)
    found = site.config_problems(tmp_path)
    assert len(found) == len(problems)
    assert all(said in f for said, f in zip(problems, found, strict=True))


def test_machine_paths_are_told_from_addresses() -> None:
    for path in ("/" + "home/ada/x", "(/" + "tmp/y)", "C:" + "\\Users\\ada"):
        assert site.MACHINE_PATH.search(path), path
    for text in ("https://example.org/home/ada", "book/tmp/x", "~/opt/x", "and/or/tmp"):
        assert not site.MACHINE_PATH.search(text), text


# --- chapters ------------------------------------------------------------------


@pytest.fixture
def notebook(tmp_path: Path) -> Callable[..., Path]:
    def make(*sources: str, tag: str = "parameters") -> Path:
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        cells[0].metadata["tags"] = [tag]
        path = tmp_path / "notebooks" / "01_toy.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return make


def test_chapter_holds_results_and_no_noise(
    notebook: Callable[..., Path], tmp_path: Path
) -> None:
    source = notebook(
        "seeds = 1",
        "import os\nprint(seeds + 1, flush=True)\nprint(os.getcwd() + '/data')",
    )
    output = tmp_path / "book" / "chapters" / "01_toy.ipynb"
    site.execute_chapter(source, output, {"seeds": 41}, tmp_path)
    first = output.read_bytes()
    chapter = nbformat.reads(first.decode(), as_version=4)
    _, injected, last = chapter.cells
    assert [output.text for output in last.outputs] == ["42\ndata\n"]
    assert injected["id"] == "injected-parameters"
    assert "hide-input" in injected.metadata.tags
    assert chapter.metadata.papermill == {"parameters": {"seeds": 41}}
    assert str(tmp_path) not in first.decode()
    assert chapter.metadata[sources.STAMP] == sources.stamp(source)
    assert os.listdir(output.parent) == [output.name]
    site.execute_chapter(source, output, {"seeds": 41}, tmp_path)
    assert output.read_bytes() == first


def test_failed_chapter_leaves_the_old_one(
    notebook: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.ipynb"
    output.write_text("the old chapter")
    failing = notebook("seeds = 1", "raise ValueError('seeds is -1\\nsecond line')")
    with pytest.raises(ValueError, match=r"01_toy.ipynb failed in cell \[3\]: Value"):
        site.execute_chapter(failing, output, {"seeds": -1}, tmp_path)
    leaving = notebook("seeds = 1", "import sys\nsys.exit(0)", "print('unreached')")
    with pytest.raises(ValueError, match="stopped before code cell 4") as caught:
        site.execute_chapter(leaving, output, {"seeds": 2}, tmp_path)
    assert "\n" not in str(caught.value)
    assert output.read_text() == "the old chapter"
    assert sorted(os.listdir(tmp_path)) == ["notebooks", "out.ipynb"]


def test_bad_notebook_is_refused_before_it_runs(
    notebook: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.ipynb"
    with pytest.raises(ValueError, match="no notebook at"):
        site.execute_chapter(tmp_path / "02.ipynb", output, {}, tmp_path)
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        site.execute_chapter(notebook("x = 1", tag="other"), output, {}, tmp_path)
    write(tmp_path / "damaged.ipynb", '{"cells": [')
    with pytest.raises(ValueError, match="is no notebook"):
        site.execute_chapter(tmp_path / "damaged.ipynb", output, {}, tmp_path)
    assert not output.exists()


# --- staging and building ------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    write_source(root, {"html": {"home_page_in_navbar": True}})
    write(root / "book/chapters/01_toy.ipynb", "published")
    write(root / "book/_static/custom.css", "")
    toy = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Own")])
    write(root / "_build/book/chapters/01_toy.ipynb", nbformat.writes(toy))
    return root


def test_staged_site_shows_own_chapters_and_leaves_the_published(root: Path) -> None:
    own = root / "_build/book/chapters/01_toy.ipynb"
    target = root / "_build/book/source"
    for banner in ("Old run", "Profile <b> & seeds 0"):
        assert site.stage_site(root, target, [own], banner) == target
    config = yaml.safe_load((target / "_config.yml").read_text())
    assert config["html"]["announcement"] == "Profile &lt;b&gt; &amp; seeds 0"
    assert config["html"]["home_page_in_navbar"] is True
    assert "# Own" in (target / "book/chapters/01_toy.ipynb").read_text()
    assert (target / "book/_static/custom.css").is_file()
    assert (root / "book/chapters/01_toy.ipynb").read_text() == "published"
    assert "announcement" not in (root / "_config.yml").read_text()
    assert sorted(os.listdir(target.parent)) == ["chapters", "source"]


def test_staging_refuses_what_it_would_spoil(root: Path) -> None:
    own = root / "_build/book/chapters/01_toy.ipynb"
    with pytest.raises(ValueError, match="no announcement"):
        site.stage_site(root, root / "_build/x", [own], " ")
    with pytest.raises(ValueError, match="no chapter at"):
        site.stage_site(root, root / "_build/x", [root / "gone.ipynb"], "x")
    for target in (root, root.parent, root / "_build/book/chapters"):
        with pytest.raises(ValueError, match="holds no staged book"):
            site.stage_site(root, target, [own], "x")
    assert own.is_file()
    assert not (root / "_build/x").exists()


def test_build_names_its_first_complaint_and_keeps_the_old_site(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "html"
    write_source(source, {})
    write(source / "book/other.md", "# Other\n\nSee {py:func}`nowhere`.\n")
    write(out / "index.html", "the old site")
    with pytest.raises(ValueError, match=r"not build: book/other\.md:3: WARNING"):
        site.build_site(source, out)
    assert (out / "index.html").read_text() == "the old site"
    assert "nowhere" in (tmp_path / "html.log").read_text()
    assert sorted(os.listdir(tmp_path)) == ["html", "html.log", "source"]


# --- the published book --------------------------------------------------------


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The committed book, built once: its HTML and its staged sources."""
    folder = tmp_path_factory.mktemp("published")
    chapters = sorted((ROOT / "book" / "chapters").glob("*.ipynb"))
    banner = "Built by a test from the published chapters."
    source = site.stage_site(ROOT, folder / "source", chapters, banner)
    site.add_claims(source, ROOT / "data" / "claims.csv")
    site.add_hero(source)
    # What the explorer draws takes long to average, and is no link of a page.
    write(source / "book" / "_static" / "explorer-data.js", "")
    site.build_site(source, folder / "html")
    return folder / "html", source


@pytest.mark.book
def test_published_book_is_sound(published: tuple[Path, Path]) -> None:
    assert site.check_site(*published) == []


@pytest.mark.book
def test_published_book_reads_offline(published: tuple[Path, Path]) -> None:
    html, _ = published
    mathjax = "_static/mathjax/tex-mml-chtml.js"
    with_maths = [p for p in site.read_pages(html) if p.tree.select_one(".math")]
    assert with_maths
    for page in with_maths:
        assert page.tree.select_one(f'script[src*="{mathjax}"]'), page.name
    fonts = html / "_static/mathjax/output/chtml/fonts/woff-v2"
    assert len(list(fonts.glob("*.woff"))) > 20

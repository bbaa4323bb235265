"""report.html: summary, figures, tables and a browser over the answers, in one file that needs no
network. Its template, style and scripts are in page/.

What models and prompts say never runs: the template escapes it, the answers' HTML comes from
Markdown without HTML, links or images (answers.py), and the page's policy allows no script but the
two in page/, by their hashes, and nothing from elsewhere.
"""

import base64
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2

from evaluation.comparison_tables import COMPARISONS, differ_from_base, significant
from evaluation.figures import Drawn
from evaluation.intervals import Interval
from evaluation.summary import Entries
from evaluation.table import PAPER, Results, Table, show

FOLDER = Path(__file__).parent / "page"
MODELS = ("model", "answers by")  # headers of the columns whose rows are compared with each other


def page(
    title: str,
    summary: Entries,
    units: str,
    figures: Sequence[Drawn],
    tables: Sequence[Table],
    results: Results | None,
    answers: dict,
) -> str:
    """The page. `units`: what n counts. `answers`: answers.shown."""
    scripts = [(FOLDER / name).read_text() for name in ("tables.js", "answers.js")]
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    data = gzip.compress(json.dumps(answers).encode(), mtime=0)  # a quarter of the size
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        title=title,
        summary=summary,
        figures=figures,
        tables=views(tables, results),
        units=units,
        base=results.base if results else "",
        data=base64.b64encode(data).decode(),
        style=(FOLDER / "style.css").read_text(),
        scripts=scripts,
        hashes=[f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests],
    )


def views(tables: Sequence[Table], results: Results | None) -> list[dict]:
    """Tables as the template shows them."""
    shown = []
    for table in tables:
        starred: Collection[tuple] = ()
        if table.title == COMPARISONS:
            rows = table.frame.to_dict("records")
            starred = {(k, "mean") for k, row in enumerate(rows) if significant(row)}
        elif results and table is tables[0]:
            comparisons = next((t for t in tables if t.title == COMPARISONS), None)
            differ = differ_from_base(comparisons, results.base) if comparisons else ()
            names = zip(table.frame["benchmark"], table.frame["model"], strict=True)
            starred = {
                (k, header)
                for k, name in enumerate(names)
                for header in ("quality", "calibration")
                if (*name, header) in differ
            }
        shown.append(view(table, starred))
    return shown


def view(table: Table, starred: Collection[tuple[int, str]]) -> dict:
    """A table by benchmark. `starred`: (row number, header) of figures that get a star."""
    frame = table.frame
    headers = [h for h in frame if h != "benchmark" and not h.endswith(PAPER)]
    keys = [h for h in headers if h in MODELS or frame[h].map(lambda x: isinstance(x, str)).all()]
    best = best_figures(table, keys)
    groups: dict[str, list] = {}
    for k, row in enumerate(frame.to_dict("records")):
        sizes = Counter(x.n for x in row.values() if isinstance(x, Interval) and x.n)
        usual = sizes.most_common(1)[0][0] if sizes else None
        cells = [
            cell(row[h], h, row.get(h + PAPER), usual)
            | {"best": (k, h) in best, "star": (k, h) in starred, "number": h not in keys}
            for h in headers
        ]
        n = cell(usual, "n", None, None) | {"number": True}
        groups.setdefault(row.get("benchmark", ""), []).append(
            [*cells[: len(keys)], n, *cells[len(keys) :]]
        )
    columns = [column(table, h, h not in keys) for h in headers]
    columns.insert(len(keys), column(table, "n", True))
    return {
        "title": table.title,
        "note": table.note,
        "file_name": table.file_name,
        "csv": "data:text/csv;charset=utf-8," + quote(table.csv()),
        "columns": columns,
        "groups": groups.items(),
    }


def column(table: Table, header: str, number: bool) -> dict:
    """`first`: how a click on its header sorts first, the better end on top."""
    better = {**dict.fromkeys(table.higher, "higher"), **dict.fromkeys(table.lower, "lower")}
    better = better.get(header)
    first = "descending" if number and better != "lower" else "ascending"
    sign = {"higher": "↑", "lower": "↓"}.get(better)
    return {"header": header, "number": number, "better": better, "sign": sign, "first": first}


def cell(figure, header: str, paper: float | None, usual: int | None) -> dict:
    """`usual`: the number of units that most figures of the row have."""
    text, detail, value = show(figure, header), [], figure
    if isinstance(figure, Interval):
        value = figure.mean
        text, _, interval = text.partition(" ")
        detail = [interval, f"n {figure.n:,}" if figure.n != usual and value is not None else ""]
    if paper is not None:
        detail.append(f"paper {paper:.3f}")
    return {
        "text": text,
        "detail": ", ".join(filter(None, detail)),
        "value": "" if value is None else value,
    }


def best_figures(table: Table, keys: Sequence[str]) -> set[tuple[int, str]]:
    """(row number, header) of the best of several models, equal ones together."""
    frame, best = table.frame, set()
    same = [h for h in ("benchmark", *keys) if h in frame and h not in MODELS]
    rows = frame[same].itertuples(index=False, name=None) if same else [()] * len(frame)
    groups: dict[tuple, list[int]] = {}
    for k, key in enumerate(rows):
        groups.setdefault(key, []).append(k)
    for header in (*table.higher, *table.lower):
        for places in groups.values():
            figures = {k: getattr(frame[header].iloc[k], "mean", None) for k in places}
            rounded = {k: round(x, 3) for k, x in figures.items() if x is not None}
            if len(rounded) > 1:
                top = (max if header in table.higher else min)(rounded.values())
                best |= {(k, header) for k, x in rounded.items() if x == top}
    return best

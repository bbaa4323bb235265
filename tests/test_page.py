"""The page of a report, in Chromium, and what it says at the top: .venv/bin/python -m pytest
tests/test_page.py"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import report
from config import CellConfig
from evaluation import answers, comparison_tables, page, paper_tables, summary
from evaluation.intervals import Interval
from evaluation.results import load_evaluation
from evaluation.table import Results, Table
from prompts import render_response
from reward import calibration, quality
from storage.data import load_prompts
from storage.record import Rollout, answer_id

SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
MARKDOWN = f"""# A heading {SCRIPT}

A **bold** word, [a link](javascript:alert(1)), ![an image](https://example.org/x.png) and
<https://example.org>.

| a | b |
|---|---|
| 1 | 2 |
"""
JUDGE = (6, 6, 6, 2, 2)
# Two samples of each prompt. Their disagreement with the judge: 0 for SEE, 9 for the base.
OWN = {"base": (8, 8, 8, 3, 4), "rlcr": (7, 7, 7, 2, 2), "see": JUDGE}
CUT = render_response("Cut.", JUDGE) + " and more"
REFUSED = "HTTP 400: content_filter"


def make_results(root: Path, prompts: int, models: tuple[str, ...], benchmark="one") -> Path:
    """results/NAME. Question 0 is answered in MARKDOWN; of SEE's two answers to question 1 the
    first is malformed, and the judge refused the second."""
    data = root / "data.jsonl"
    rows = [{"prompt": f"Question {k}? {SCRIPT}", "id": f"id-{k}"} for k in range(prompts)]
    write(data, rows)
    ids = [p.id for p in load_prompts(data)]
    folder = root / "results"
    for model in models:
        path = folder / benchmark / model
        path.mkdir(parents=True)
        place = "runs/see/checkpoints/cycle_03" if model == "see" else "m"
        cell = CellConfig(model=place, data=str(data), name="x", judge="gpt-5.4", samples=2)
        (path / "config.json").write_text(json.dumps(dataclasses.asdict(cell)))
        (path / "summary.json").write_text(json.dumps({"prompts": prompts}))
        launch = {"started": "2026-11-25T10:00:00+00:00", "commit": "ab" * 20,
                  "uncommitted_changes": False,
                  "command": ["/x/evaluate.py", "--name", "a b"]}  # fmt: skip
        (path / "env.json").write_text(json.dumps([launch]))
        rollouts = [answer(model, p, k, i) for i, p in enumerate(ids) for k in range(2)]
        write(path / "rollouts.jsonl", map(dataclasses.asdict, rollouts))
        if model == "see":
            # In both orders SEE's, or whichever is shown first.
            write(path / "preferences.jsonl", [
                {"prompt_id": r.prompt_id, "sample": r.sample, "version": "v",
                 "answer_id": answer_id(r), "result": int(r.sample == 0), "shown_first": 1,
                 "shown_second": 1 if r.sample == 0 else -1, "longer_by": 5}
                for r in rollouts
                if r.answer
            ])  # fmt: skip
    (folder / "models.json").write_text(json.dumps(models))
    return folder


def answer(model: str, prompt: str, sample: int, k: int) -> Rollout:
    own = OWN[model]
    text = MARKDOWN if k == 0 else f"{model} answers {k}, sample {sample}."
    r = Rollout(
        cycle=0, step=1, prompt_id=prompt, sample=sample, seed=0, prompt_ids=(1,),
        response_ids=(k, sample), text=render_response(text, own), finish_reason="stop",
        answer=text.strip(), self_scores=own, score_positions=(0, 1, 2, 3, 4), judge_scores=JUDGE,
        judge_model="gpt-5.4", reward=0.5, quality=quality(JUDGE),
        calibration=calibration(own, JUDGE), weight_version="v",
    )  # fmt: skip
    none = dict(judge_scores=None, quality=None, calibration=None)
    if (model, k, sample) == ("see", 1, 0):
        none |= dict(answer=None, self_scores=None, score_positions=None)
        return dataclasses.replace(r, text=CUT, finish_reason="length", **none)
    if (model, k, sample) == ("see", 1, 1):
        return dataclasses.replace(r, reward=None, refused=REFUSED, **none)
    return r


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------
# Without a browser


def test_what_a_table_marks():
    """Row by row: bold for the better end among a benchmark's models, equal figures together; a
    star where given; n where a figure's differs from its row's."""
    rows = [
        {"benchmark": "x", "model": "base", "up": Interval(0.5, 0.25, 0.75, 9),
         "down": Interval(2.0, None, None, 4), "same": Interval(1.0004, None, None, 9), "p": 1e-4},
        {"benchmark": "x", "model": "see", "up": Interval(0.75, None, None, 9),
         "down": Interval(3.0, None, None, 9), "same": Interval(1.0, None, None, 9), "p": 0.5},
        {"benchmark": "y", "model": "base", "up": Interval(0.9, None, None, 9), "down": None,
         "same": None, "p": None},
        {"benchmark": "y", "model": "see", "up": Interval(None, None, None, 0), "down": None,
         "same": None, "p": None},
    ]  # fmt: skip
    table = Table.of("T", "", rows, higher=("up", "same"), lower=("down",))
    view = page.view(table, starred={(1, "up")})
    assert [c["header"] for c in view["columns"]] == ["model", "n", "up", "down", "same", "p"]
    assert [c["better"] for c in view["columns"]] == [None, None, "higher", "lower", "higher", None]
    assert [c["first"] for c in view["columns"]][2:4] == ["descending", "ascending"]
    (_, (base, see)), (_, (alone, nothing)) = view["groups"]
    assert [c["text"] for c in base] == ["base", "9", "0.500", "2.000", "1.000", "<0.001"]
    assert [c["detail"] for c in base] == ["", "", "[0.250, 0.750]", "[-], n 4", "[-]", ""]
    assert [c.get("best", False) for c in base] == [False, False, False, True, True, False]
    assert [c.get("best", False) for c in see] == [False, False, True, False, True, False]
    assert [c.get("star", False) for c in see] == [False, False, True, False, False, False]
    assert not any(c.get("best") for c in (*alone, *nothing))  # of one there is no best
    assert [c["text"] for c in nothing] == ["see", "-", "-", "-", "-", "-"]
    assert [c["number"] for c in base] == [False, True, True, True, True, True]


def endpoint(p: float | None, *differences: float | None) -> Table:
    first = {"benchmark": "one", "model": "see"}
    rows = [
        first | {"calibration minus that of": f"rival {k}", "p": p, "this is": "primary endpoint",
                 "difference": x if x is None else Interval(x, x, x, 17)}
        for k, x in enumerate(differences)
    ]  # fmt: skip
    together = {"calibration minus that of": comparison_tables.TOGETHER, "difference": None, "p": p}
    rows.append(first | together | {"this is": "primary endpoint"})
    return Table.of(comparison_tables.PRIMARY, "", rows)


@pytest.mark.parametrize(("p", "says"), [
    (0.0001, "Held: p <0.001; see on one (primary endpoint)."),
    (0.07, "Not held: p 0.070; see on one (primary endpoint)."),
    (None, "Cannot be computed: one of the three predictors is missing; "
           "see on one (primary endpoint)."),
])  # fmt: skip
def test_whether_the_primary_endpoint_held(p, says):
    first, second, third = summary.endpoint([endpoint(p, 0.125, None)], "prompts")
    assert first == says
    assert second == ("Calibration minus that of rival 0: 0.125 [0.125, 0.125], n 17 prompts.")
    assert third == "Calibration minus that of rival 1: -."
    assert "--training_run" in summary.endpoint([], "prompts")[0]


def test_the_star_is_for_corrected_differences_from_the_base():
    def row(difference: str, corrected) -> dict:
        return {"benchmark": "one", "model": "see", "difference": difference, "p": 0.01,
                "corrected p": corrected}  # fmt: skip

    rows = [row("quality - base's", 0.06), row("calibration - base's", 0.04),
            row("quality - rlcr's", 0.01), row("quality - half", None)]  # fmt: skip
    table = Table.of(comparison_tables.COMPARISONS, "", rows)
    assert comparison_tables.differ_from_base(table, "base") == {("one", "see", "calibration")}
    assert [comparison_tables.significant(r) for r in rows] == [False, True, True, False]


def test_what_stands_at_the_top(tmp_path):
    folder = make_results(tmp_path, 3, ("base", "see"))
    attempt = {"model": "gpt-5.4", "outcome": "ok", "key": "k", "seconds": 1, "tokens_in": 1000,
               "tokens_out": 20, "cost": 1.25, "attempt": 1}  # fmt: skip
    failed = attempt | {"outcome": "HTTP 500", "tokens_in": None, "tokens_out": None, "cost": None}
    write(folder / "one" / "see" / "judge_cache.jsonl", [attempt, failed])
    (folder / "one" / "base" / "summary.json").unlink()
    out = tmp_path / "out"
    text = report.run(report.Command((folder,), out=out), ["report.py", "a b"])
    results = Results([load_evaluation(folder)])
    tables = [paper_tables.main_table(results), endpoint(0.01, 0.5)]
    cells = [cell for _, _, [cell] in results.each()]
    said = dict(summary.summary(cells, tables, "report.py"))
    quality_of, top, less = (f"{x:.3f}" for x in (18 / 27, 1, calibration(OWN["base"], JUDGE)))
    assert re.sub(r" \[.*?\]", "", said["Result"][0]) == (
        f"one: see has quality {quality_of} and calibration {top}; base has quality {quality_of} "
        f"and calibration {less}."
    )
    base, see = folder / "one" / "base", folder / "one" / "see"
    assert said["Unfinished"] == [
        f"{base}: evaluate.py has not finished the answers.",
        f"{see}: 1 not judged: {REFUSED}",
        f"Stage digits of evaluate.py: {base}, {see}.",
        f"Stage sensitivity of evaluate.py: {base}, {see}.",
    ]
    assert text.startswith(f"Unfinished:\n{base}: evaluate.py has not finished the answers.\n")
    assert said["Answers"] == [
        "12 to the benchmarks, of which 1 malformed and 1 not judged; these enter neither figure."
    ]
    assert said["Judge"] == [
        "gpt-5.4: $1.25 by list price, 1 calls of unknown cost; 2 calls, 1,000 tokens in and "
        "20 out."
    ]
    assert said["Results made"] == ["2026-11-25, commit ababababab"]
    assert said["Commands"] == ["evaluate.py --name 'a b'", "report.py"]
    html = (out / "report.html").read_text()
    assert "report.py &#39;a b&#39;" in html and "Cannot be computed" in html


def test_which_answers_are_shown(tmp_path):
    """One judged answer of each model, one malformed and one refused; and the base's beside each of
    them."""
    evaluation = load_evaluation(make_results(tmp_path, 3, ("base", "see")))
    found = answers.shown(list(evaluation.cells.values()), 1)
    keys = [
        (a["model"], found["prompts"][a["prompt"]]["id"], a["sample"], a["state"])
        for a in found["answers"]
    ]
    assert keys == [
        ("base", "id-0", 0, "judged"), ("base", "id-1", 0, "judged"), ("base", "id-1", 1, "judged"),
        ("see", "id-0", 0, "judged"), ("see", "id-1", 0, "malformed"),
        ("see", "id-1", 1, "not judged"),
    ]  # fmt: skip
    by_place = {(a["model"], a["state"]): a for a in found["answers"]}
    assert by_place["see", "malformed"]["why"] == "text after the block"
    assert by_place["see", "malformed"]["html"] is None
    assert by_place["see", "not judged"]["why"] == REFUSED
    assert by_place["see", "judged"]["cycle"] == 3 and by_place["base", "judged"]["cycle"] is None
    html = by_place["see", "judged"]["html"]
    assert "<strong>bold</strong>" in html and "<td>2</td>" in html
    assert "&lt;script&gt;" in html and '<p class="heading">A heading' in html
    for mark in ("<script", "<img", "<a", "<h1"):
        assert mark not in html
    assert "[a link](javascript:alert(1))" in html


# --------------------------------------------------------------------------------------------------
# In Chromium


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api")
    if not (path := shutil.which("chromium")):
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(file, fragment, width, scheme): an open page; it asked for nothing but its file, and no
    script failed or was refused."""
    faults, opened = [], []

    def visit(file: Path, fragment: str = "", width: int = 1280, scheme: str = "light"):
        tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(tab)
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda r: faults.append(r.url) if not r.url.startswith("file:") else None)
        tab.goto(f"file://{file}#{fragment}")
        tab.wait_for_selector("article, #count:text('No answer')")
        return tab

    yield visit
    for tab in opened:
        assert not tab.title().startswith("taken")
        tab.close()
    assert not faults


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Folder of a whole report: three models, four prompts."""
    root = tmp_path_factory.mktemp("small")
    folder = make_results(root, 4, ("base", "rlcr", "see"))
    report.run(report.Command((folder,), out=root / "out"))
    return root / "out"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A page with 5,000 answers."""
    root = tmp_path_factory.mktemp("large")
    results = Results([load_evaluation(make_results(root, 1250, ("base", "see")))])
    tables = [paper_tables.main_table(results), comparison_tables.comparisons(results)]
    shown = answers.shown([cell for _, _, [cell] in results.each()], 0)
    file = root / "report.html"
    file.write_text(page.page("large", [], "prompts", [], tables, results, shown))
    return file


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_axe_finds_nothing(visit, small, width, scheme):
    """axe-core's rules include a contrast of 4.5 for text; of the figures' text it cannot tell."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = visit(small / "report.html", "beside=base", width, scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    found = axe.run(tab).response["violations"]
    assert not [(rule["id"], rule["nodes"][0]["html"]) for rule in found]

    def styles(selector: str, name: str) -> set[str]:
        script = "(all, name) => all.map(e => getComputedStyle(e)[name])"
        return set(tab.eval_on_selector_all(selector, script, name))

    assert styles(".panels text", "fill") == styles("body", "color")
    assert "rgb(0, 0, 0)" not in styles(".panels path", "stroke")
    assert styles("#tables tr > :first-child", "position") == {"sticky"}


def column(tab, header: str) -> list[str]:
    """Models of the first table from top to bottom, after a click on a header."""
    table = tab.locator("#tables table").first
    table.locator("thead button", has_text=header).click()
    return table.locator("tr[data-place] th").all_inner_texts()


def test_a_header_sorts(visit, small):
    tab = visit(small / "report.html")
    # Disagreements 9, 3 and 0: the last has the best calibration and the smallest error.
    assert column(tab, "calibration") == ["see", "rlcr", "base"]
    header = tab.locator("#tables th", has_text="calibration").first
    assert header.get_attribute("aria-sort") == "descending"
    assert column(tab, "calibration") == ["base", "rlcr", "see"]
    assert header.get_attribute("aria-sort") == "ascending"
    assert column(tab, "calibration") == ["base", "rlcr", "see"]
    assert header.get_attribute("aria-sort") == "none"
    assert column(tab, "MAE") == ["see", "rlcr", "base"]
    assert column(tab, "model") == ["base", "rlcr", "see"]
    assert column(tab, "model") == ["see", "rlcr", "base"]


def test_a_tables_csv_is_the_file(visit, small):
    tab = visit(small / "report.html")
    with tab.expect_download() as download:
        tab.click("a[download] >> nth=0")
    name = "tables-1-and-2-quality-and-calibration.csv"
    assert download.value.suggested_filename == name
    assert Path(download.value.path()).read_text() == (small / "csv" / name).read_text()


def test_five_thousand_answers(visit, large):
    """Pages of twenty, search, and an address that shows the same again."""
    tab = visit(large)
    assert tab.inner_text("#count") == "5,000 of 5,000 answers"
    assert tab.locator("article").count() == 20
    assert tab.inner_text(".where >> nth=0") == "page 1 of 250"
    assert tab.evaluate("document.documentElement.scrollHeight") < 30_000
    assert tab.is_disabled(".back >> nth=0")
    tab.click(".on >> nth=0")
    assert tab.inner_text(".where >> nth=0") == "page 2 of 250" and "page=2" in tab.url
    tab.fill("#search", "SEE ANSWERS 77")  # 77 and 770 to 779, two samples
    assert tab.inner_text("#count") == "22 of 5,000 answers"
    assert tab.inner_text(".where >> nth=0") == "page 1 of 2"
    again = visit(large, tab.url.partition("#")[2] + "&page=2")
    assert again.inner_text("#count") == "22 of 5,000 answers"
    assert again.locator("article").count() == 2 and again.is_disabled(".on >> nth=0")
    again.fill("#search", "id-1249")  # of a prompt
    assert again.inner_text("#count") == "4 of 5,000 answers"


def test_the_choice_and_its_address(visit, small):
    """Also when it is pasted into the open page."""
    tab = visit(small / "report.html", "model=see&attribute=verbosity")
    assert tab.inner_text("#count") == "8 of 24 answers"
    assert tab.is_hidden("#message")

    def paste(fragment: str) -> str:
        tab.evaluate(f"location.hash = {fragment!r}")
        tab.wait_for_function(f"location.hash === '#' + {fragment!r}")
        return tab.inner_text("#count")

    assert paste("attribute=verbosity&least=2") == "8 of 24 answers"  # the base's: 4 - 2
    assert tab.input_value("#model") == ""
    assert paste("attribute=verbosity&least=3") == "No answer matches these choices."
    assert paste("state=malformed") == "1 of 24 answers"
    assert paste("cycle=3&sort=prompt") == "8 of 24 answers"  # the checkpoint's; others have none
    assert paste("model=nobody&colour=red&state=judged") == "22 of 24 answers"
    assert "asks for model=nobody, colour=red, which is not" in tab.inner_text("#message")
    assert "cycle 0" not in tab.inner_text("#list")
    tab.click("#all")
    models = [x.split()[0] for x in tab.locator("article h4").all_inner_texts()]
    assert models == ["base"] * 8 + ["rlcr"] * 8 + ["see"] * 4  # the biggest disagreement first
    tab.click(".on >> nth=1")
    assert [x.split(":")[0] for x in tab.locator(".badge").all_inner_texts()] == [
        "malformed", "not judged"
    ]  # fmt: skip
    tab.click("#all")
    assert tab.inner_text("#count") == "24 of 24 answers" and tab.is_hidden("#message")
    tab.select_option("#model", "rlcr")
    assert tab.url.endswith("#model=rlcr")


def test_an_answer_beside_the_bases(visit, small):
    tab = visit(small / "report.html", "model=see&beside=base&sort=prompt")
    card = tab.locator("article")
    assert card.nth(0).locator("h4").all_inner_texts() == [
        "see cycle 3 · quality 0.667, calibration 1", "base quality 0.667, calibration 0.64"
    ]  # fmt: skip
    assert card.nth(0).locator("td").all_inner_texts()[:6] == ["1", "2", "6", "6", "0", "6"]
    assert card.nth(0).locator(".scores >> nth=1").locator("td.far").count() == 0
    # What the model wrote: rendered, with nothing that runs or leads elsewhere; and as written.
    text = card.nth(0).locator(".text").nth(1)
    assert text.locator("strong").inner_text() == "bold"
    assert text.locator("a, img, script, h1").count() == 0
    assert text.locator(".heading").inner_text() == f"A heading {SCRIPT}"
    assert card.nth(0).locator(".verdict").inner_text() == (
        "Better by gpt-5.4, in both orders: see's answer."
    )
    assert card.nth(1).locator(".verdict").inner_text() == (
        "A tie by gpt-5.4: better is see's answer with see's shown first, and base's answer with "
        "base's shown first."
    )
    assert card.nth(2).locator(".badge").inner_text() == "malformed: text after the block"
    assert card.nth(2).locator(".text").nth(1).inner_text() == CUT
    assert "cut at the length limit" in card.nth(2).inner_text()
    assert card.nth(3).locator(".badge").inner_text() == f"not judged: {REFUSED}"
    assert card.nth(3).locator(".scores").count() == 1  # the base's
    assert card.count() == 8
    tab.select_option("#model", "base")
    tab.select_option("#beside", "see")
    assert card.nth(0).locator("h4").all_inner_texts()[1].startswith("see cycle 3")
    assert "in both orders: see's answer" in card.nth(0).locator(".verdict").inner_text()
    tab.select_option("#form", "written")
    text = card.nth(0).locator("section >> nth=1").locator(".text")
    assert text.inner_text() == render_response(MARKDOWN, JUDGE)

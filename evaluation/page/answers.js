"use strict";
// The browser over the answers. The choice stands in the address, #benchmark=...&sort=..., so that
// a view can be shared. What models wrote is set as text, or as HTML that answers.py made of it.
const PER_PAGE = 20;
const FIELDS = ["benchmark", "model", "beside", "cycle", "state", "attribute", "least", "sort",
                "form", "search"];
const get = id => document.getElementById(id);

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    name in element ? element[name] = value : element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function start({ prompts, answers, attributes }) {
  let page = 1;

  // ---- Choosing

  const place = a => [a.benchmark, a.prompt, a.sample].join("\n");
  const evaluated = answers.filter(a => a.step === null); // the others are a run's own rollouts
  const others = new Map(evaluated.map(a => [place(a) + "\n" + a.model, a]));
  const off = a => a.judge?.map((j, k) => Math.abs(a.self[k] - j));
  const options = {
    benchmark: answers.map(a => a.benchmark),
    model: answers.map(a => a.model),
    beside: evaluated.map(a => a.model),
    cycle: answers.map(a => a.cycle).filter(c => c !== null).sort((a, b) => a - b),
    state: answers.map(a => a.state),
    attribute: attributes,
  };
  for (const [field, values] of Object.entries(options)) {
    const unique = [...new Set(values.map(String))];
    get(field).append(...unique.map(value => make("option", { textContent: value, value })));
    get(field).parentElement.hidden = unique.length < (field === "beside" ? 2 : 1);
  }
  for (const a of answers) {
    const apart = off(a);
    a.apart = Object.fromEntries(attributes.map((name, k) => [name, apart ? apart[k] : -1]));
    a.apart[""] = apart ? apart.reduce((x, y) => x + y) : -1;
  }

  function chosen(value) {
    const words = value.search.toLowerCase();
    const found = answers.filter(a =>
      ["benchmark", "model", "state"].every(f => !value[f] || a[f] === value[f])
      && (!value.cycle || String(a.cycle) === value.cycle)
      && (!value.least || a.apart[value.attribute] >= Number(value.least))
      && (!value.beside || value.model === value.beside || a.model !== value.beside)
      && (!words || (a.search ??= [prompts[a.prompt].id, prompts[a.prompt].text, a.text].join("\n")
        .toLowerCase()).includes(words)));
    const by = value.sort === "prompt"
      ? (a, b) => a.prompt - b.prompt || a.sample - b.sample
      : (a, b) => b.apart[value.attribute] - a.apart[value.attribute];
    return found.sort(by);
  }

  // ---- Showing

  function text(a, form) {
    const box = make("div", { className: "text", tabIndex: 0, role: "group",
                              ariaLabel: "answer by " + a.model });
    if (a.html === null || form === "written") {
      box.classList.add("plain");
      box.textContent = a.text;
    } else box.innerHTML = a.html;
    return box;
  }

  function scores(a) {
    const th = (textContent, scope) => make("th", { textContent, scope });
    const td = (textContent, className = "") => make("td", { textContent, className });
    const names = ["attribute", "model", "judge", "difference"].map(name => th(name, "col"));
    const rows = attributes.map((name, k) => {
      const gap = a.self[k] - a.judge[k];
      const signed = (gap > 0 ? "+" : gap < 0 ? "−" : "") + Math.abs(gap);
      return make("tr", {}, th(name, "row"), td(a.self[k]), td(a.judge[k]),
                  td(signed, Math.abs(gap) > 2 ? "far" : ""));
    });
    return make("table", { className: "scores" },
      make("thead", {}, make("tr", {}, ...names)), make("tbody", {}, ...rows));
  }

  function answer(a, form) {
    const about = [a.cycle === null ? "" : `cycle ${a.cycle}`, a.step === null ? "" : `step ${a.step}`,
      a.end === "length" ? "cut at the length limit" : "",
      a.judge ? `quality ${a.quality}, calibration ${a.calibration}` : ""].filter(Boolean).join(" · ");
    const section = make("section", {},
      make("h4", { textContent: a.model + " " }, make("small", { textContent: about })));
    if (a.why) section.append(make("p", { className: "badge", textContent: `${a.state}: ${a.why}` }));
    section.append(text(a, form));
    if (a.judge) section.append(scores(a));
    return section;
  }

  function article(a, value) {
    const prompt = prompts[a.prompt];
    const link = make("a", { href: "#" + new URLSearchParams({ search: prompt.id }),
                             textContent: "all answers to it" });
    const card = make("article", {},
      make("h3", { className: "meta" },
        `${a.benchmark} · prompt ${prompt.id}, sample ${a.sample} · `, link),
      make("div", { className: "text prompt", tabIndex: 0, role: "group", ariaLabel: "prompt",
                    textContent: prompt.text }));
    const pair = make("div", { className: "pair" }, answer(a, value.form));
    let verdict = a.verdict;
    if (value.beside && value.beside !== a.model) {
      const other = others.get(place(a) + "\n" + value.beside);
      verdict ??= other?.verdict;
      pair.append(other ? answer(other, value.form) : make("p", { className: "note",
        textContent: `No answer of ${value.beside} to this prompt and sample is on this page.` }));
    }
    card.append(pair);
    if (verdict) card.append(make("p", { className: "verdict", textContent: verdict }));
    return card;
  }

  function show() {
    const value = Object.fromEntries(FIELDS.map(f => [f, get(f).value]));
    const found = chosen(value), pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(1, page), pages);
    const first = (page - 1) * PER_PAGE;
    get("list").replaceChildren(...found.slice(first, first + PER_PAGE).map(a => article(a, value)));
    get("count").textContent = found.length
      ? `${found.length.toLocaleString("en")} of ${answers.length.toLocaleString("en")} answers`
      : "No answer matches these choices.";
    for (const where of document.querySelectorAll(".where"))
      where.textContent = `page ${page} of ${pages}`;
    for (const back of document.querySelectorAll(".back")) back.disabled = page === 1;
    for (const on of document.querySelectorAll(".on")) on.disabled = page === pages;
  }

  // ---- The address

  function write() {
    const parts = FIELDS.map(f => [f, get(f).value]).filter(([, v]) => v);
    if (page > 1) parts.push(["page", page]);
    history.replaceState(null, "", "#" + new URLSearchParams(parts));
  }

  function read() {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return; // a part of the page
    const unknown = [];
    get("choices").reset();
    page = 1;
    for (const [field, value] of new URLSearchParams(hash)) {
      const known = FIELDS.includes(field);
      if (field === "page") page = parseInt(value) || 1;
      else if (known) get(field).value = value;
      if (field === "page" || known && get(field).value === value) continue;
      if (known) get(field).value = "";
      unknown.push(`${field}=${value}`);
    }
    get("message").hidden = !unknown.length;
    get("message").textContent = unknown.length
      ? `The address asks for ${unknown.join(", ")}, which is not on this page; it is left out.` : "";
    show();
    if (hash) get("answers").scrollIntoView();
  }

  function change() {
    page = 1;
    get("message").hidden = true;
    show();
    write();
  }

  function turn(by) {
    page += by;
    show();
    write();
    get("count").scrollIntoView();
  }

  get("choices").addEventListener("input", change);
  get("choices").addEventListener("submit", event => event.preventDefault());
  get("all").addEventListener("click", () => { get("choices").reset(); change(); });
  for (const back of document.querySelectorAll(".back")) back.addEventListener("click", () => turn(-1));
  for (const on of document.querySelectorAll(".on")) on.addEventListener("click", () => turn(1));
  window.addEventListener("hashchange", read);
  read();
}

unpack(get("data").textContent).then(start).catch(error => {
  get("message").hidden = false;
  get("message").textContent = `The answers cannot be shown here (${error.message}).`;
});

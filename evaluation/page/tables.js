"use strict";
// A header sorts the rows of each benchmark: the better end first, then the other, then as printed.
function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return Number.isNaN(Number(a)) || Number.isNaN(Number(b)) ? a.localeCompare(b) : a - b;
}
for (const button of document.querySelectorAll("#tables thead button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement, table = header.closest("table");
    const first = header.dataset.first;
    const last = first === "ascending" ? "descending" : "ascending";
    const order = { none: first, [first]: last, [last]: "none" }[header.getAttribute("aria-sort")];
    for (const th of table.querySelectorAll("thead th"))
      th.setAttribute("aria-sort", th === header ? order : "none");
    for (const body of table.tBodies) {
      const value = row => row.cells[header.cellIndex].dataset.value;
      const rows = [...body.querySelectorAll("tr[data-place]")];
      rows.sort((a, b) => {
        if (order === "none") return a.dataset.place - b.dataset.place;
        if (value(a) === "" || value(b) === "") return compare(value(a), value(b)); // gaps last
        return compare(value(a), value(b)) * (order === "ascending" ? 1 : -1);
      });
      body.append(...rows);
    }
  });
}

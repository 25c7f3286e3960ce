// One listener for all tables of the page. What cannot be compared (a dash) stays at the end, in both directions.
document.addEventListener("click", event => {
  const button = event.target.closest("th button");
  if (!button) return;
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  const column = head.cellIndex, value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
    return down ? -order : order;
  }));
});

// Pictures that come in light and dark follow the palette that the reader has chosen, not only that of the system.
(() => {
  const sources = () => document.querySelectorAll('picture source[media*="prefers-color-scheme"], source[data-dark]');
  const follow = () => {
    const dark = document.body.getAttribute("data-md-color-scheme") === "slate";
    for (const source of sources()) {
      source.dataset.dark = "";
      source.media = dark ? "all" : "not all";
    }
  };
  new MutationObserver(follow).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  follow();
})();

// A click on a column's name sorts its table by it, by the first number of each cell where there is one.
(() => {
  const number = (row, column) => parseFloat(row.cells[column].textContent);
  const compare = column => (a, b) => {
    const [x, y] = [a, b].map(row => number(row, column));
    if (Number.isNaN(x) && Number.isNaN(y)) {
      return a.cells[column].textContent.localeCompare(b.cells[column].textContent);
    }
    return Number.isNaN(x) - Number.isNaN(y) || x - y;
  };
  for (const head of document.querySelectorAll(".sortable th")) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const body = head.closest("table").tBodies[0], up = head.ariaSort !== "ascending";
      const rows = [...body.rows].sort(compare(head.cellIndex));
      for (const other of head.parentElement.cells) other.ariaSort = null;
      head.ariaSort = up ? "ascending" : "descending";
      body.append(...(up ? rows : rows.reverse()));
    });
  }
})();

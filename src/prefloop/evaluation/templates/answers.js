"use strict";
// The browser of answers: finds and sorts over all of them, and shows a page of prompts at a time.
// What models wrote becomes text nodes and nothing else.
(() => {
  const PAGE = 20, LONG = 2000, LINES = 40;
  const data = JSON.parse(document.getElementById("answers-data").textContent);
  const by = (id) => document.getElementById(id);
  const JUDGE = 1, REWARD = 2, KL = 3, CUT = 4, SIGNS = 5; // of an answer; 0 is its text
  const mean = (way, place) => { // null where no answer has a number
    const known = way.map((one) => one[place]).filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };
  const rows = data.rows.map((row, number) => ({
    number, prompt: row.p, ways: row.w, judged: row.w.map((way) => mean(way, JUDGE)),
    text: [row.p, ...row.w.flatMap((way) => way.map((one) => one[0]))].join("\n").toLowerCase(),
  }));
  let found = rows, page = 0;

  const element = (name, text, properties = {}) => {
    const made = Object.assign(document.createElement(name), properties);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const said = (text) => {
    const start = text.slice(0, LONG).split("\n").slice(0, LINES).join("\n");
    const made = element("p", start, { className: "said", dir: "auto" });
    if (start.length === text.length) return [made];
    const more = element("button", `Show all ${text.length.toLocaleString("en")} characters`, { type: "button" });
    more.addEventListener("click", () => { made.textContent = text; more.remove(); });
    return [made, more];
  };
  const about = (one, way) => {
    const line = element("p", undefined, { className: "about" });
    line.append(element("b", data.ways[way]), ` · judge ${one[JUDGE] === null ? "–" : one[JUDGE].toFixed(2)}`);
    if (one[REWARD] !== null) line.append(` · reward model ${one[REWARD].toFixed(2)}`);
    if (one[KL] !== 0) line.append(` · ${one[KL].toFixed(1)} nats`);
    for (const sign of [...(one[CUT] ? ["cut"] : []), ...one[SIGNS].map((n) => data.signs[n])]) {
      line.append(" · ", element("em", sign));
    }
    return line;
  };
  const shown = (row, ways) => {
    const box = element("section", undefined, { className: "asked" });
    const head = element("h3", `Prompt ${row.number + 1}`);
    const answers = element("div", undefined, { className: "answers" });
    for (const way of ways) {
      const cell = element("div");
      cell.style.setProperty("--mark", `var(--c${way % 7})`);
      for (const one of row.ways[way]) cell.append(about(one, way), ...said(one[0]));
      answers.append(cell);
    }
    box.append(head, ...said(row.prompt), answers);
    return box;
  };
  const ways = () => [...document.querySelectorAll("[name=way]")].filter((box) => box.checked).map((box) => Number(box.value));

  const draw = () => {
    const chosen = ways();
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(page, pages - 1);
    const part = found.slice(page * PAGE, page * PAGE + PAGE);
    by("answers-list").replaceChildren(...part.map((row) => shown(row, chosen)));
    const told = part.length
      ? `Prompts ${page * PAGE + 1} to ${page * PAGE + part.length} of ${found.length.toLocaleString("en")}` +
        (found.length < rows.length ? ` that fit, of ${rows.length.toLocaleString("en")} in all` : "")
      : "No prompt fits; ask for less";
    for (const place of document.querySelectorAll(".pager")) {
      place.querySelector("p").textContent = told;
      place.querySelector("[data-go='-1']").disabled = page === 0;
      place.querySelector("[data-go='1']").disabled = page === pages - 1;
    }
  };
  const look = () => {
    const [first, second] = [Number(by("first").value), Number(by("second").value)];
    const difference = (row) => row.judged[first] === null || row.judged[second] === null
      ? NaN : row.judged[first] - row.judged[second];
    const chosen = ways();
    const word = by("search").value.toLowerCase();
    const { value: outcome } = by("outcome"), { value: sign } = by("sign");
    const marked = sign === "" ? null : sign === "cut" ? (one) => one[CUT] : (one) => one[SIGNS].includes(Number(sign));
    const fits = { all: () => true, win: (d) => d > 0, loss: (d) => d < 0, tie: (d) => d === 0 }[outcome];
    found = rows.filter((row) => fits(difference(row)) && (!word || row.text.includes(word)) &&
      (!marked || chosen.some((way) => row.ways[way].some(marked))));
    const key = {
      asked: null, up: (row) => -difference(row), down: difference,
      low: (row) => row.judged[first] ?? NaN, high: (row) => -(row.judged[first] ?? NaN),
    }[by("sort").value];
    const last = (value) => (Number.isNaN(value) ? Infinity : value); // without a number, at the end
    if (key) found = found.map((row) => [last(key(row)), row]).sort((a, b) => (a[0] === b[0] ? 0 : a[0] - b[0])).map(([, row]) => row);
    page = 0;
    draw();
  };
  by("look").addEventListener("input", look);
  by("look").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-go]")) {
    button.addEventListener("click", () => {
      page += Number(button.dataset.go);
      draw();
      by("answers").scrollIntoView();
    });
  }
  look();
})();

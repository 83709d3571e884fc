"use strict";
// What every figure of the page is made of. Names in the data are hostile: they reach the page as text only.

function failed(message) {
  const note = document.getElementById("failure");
  note.hidden = false;
  note.textContent = "A figure could not be drawn: " + message;
}
addEventListener("error", (event) => failed(event.message));
addEventListener("unhandledrejection", (event) => failed(event.reason));

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const whole = await unpacked("data");
let data = whole; // without the runs that the reader has switched off
const figures = {}; // id -> what draws it from `data`; each may be called again

// The page's own colours, light or dark, from its style sheet.
let INK, SOFT, LINE, PANEL, GROUND, AXIS, RANDOM, PRECISION, COLLAPSE, SEQUENTIAL, DIVERGING, FONT;
function readColours() {
  const style = getComputedStyle(document.documentElement),
    of = (name) => style.getPropertyValue("--" + name).trim();
  [INK, SOFT, LINE, PANEL, GROUND, AXIS, RANDOM, PRECISION, COLLAPSE] = [
    "ink",
    "soft",
    "line",
    "panel",
    "ground",
    "axis",
    "random",
    "precision",
    "collapse",
  ].map(of);
  FONT = { family: getComputedStyle(document.body).fontFamily, size: 12, color: SOFT };
  const dark = document.documentElement.dataset.theme === "dark";
  SEQUENTIAL = dark
    ? [
        [0, "#1d2733"],
        [0.25, "#204a78"],
        [0.5, "#3a78b8"],
        [0.75, "#7fb0e0"],
        [1, "#e4f0fb"],
      ]
    : [
        [0, "#f4f7fb"],
        [0.25, "#c9dbef"],
        [0.5, "#8bb3dc"],
        [0.75, "#4a82bf"],
        [1, "#1d4f8c"],
      ];
  DIVERGING = dark
    ? [
        [0, "#e8868a"],
        [0.25, "#8c4a4d"],
        [0.5, "#232c38"],
        [0.75, "#3a78b8"],
        [1, "#a9cdf0"],
      ]
    : [
        [0, "#a8383d"],
        [0.25, "#e0a3a0"],
        [0.5, "#f7f7f7"],
        [0.75, "#94b8dc"],
        [1, "#1d4f8c"],
      ];
}

// Plotly reads a subset of HTML in every label, so a name is escaped; it is shortened so that labels do not collide.
const escaped = (name) =>
  name
    .replace(/&/g, "&amp;")
    .replace(/</g, "&lt;")
    .replace(/>/g, "&gt;")
    .replace(/[\u0000-\u001f]/g, "\ufffd");
const shortened = (name, limit) => (name.length > limit ? name.slice(0, limit - 9) + "…" + name.slice(-8) : name);
const narrow = () => document.documentElement.clientWidth < 640;
const label = (name, limit = 26) => escaped(shortened(name, narrow() ? Math.min(limit, 18) : limit));
// What figures call a run: as tables do, or by fewer letters on a narrow screen.
const labels = new Map(whole.labels.map(([name, ...texts]) => [name, texts]));
const called = (run, few = false) => (labels.has(run) ? labels.get(run)[few ? 1 : 0] : shortened(run, few ? 18 : 26));
const runLabel = (run) => escaped(called(run, narrow()));
const light = (colour) => colour + "55";
const known = (values) => values.filter((value) => value !== null && value !== undefined);
const numbered = (count) => Array.from({ length: count }, (_, i) => i);
const suffix = (number) => (number ? number + 1 : "");
const middle = ([from, to]) => (from + to) / 2;
const axis = (more) => ({
  gridcolor: LINE,
  zerolinecolor: AXIS,
  linecolor: LINE,
  automargin: true,
  fixedrange: true,
  ...more,
});
const title = (text) => ({ text, font: { size: 12 }, standoff: 8 });
const heading = (text, x, y = 1) => ({
  text,
  x,
  y,
  xref: "paper",
  yref: "paper",
  xanchor: "center",
  yanchor: "bottom",
  yshift: 4,
  showarrow: false,
  font: { size: 13, color: INK },
});

// Column j of `count` side by side, as a Plotly domain.
function column(j, count, gap = 0.035) {
  const width = (1 - gap * (count - 1)) / count;
  return [j * (width + gap), j * (width + gap) + width];
}

// Where panels in rows and columns stand, all below each other on a narrow screen; and how high all are together.
function grid(rows, columns, height, gap = 0.06, space = 84) {
  const [down, across] = narrow() ? [rows * columns, 1] : [rows, columns],
    total = down * height + (down - 1) * space;
  const at = (i, j) => {
    const row = narrow() ? i * columns + j : i,
      top = (row * (height + space)) / total;
    return { x: column(narrow() ? 0 : j, across, gap), y: [1 - top - height / total, 1 - top], first: narrow() || !j };
  };
  return { at, height: total };
}

function panels(count, height, gap = 0.06) {
  const { at, height: total } = grid(1, count, height, gap);
  return { at: (j) => at(0, j), height: total };
}

// A part of a panel's height, as a Plotly domain.
const portion = ([low, high], from, to) => [low + from * (high - low), low + to * (high - low)];

// Axes of runs by name, a row each.
const ofRuns = (names, panel, rows, anchor) =>
  axis({
    domain: panel.y,
    anchor,
    tickvals: rows,
    ticktext: names.map(runLabel),
    showticklabels: panel.first,
    range: [rows.length - 0.5, -0.5],
    zeroline: false,
  });

// Runs beyond the number of colours are told apart by a mark, of which a line has a few.
const markedBy = (symbol) =>
  symbol === "circle" ? { mode: "lines" } : { mode: "lines+markers", marker: { symbol, size: 7, maxdisplayed: 6 } };
const marked = (i) => markedBy(data.symbols[i]);

const symbolOf = (name) =>
  whole.symbols[whole.runs.indexOf(name)] || (whole.training.find((run) => run.name === name) || {}).symbol || "circle";
const colourOf = (name) =>
  whole.colours[whole.runs.indexOf(name)] ||
  (whole.training.find((run) => run.name === name) || {}).colour ||
  PRECISION;

// A number as text, its sign as everywhere on the page.
const minus = (text) => text.replace(/^-/, "\u2212"); // an exponent keeps its own, as in the tables
const digits = (value, count = 3) =>
  !Number.isFinite(value) ? "\u2013" : minus(String(Number(value.toPrecision(count))));
const signed = (value, decimals = 2) => {
  const text = value.toFixed(decimals);
  return Number(text) > 0 ? "+" + text : minus(Number(text) === 0 ? text.replace("-", "") : text);
};
const inPercent = (value) => (Number.isFinite(value) ? digits(100 * value) + " %" : "undefined");

const meanOf = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// Names and values in words, the first few of many.
function listed(names, texts, most = 4) {
  const items = names.slice(0, most).map((name, i) => `${name} ${texts[i]}`);
  return items.join("; ") + (names.length > most ? `; and ${names.length - most} more` : "");
}

// Draw a figure, which says in a sentence to those who cannot see it what is drawn.
function draw(id, traces, layout, says) {
  const element = document.getElementById(id);
  const plain = {
    font: FONT,
    paper_bgcolor: GROUND,
    plot_bgcolor: GROUND,
    showlegend: false,
    hoverlabel: { font: { size: 12 }, namelength: -1 },
    margin: { l: 50, r: 20, t: 30, b: 44 },
  };
  element.style.height = layout.height + "px";
  Plotly.react(element, traces, { ...plain, ...layout }, { responsive: true, displayModeBar: false });
  element.setAttribute("aria-label", `Figure: ${headingBefore(element).replace(/\?$/, "")}. ${says}`);
  if (element.getAttribute("role")) return;
  element.setAttribute("role", "img");
  element.after(
    tools(
      ["PNG", "SVG"].map((format) => [
        format,
        `Save this figure as ${format}`,
        () =>
          Plotly.downloadImage(element, {
            format: format.toLowerCase(),
            filename: id,
            scale: format === "PNG" ? 3 : 1,
            width: element.clientWidth,
            height: element.clientHeight,
          }),
      ]),
    ),
  );
}

// The text of the heading that something stands under.
function headingBefore(element) {
  const above = [...document.querySelectorAll("h2, h3")].filter(
    (each) => each.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING,
  );
  return above.length ? above.at(-1).textContent : "";
}

function tools(buttons) {
  const bar = Object.assign(document.createElement("div"), { className: "tools" });
  buttons.forEach(([text, says, act]) => {
    const button = Object.assign(document.createElement("button"), {
      type: "button",
      textContent: text,
      title: says,
      onclick: act,
    });
    button.setAttribute("aria-label", says);
    bar.append(button);
  });
  return bar;
}

// Every table of figures as CSV: the numbers behind it, in full, of all runs; of a table of words what stands in its cells.
function offerTables() {
  const cell = (value) =>
    typeof value === "number"
      ? String(value)
      : value === null
        ? ""
        : `"${String(value).trim().replace(/\s+/g, " ").replace(/"/g, '""')}"`;
  document.querySelectorAll(".scroll > table").forEach((table) => {
    const rows = () =>
      whole.tables[table.dataset.table] || [...table.rows].map((row) => [...row.cells].map((each) => each.textContent));
    const name =
      table.dataset.table ||
      headingBefore(table)
        .toLowerCase()
        .replace(/[^a-z0-9]+/g, "-");
    table.parentElement.tabIndex = 0; // scrolled by keys where it is wider than the screen
    const offer = () =>
      table.parentElement.after(tools([["CSV", "Save this table as CSV", () => saveCsv(name, rows())]]));
    const folded = table.closest("details:not([open])");
    if (folded) folded.addEventListener("toggle", offer, { once: true });
    else offer();
  });
  const pairs = document.getElementById("figure-pairs");
  if (pairs)
    pairs.parentElement.append(
      tools([["CSV", "Save the agreement of every two runs as CSV", () => saveCsv("pairs", whole.tables.pairs)]]),
    );

  function saveCsv(name, rows) {
    const link = Object.assign(document.createElement("a"), { download: name + ".csv" });
    link.href = URL.createObjectURL(
      new Blob(["\ufeff" + rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n"], { type: "text/csv" }),
    );
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000); // a browser may read it only after downloads before it
  }
}

// Options of a select, each [value, text, group]; what was chosen stays so where it is still there.
function fill(id, names, change) {
  const select = document.getElementById(id),
    chosen = select.value || remembered(id);
  select.replaceChildren();
  names.forEach(([value, text, group]) => {
    let parent = select;
    if (group)
      parent =
        [...select.children].find((child) => child.label === group) ||
        select.appendChild(Object.assign(document.createElement("optgroup"), { label: group }));
    parent.appendChild(new Option(text, value));
  });
  if (names.some(([value]) => String(value) === chosen)) select.value = chosen;
  select.onchange = () => {
    change();
    remember();
  };
  return select;
}

// The same, with a field beside it that leaves only what holds the words in it.
function fillSearchable(id, names, change) {
  const field = document.getElementById(id + "-search"),
    says = document.getElementById(id + "-found");
  const matching = () =>
    names.filter(([, text]) =>
      field.value
        .toLowerCase()
        .split(/\s+/)
        .every((word) => text.toLowerCase().includes(word)),
    );
  field.parentElement.hidden = names.length < 12;
  field.oninput = () => {
    const found = matching();
    field.setAttribute("aria-invalid", String(!found.length));
    says.textContent = found.length ? "" : "No matrix has these words in its name: the one chosen before is shown.";
    if (found.length) {
      fill(id, found, change);
      change();
    }
  };
  return fill(id, names, change);
}

function legend(id, items) {
  const element = document.getElementById(id);
  element.replaceChildren();
  items.forEach(([kind, text, colour]) => {
    const item = document.createElement("span"),
      swatch = document.createElement("span");
    swatch.className = "swatch " + kind;
    if (colour)
      swatch.style[
        { solid: "borderTopColor", dotted: "borderTopColor", diamond: "borderColor" }[kind] || "background"
      ] = colour;
    item.append(swatch, text);
    element.appendChild(item);
  });
}

// What the reader chose, kept in the address behind the section: #layers&heat-metric=3&off=1.
const choices = new Map(
  location.hash
    .split("&")
    .slice(1)
    .map((text) => text.split("=").map(decodeURIComponent)),
);
const remembered = (id) => choices.get(id) || "";
function remember() {
  document
    .querySelectorAll(".controls select")
    .forEach((select) => (select.selectedIndex > 0 ? choices.set(select.id, select.value) : choices.delete(select.id)));
  const parts = [...choices].map((pair) => pair.map(encodeURIComponent).join("="));
  history.replaceState(null, "", [location.hash.split("&")[0] || "#", ...parts].join("&"));
}

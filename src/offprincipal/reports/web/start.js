// Which runs are shown, light or dark, and everything drawn at last.

// The data without some runs; figures of a study's claims show all of theirs.
function without(off) {
  const kept = numbered(whole.runs.length).filter((i) => !off.has(i)),
    of = (list) => kept.map((i) => list[i]),
    name = (run) => whole.runs.indexOf(run);
  const hidden = (run) => off.has(name(run));
  const each = (list, change) => list.map((item) => ({ ...item, ...change(item) }));
  return {
    ...whole,
    runs: of(whole.runs),
    colours: of(whole.colours),
    symbols: of(whole.symbols),
    training: whole.training.filter((run) => !hidden(run.name)),
    pairs: whole.pairs.filter((pair) => !hidden(pair.run_a) && !hidden(pair.run_b)),
    anatomy: each(whole.anatomy, (mask) => ({ runs: of(mask.runs) })),
    overlaps: each(whole.overlaps, (mask) => ({ runs: of(mask.runs) })),
    sweep: each(whole.sweep, (mask) => ({ runs: of(mask.runs) })),
    heat: { ...whole.heat, values: whole.heat.values.map(of) },
    spectra: { ...whole.spectra, matrices: each(whole.spectra.matrices, (matrix) => ({ runs: of(matrix.runs) })) },
    stripes: {
      ...whole.stripes,
      matrices: each(whole.stripes.matrices, (matrix) => ({
        dispersion: of(matrix.dispersion),
        ...Object.fromEntries(
          ["row", "column"].map((side) => [
            side,
            { ...matrix[side], rates: of(matrix[side].rates), nulls: of(matrix[side].nulls) },
          ]),
        ),
      })),
    },
  };
}

// Rows of tables, words and legends that are about runs of which one is switched off.
function hideWords(off) {
  document.querySelectorAll("[data-runs]").forEach((element) => {
    element.hidden = element.dataset.runs.split(" ").some((i) => off.has(Number(i)));
  });
}

function drawAll() {
  readColours();
  Object.entries(figures).forEach(([id, figure]) => {
    if (document.getElementById(id))
      try {
        figure();
      } catch (error) {
        failed(error.message);
      } // the others are still drawn
  });
}

function offerRuns() {
  const off = new Set(
    remembered("off")
      .split(",")
      .filter(Boolean)
      .map(Number)
      .filter((i) => i < whole.runs.length),
  );
  const bar = document.getElementById("shown-runs");
  if (off.size >= whole.runs.length) off.clear();
  if (off.size) {
    data = without(off);
    hideWords(off);
  }
  if (!bar) return;
  bar.hidden = false;
  document.querySelector(".skip").hidden = false;
  bar.append(
    ...whole.runs.map((run, i) => {
      const button = Object.assign(document.createElement("button"), { type: "button", title: run }),
        swatch = document.createElement("span");
      swatch.className = "swatch mark-" + whole.symbols[i];
      swatch.style.background = whole.colours[i];
      button.append(swatch, called(run));
      button.setAttribute("aria-pressed", String(!off.has(i)));
      button.onclick = () => {
        if (!off.delete(i) && off.size < whole.runs.length - 1) off.add(i); // one is always shown
        button.setAttribute("aria-pressed", String(!off.has(i)));
        if (off.size) choices.set("off", [...off].join(","));
        else choices.delete("off");
        data = off.size ? without(off) : whole;
        hideWords(off);
        drawAll();
        remember();
      };
      return button;
    }),
  );
}

function offerThemes() {
  const asked = matchMedia("(prefers-color-scheme: dark)"),
    root = document.documentElement,
    button = document.getElementById("theme");
  const choose = (theme) => {
    root.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
  };
  let before;
  choose(asked.matches ? "dark" : "light");
  button.hidden = false;
  button.onclick = () => {
    choose(root.dataset.theme === "dark" ? "light" : "dark");
    drawAll();
  };
  asked.addEventListener("change", () => {
    choose(asked.matches ? "dark" : "light");
    drawAll();
  });
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    choose("light");
    openAll();
    drawAll();
    document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.Plots.resize(plot));
  });
  addEventListener("afterprint", () => {
    choose(before);
    drawAll();
  });
}

// Panels stand below each other on a narrow screen.
function followWidth() {
  let before = narrow();
  addEventListener("resize", () => {
    if (before !== narrow()) {
      before = narrow();
      drawAll();
    }
  });
}

// What is folded away is printed too, but for the sentences of many pairs, and opened by a link to it.
const openAll = () =>
  document.querySelectorAll("details:not(.long)").forEach((each) => {
    each.open = true;
  });
function openTarget() {
  const target = document.getElementById(location.hash.slice(1).split("&")[0]);
  if (target) {
    const folded = target.closest("details");
    if (folded) folded.open = true;
    target.scrollIntoView();
  }
}

offerThemes();
offerRuns();
offerTables();
drawAll();
followWidth();
addEventListener("hashchange", openTarget);
openTarget();

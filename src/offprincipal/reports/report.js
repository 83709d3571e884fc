"use strict";
// Draws the figures of the report from the JSON in #data. Names in it are hostile: they reach the page as text only.

function report() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const INK = "#1f2733", SOFT = "#5b6675", LINE = "#e3e7ec", RANDOM = "#b4bbc5", PRECISION = "#7d8795";
  const FONT = { family: "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif", size: 12, color: SOFT };
  const SEQUENTIAL = [[0, "#f4f7fb"], [0.25, "#c9dbef"], [0.5, "#8bb3dc"], [0.75, "#4a82bf"], [1, "#1d4f8c"]];
  const DIVERGING = [[0, "#a8383d"], [0.25, "#e0a3a0"], [0.5, "#f7f7f7"], [0.75, "#94b8dc"], [1, "#1d4f8c"]];

  // Plotly reads a subset of HTML in every label, so a name is escaped; it is shortened so that labels do not collide.
  const escaped = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/[\u0000-\u001f]/g, "\ufffd");
  const shortened = (name, limit) => (name.length > limit ? name.slice(0, limit - 9) + "…" + name.slice(-8) : name);
  const label = (name, limit = 26) => escaped(shortened(name, limit));
  const light = (colour) => colour + "55";
  const known = (values) => values.filter((value) => value !== null && value !== undefined);
  const axis = (more) => ({ gridcolor: LINE, zerolinecolor: "#c5ccd6", linecolor: LINE, automargin: true, fixedrange: true, ...more });

  const title = (text) => ({ text, font: { size: 12 }, standoff: 8 });

  function draw(id, traces, layout) {
    const element = document.getElementById(id);
    const plain = { font: FONT, paper_bgcolor: "#fff", plot_bgcolor: "#fff", showlegend: false, hoverlabel: { font: { size: 12 }, namelength: -1 }, margin: { l: 50, r: 20, t: 30, b: 44 } };
    element.style.height = layout.height + "px";
    Plotly.react(element, traces, { ...plain, ...layout }, { responsive: true, displayModeBar: false });
  }

  function fill(id, names, change) {
    const select = document.getElementById(id);
    names.forEach(([value, text, group]) => {
      const option = new Option(text, value);
      let parent = select;
      if (group) {
        parent = [...select.children].find((child) => child.label === group) || select.appendChild(Object.assign(document.createElement("optgroup"), { label: group }));
      }
      parent.appendChild(option);
    });
    select.addEventListener("change", change);
    return select;
  }

  // Column j of `count` side by side, as a Plotly domain.
  function column(j, count, gap = 0.035) {
    const width = (1 - gap * (count - 1)) / count;
    return [j * (width + gap), j * (width + gap) + width];
  }

  const suffix = (number) => (number ? number + 1 : "");
  const heading = (text, x, y = 1) => ({ text, x, y, xref: "paper", yref: "paper", xanchor: "center", yanchor: "bottom", yshift: 4, showarrow: false, font: { size: 13, color: INK } });
  const middle = ([from, to]) => (from + to) / 2;
  const numbered = (count) => Array.from({ length: count }, (_, i) => i);

  function training() {
    const traces = [], runs = data.training, rows = numbered(runs.length);
    runs.forEach((run, i) => {
      const before = run.before.sampled_accuracy, after = run.after.sampled_accuracy;
      const error = run.after.sampled_accuracy_se;
      const interval = known([error, after]).length === 2 ? { type: "data", array: [1.96 * error], color: run.colour, thickness: 1.5, width: 4 } : undefined;
      const common = { type: "scatter", name: label(run.name), hovertemplate: "%{fullData.name}<br>%{x:.1%}<extra>%{meta}</extra>" };
      traces.push({ ...common, mode: "lines", x: [before, after], y: [i, i], line: { color: light(run.colour), width: 4 }, hoverinfo: "skip", hovertemplate: undefined });
      traces.push({ ...common, meta: "before", mode: "markers", x: [before], y: [i], marker: { size: 11, color: "#fff", line: { color: run.colour, width: 2 } } });
      traces.push({ ...common, meta: "after", mode: "markers", x: [after], y: [i], error_x: interval, marker: { size: 11, color: run.colour } });
    });
    const some = runs.some((run) => run.before.sampled_accuracy > 0 || run.after.sampled_accuracy > 0);
    draw("figure-training", traces, {
      height: 70 + 34 * runs.length, margin: { l: 50, r: 20, t: 8, b: 44 },
      xaxis: axis({ tickformat: ".0%", ...(some ? { rangemode: "normal" } : { range: [-0.02, 1] }), title: title("sampled accuracy on held-out prompts") }),
      yaxis: axis({ tickvals: rows, ticktext: runs.map((run) => label(run.name)), range: [runs.length - 0.5, -0.5], zeroline: false }),
    });
  }

  function overlaps() {
    const masks = data.overlaps, rows = numbered(data.runs.length), traces = [], layout = { annotations: [], barmode: "group", bargap: 0.28, bargroupgap: 0.08 };
    masks.forEach((mask, j) => {
      const domain = column(j, masks.length, 0.06), defined = rows.filter((i) => mask.runs[i].value !== null), on = { type: "bar", orientation: "h", xaxis: "x" + suffix(j), y: defined };
      const shown = defined.map((i) => mask.runs[i]), colours = defined.map((i) => data.colours[i]);
      const hover = (what) => `%{customdata}<br>${what} %{x:.2%}<extra></extra>`, customdata = defined.map((i) => label(data.runs[i]));
      const error = { type: "data", symmetric: false, array: shown.map((run) => run.high - run.value), arrayminus: shown.map((run) => run.value - run.low), color: INK, thickness: 1, width: 3 };
      traces.push({ ...on, customdata, x: shown.map((run) => run.random), marker: { color: RANDOM }, hovertemplate: hover("chance") });
      traces.push({ ...on, customdata, x: shown.map((run) => run.precision), hovertemplate: hover("rounding alone"),
        marker: { color: "#fff", line: { color: colours, width: 1 }, pattern: { shape: "/", bgcolor: "#fff", fgcolor: colours, size: 5, solidity: 0.25 } } });
      traces.push({ ...on, customdata, x: shown.map((run) => run.value), marker: { color: colours }, error_x: error, hovertemplate: hover("measured") });
      layout["xaxis" + suffix(j)] = axis({ domain, range: [0, 1.04], tickformat: ".0%", tickvals: [0, 0.5, 1] });
      layout.annotations.push(heading(mask.title, middle(domain)));
    });
    layout.yaxis = axis({ tickvals: rows, ticktext: data.runs.map((name) => label(name)), range: [data.runs.length - 0.5, -0.5], zeroline: false });
    draw("figure-overlaps", traces, { ...layout, height: 80 + 66 * data.runs.length });
  }

  // Percentage points; undefined where the rounding null is.
  const beyondRounding = (run) => run.overlap.map((value, k) => (value === null || run.overlap_rounding_null[k] === null ? null : 100 * (value - run.overlap_rounding_null[k])));

  function sweep() {
    const masks = data.sweep, traces = [], layout = { annotations: [] };
    masks.forEach((mask, j) => {
      const domain = column(j, masks.length, 0.06), x = "x" + suffix(j), above = "y" + suffix(j), below = "y" + suffix(j + masks.length);
      mask.runs.forEach((run, i) => {
        const line = { x: run.alpha, xaxis: x, yaxis: above, type: "scatter", mode: "lines+markers", name: label(data.runs[i]) };
        const hover = (what, format) => `%{fullData.name}<br>α = %{x:.0%}, ${what} %{y:${format}}<extra></extra>`, colour = data.colours[i];
        traces.push({ ...line, y: run.overlap_random, mode: "lines", line: { color: PRECISION, dash: "dot", width: 1.5 }, hovertemplate: hover("chance", ".2%") });
        traces.push({ ...line, y: run.overlap, line: { color: colour, width: 2 }, marker: { size: 5 }, hovertemplate: hover("measured", ".2%") });
        traces.push({ ...line, y: run.overlap_rounding_null, mode: "lines", line: { color: colour, dash: "dash", width: 2 }, opacity: 0.6, hovertemplate: hover("rounding", ".2%") });
        const beyond = beyondRounding(run);
        traces.push({ ...line, y: beyond, yaxis: below, line: { color: colour, width: 2 }, marker: { size: 5 }, hovertemplate: hover("beyond rounding", "+.2f") + " points" });
      });
      layout["xaxis" + suffix(j)] = axis({ domain, anchor: below, tickformat: ".0%", range: [0, 0.53], tickvals: [0.1, 0.3, 0.5], title: title("mask density α") });
      layout["yaxis" + suffix(j)] = axis({ domain: [0.47, 1], anchor: x, tickformat: ".0%", range: [-0.03, 1.05], title: j ? undefined : title("overlap") });
      layout["yaxis" + suffix(j + masks.length)] = axis({ domain: [0, 0.37], anchor: x, zerolinewidth: 1.5, nticks: 5, title: j ? undefined : title("beyond rounding, points") });
      layout.annotations.push(heading(mask.title, middle(domain)));
    });
    const beyond = masks.flatMap((mask) => mask.runs.flatMap((run) => known(beyondRounding(run)).map(Math.abs)));
    const reach = Math.max(1, ...beyond) * 1.1; // never zoomed further than one point, so that nothing tiny looks large
    masks.forEach((_, j) => { layout["yaxis" + suffix(j + masks.length)].range = [-reach, reach]; });
    draw("figure-sweep", traces, { ...layout, height: 460 });
  }

  function pairs() {
    const shown = data.pairs.filter((pair) => pair.jaccard !== null), rows = numbered(shown.length);
    const names = shown.map((pair) => `${label(pair.run_a, 22)} · ${label(pair.run_b, 22)}`);
    const dots = (key, what, marker, more) => ({ type: "scatter", mode: "markers", x: shown.map((pair) => pair[key]), y: rows, customdata: names, marker, hovertemplate: `%{customdata}<br>${what} %{x:.4f}<extra></extra>`, ...more });
    const interval = { type: "data", symmetric: false, array: shown.map((pair) => pair.high - pair.jaccard), arrayminus: shown.map((pair) => pair.jaccard - pair.low), color: INK, thickness: 1.2, width: 4 };
    const traces = [
      dots("jaccard_random", "chance", { size: 11, color: RANDOM }),
      dots("jaccard_rounding_null", "rounding alone", { size: 16, color: "rgba(255,255,255,0)", line: { color: PRECISION, width: 2 } }),
      dots("jaccard", "measured", { size: 8, color: INK }, { error_x: interval }),
    ];
    draw("figure-pairs", traces, {
      height: 80 + 30 * Math.max(shown.length, 1), margin: { l: 50, r: 20, t: 8, b: 44 },
      xaxis: axis({ range: [-0.02, 1.02], title: title("Jaccard index of the changed entries") }),
      yaxis: axis({ tickvals: rows, ticktext: names, range: [shown.length - 0.5, -0.5], zeroline: false }),
    });
  }

  function heat() {
    const metrics = data.heat.metrics;
    const metric = fill("heat-metric", metrics.map((about, i) => [i, about.name, about.group]), show);
    const run = fill("heat-run", data.runs.map((name, i) => [i, name]), show);

    // Rows and columns in which no run has a value are left out.
    function filled(values) {
      const some = (test) => values.some((grid) => grid.some((row, i) => row.some((value, j) => value !== null && test(i, j))));
      return [numbered(data.heat.roles.length).filter((r) => some((i) => i === r)), numbered(data.heat.layers.length).filter((c) => some((_, j) => j === c))];
    }

    function panel(index, values, rows, columns, y, scale) {
      const grid = values[run.value], count = data.heat.counts;
      return {
        type: "heatmap", yaxis: y, ...scale, xgap: 1, ygap: 1, hoverongaps: false,
        z: rows.map((i) => columns.map((j) => grid[i][j])), x: numbered(columns.length), y: numbered(rows.length),
        text: rows.map((i) => columns.map((j) => `${label(data.heat.roles[i])}, layer ${data.heat.layers[j]}<br>${metrics[index].name}: ${grid[i][j] === null ? "undefined" : grid[i][j]}${count[i][j] > 1 ? `<br>mean of ${count[i][j]} tensors` : ""}`)),
        hovertemplate: "%{text}<extra></extra>",
      };
    }

    function show() {
      const index = Number(metric.value), about = metrics[index], values = data.heat.values[index];
      const nulls = about.null === null ? [] : data.heat.values[about.null];
      const [rows, columns] = filled(values);
      const all = known([...values, ...nulls].flat(2)), signed = about.name.endsWith("_z");
      const reach = Math.max(...all.map(Math.abs), 1e-12), low = Math.min(...all), high = Math.max(...all);
      const flat = high - low < 1e-12 * reach;
      const scale = signed
        ? { colorscale: DIVERGING, zmin: -reach, zmax: reach }
        : { colorscale: SEQUENTIAL, zmin: flat ? low - reach / 2 : low, zmax: flat ? high + reach / 2 : high };
      const percent = about.unit === "1" && low >= 0 && high <= 1 && high > 0.001;
      scale.colorbar = { thickness: 12, outlinewidth: 0, len: 1, tickformat: percent ? "~%" : "~g", nticks: 6 };
      const size = 26 * rows.length, gap = 54, height = nulls.length ? 2 * size + gap : size;
      const traces = [panel(index, values, rows, columns, "y", scale)];
      const ticks = { tickvals: numbered(rows.length), ticktext: rows.map((i) => label(data.heat.roles[i])), zeroline: false, showgrid: false, range: [rows.length - 0.5, -0.5] };
      const layout = { height: height + 90, annotations: [heading(known(values[run.value].flat()).length ? "measured" : "measured: undefined for this run", 0.5)], margin: { l: 80, r: 20, t: 30, b: 50 } };
      layout.yaxis = axis({ ...ticks, domain: nulls.length ? [(size + gap) / height, 1] : [0, 1] });
      if (nulls.length) {
        traces.push({ ...panel(about.null, nulls, rows, columns, "y2", scale), showscale: false });
        layout.yaxis2 = axis({ ...ticks, domain: [0, size / height] });
        layout.annotations.push(heading(metrics[about.null].name.endsWith("_rounding_null") ? "rounding alone" : "a random update of equal length", 0.5, size / height));
      }
      const every = Math.ceil(columns.length / 24), marked = numbered(columns.length).filter((j) => j % every === 0 || data.heat.layers[columns[j]] === "none");
      layout.xaxis = axis({ range: [-0.5, columns.length - 0.5], anchor: nulls.length ? "y2" : "y", showgrid: false, zeroline: false, title: title("layer"), tickvals: marked, ticktext: marked.map((j) => data.heat.layers[columns[j]]) });
      draw("figure-heat", traces.filter((trace) => known(trace.z.flat()).length), layout); // Plotly fails on a grid of nothing
      document.getElementById("heat-caption").textContent = `${about.meaning}; unit: ${about.unit === "1" ? "none" : about.unit}. Source: ${about.source}.`;
    }
    show();
  }

  const matrixNames = (matrices) => matrices.map((matrix, i) => [i, matrix.tensor]);

  function spectra() {
    const matrices = data.spectra.matrices, select = fill("spectra-matrix", matrixNames(matrices), show);
    function show() {
      const matrix = matrices[select.value], traces = [], left = column(0, 2, 0.1), right = column(1, 2, 0.1);
      const line = (curve, on, colour, more) => curve && traces.push({ type: "scatter", mode: "lines", ...curve, ...on, line: { color: colour, width: 1.8, ...more.line }, name: more.name, hovertemplate: "%{fullData.name}<br>no. %{x}: %{y:.4~g}<extra></extra>" });
      const panels = { values: { xaxis: "x", yaxis: "y" }, shifts: { xaxis: "x", yaxis: "y2" }, left: { xaxis: "x2", yaxis: "y3" }, right: { xaxis: "x2", yaxis: "y4" } };
      line(matrix.base, panels.values, INK, { name: "base" });
      matrix.runs.forEach((run, i) => {
        const name = label(data.runs[i]), colour = data.colours[i];
        line(run.tuned, panels.values, colour, { name, line: { dash: "dot" } });
        line(run.shift, panels.shifts, colour, { name });
        ["left", "right"].forEach((side, s) => {
          line(run[side], panels[side], colour, { name });
          const null_ = run.nulls[s], curve = run[side];
          if (curve && null_ !== null) line({ x: [curve.x[0], curve.x.at(-1)], y: [null_, null_] }, panels[side], colour, { name: name + ", isotropic null", line: { dash: "dash", width: 1.2 } });
        });
      });
      const angles = Math.max(1, ...matrix.runs.map((run) => (run.left ? run.left.x.at(-1) : 1))), every = Math.ceil(angles / 8);
      draw("figure-spectra", traces, {
        height: 520, margin: { l: 60, r: 20, t: 30, b: 44 },
        annotations: [heading("singular values", middle(left)), heading("shift: tuned − base", middle(left), 0.44), heading("principal angles, left", middle(right)), heading("principal angles, right", middle(right), 0.44)],
        xaxis: axis({ domain: left, anchor: "y2", title: title("singular value, no.") }), xaxis2: axis({ domain: right, anchor: "y4", tick0: 1, dtick: every, title: title("angle, no.") }),
        yaxis: axis({ domain: [0.56, 1], type: "log", dtick: "D2", tickformat: "~g", tickfont: { size: 11 } }), yaxis2: axis({ domain: [0, 0.44], tickformat: "~g", nticks: 6 }),
        yaxis3: axis({ domain: [0.56, 1], anchor: "x2", ticksuffix: "°", rangemode: "tozero" }), yaxis4: axis({ domain: [0, 0.44], anchor: "x2", ticksuffix: "°", rangemode: "tozero" }),
      });
    }
    show();
  }

  function stripes() {
    const matrices = data.stripes.matrices, several = data.runs.length > 1;
    const matrix = fill("stripes-matrix", matrixNames(matrices), show);
    const run = fill("stripes-run", [...(several ? [["all", "all runs (consensus)"]] : []), ...data.runs.map((name, i) => [i, name])], show);

    function mean(curves) {
      const present = curves.filter((curve) => curve);
      return present.length ? { x: present[0].x, y: present[0].y.map((_, k) => present.reduce((sum, curve) => sum + curve.y[k], 0) / present.length) } : null;
    }

    function show() {
      const found = matrices[matrix.value], all = run.value === "all", traces = [];
      ["row", "column"].forEach((side, j) => {
        const rates = all ? found[side].consensus : found[side].rates[run.value];
        const null_ = all ? mean(found[side].nulls) : found[side].nulls[run.value], on = { type: "scatter", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
        if (null_) traces.push({ ...on, ...null_, mode: "lines", fill: "tozeroy", fillcolor: "#e4e7ec", line: { color: RANDOM, width: 1 }, hovertemplate: `${side} %{x}: %{y:.2%}<extra>spacing null</extra>` });
        if (rates) traces.push({ ...on, ...rates, mode: "markers", marker: { size: 4, color: all ? INK : data.colours[run.value], opacity: 0.75 }, hovertemplate: `${side} %{x}: %{y:.2%}<extra>measured</extra>` });
      });
      const extent = (side) => { const curve = known(found[side].rates)[0]; return curve ? [0, curve.x.at(-1) + 1] : undefined; };
      draw("figure-stripes", traces, {
        height: 320, annotations: [heading("rows", middle(column(0, 2, 0.08))), heading("columns", middle(column(1, 2, 0.08)))],
        xaxis: axis({ domain: column(0, 2, 0.08), range: extent("row"), title: title("row") }), xaxis2: axis({ domain: column(1, 2, 0.08), range: extent("column"), anchor: "y2", title: title("column") }),
        yaxis: axis({ tickformat: "~%", rangemode: "tozero", title: title("entries changed") }), yaxis2: axis({ anchor: "x2", tickformat: "~%", rangemode: "tozero" }),
      });
      const text = (value) => (value === null ? "–" : value.toPrecision(3));
      const shown = all ? numbered(data.runs.length) : [Number(run.value)];
      document.getElementById("stripes-caption").textContent = "Dispersion over rows and columns (1 is the spacing null): " + shown.map((i) => `${shortened(data.runs[i], 26)} ${text(found.dispersion[i][0])} and ${text(found.dispersion[i][1])}`).join("; ") + ".";
    }
    show();
  }

  const colourOf = (name) => data.colours[data.runs.indexOf(name)] || (data.training.find((run) => run.name === name) || {}).colour || PRECISION;

  function agreement() {
    const panels = data.theory.agreement, traces = [], layout = { annotations: [] };
    panels.forEach((panel, j) => {
      const domain = column(j, panels.length, 0.08), on = { type: "scatter", mode: "markers", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
      const both = (layer) => panel.points.filter((point) => point.layer === layer).length > 1;
      const place = (point) => point.layer + (both(point.layer) ? (point.touched ? -0.16 : 0.16) : 0);
      const dots = (points, key, what, marker) => traces.push({ ...on, x: points.map(place), y: points.map((point) => point[key]), marker,
        customdata: points.map((point) => `layer ${point.layer}, ${point.matrices} ${point.touched ? "intervened" : "untouched"}`), hovertemplate: `%{customdata}<br>${what} %{y:.4f}<extra></extra>` });
      dots(panel.points, "random", "chance", { size: 10, color: RANDOM });
      dots(panel.points, "precision", "rounding alone", { size: 15, color: "rgba(255,255,255,0)", line: { color: PRECISION, width: 2 } });
      dots(panel.points.filter((point) => point.touched), "undone", "brought back", { size: 10, symbol: "diamond-open", color: "#c24d52", line: { width: 2 } });
      dots(panel.points.filter((point) => point.touched), "measured", "as trained", { size: 8, color: "#c24d52" });
      dots(panel.points.filter((point) => !point.touched), "measured", "as trained", { size: 8, color: INK });
      layout["xaxis" + suffix(j)] = axis({ domain, anchor: "y" + suffix(j), dtick: 1, zeroline: false, title: title("layer") });
      layout["yaxis" + suffix(j)] = axis({ anchor: "x" + suffix(j), zeroline: false, title: j ? undefined : title("Jaccard index"), ...(j ? { matches: "y" } : {}) });
      layout.annotations.push(heading(label(panel.title), middle(domain)));
    });
    draw("figure-agreement", traces, { ...layout, height: 360 });
  }

  function precision() {
    const runs = data.theory.precision, colours = ["#3b6fb6", "#3f9a6c", "#1f2733", "#c24d52"];
    const select = fill("precision-run", runs.map((run, i) => [i, run.run]), show);
    const legend = document.getElementById("precision-legend");
    runs[0].formats.forEach((format, i) => {
      const item = document.createElement("span"), swatch = document.createElement("span");
      swatch.className = "swatch"; swatch.style.background = colours[i];
      item.append(swatch, format.title); legend.appendChild(item);
    });
    function show() {
      const run = runs[select.value], traces = [], left = column(0, 2, 0.1), right = column(1, 2, 0.1), points = (values) => values.map((value) => (value === null ? null : 100 * value));
      run.formats.forEach((format, i) => {
        const line = (y, on, more, what, form) => traces.push({ type: "scatter", mode: "lines+markers", x: format.step, y, ...on, marker: { size: 5 }, line: { color: colours[i], width: 2, ...more }, name: format.title, hovertemplate: `%{fullData.name}<br>%{x} times the step, ${what} %{y:${form}}<extra></extra>` });
        line(format.unchanged, { xaxis: "x", yaxis: "y" }, {}, "unchanged", ".2%");
        line(points(format.bias), { xaxis: "x2", yaxis: "y2" }, {}, "beyond chance", "+.2f");
        line(points(format.beyond), { xaxis: "x2", yaxis: "y2" }, { dash: "dash" }, "beyond rounding", "+.2f");
        if (format.title === "float32") line(points(format.by_size), { xaxis: "x2", yaxis: "y2" }, { dash: "dot" }, "by size, beyond chance", "+.2f");
      });
      const steps = run.formats[0].step, text = steps.map((step) => (step < 1 ? "1/" + 1 / step : String(step))), x = { type: "log", tickvals: steps, ticktext: text, title: title("times the step"), zeroline: false };
      draw("figure-precision", traces, {
        height: 360, annotations: [heading("unchanged", middle(left)), heading("on principal weights, points", middle(right))],
        xaxis: axis({ ...x, domain: left }), xaxis2: axis({ ...x, domain: right, anchor: "y2" }),
        yaxis: axis({ tickformat: ".0%", range: [-0.03, 1.03] }), yaxis2: axis({ anchor: "x2", zerolinewidth: 1.5 }),
      });
      stepsIn(data.theory.steps[select.value]);
    }
    show();
  }

  function stepsIn(run) {
    const x = numbered(run.measured.length), ticks = x.map((i) => (i === 0 ? "none" : i === 1 ? "<1/4096" : i === x.length - 1 ? "≥16" : i % 2 === 0 ? (i - 14 < 0 ? "1/" + 2 ** (14 - i) : String(2 ** (i - 14))) : ""));
    const hover = (what) => `%{y:.2%}<extra>${what}</extra>`;
    draw("figure-steps", [
      { type: "bar", x, y: run.measured, marker: { color: RANDOM }, hovertemplate: hover("measured") },
      { type: "scatter", mode: "lines", x, y: run.permuted, line: { color: INK, width: 2, shape: "hvh" }, hovertemplate: hover("dealt out at random") },
      { type: "scatter", mode: "lines", x, y: run.gaussian, line: { color: INK, width: 1.5, dash: "dash", shape: "hvh" }, hovertemplate: hover("Gaussian") },
    ], { height: 260, bargap: 0.1, xaxis: axis({ tickvals: x, ticktext: ticks, title: title("step over spacing, from") }), yaxis: axis({ tickformat: "~%", title: title("entries") }) });
    const percent = (value) => (100 * value).toFixed(1) + " %";
    document.getElementById("steps-caption").textContent = `${shortened(run.run, 26)}: bfloat16 hides ${percent(run.hidden.value)} of the entries' moves; of a Gaussian update's it would hide ${percent(run.hidden.gaussian_null)}, of the same steps dealt out at random ${percent(run.hidden.permuted_null)}.`;
  }

  function leash() {
    const traces = [], panel = (j) => column(j, 3, 0.08);
    data.theory.leash.forEach((run) => {
      const line = (y, on, what) => traces.push({ type: "scatter", mode: "lines", x: run.step, y, ...on, line: { color: colourOf(run.run), width: 2 }, name: label(run.run), hovertemplate: `%{fullData.name}<br>step %{x}, ${what} %{y:.3~g}<extra></extra>` });
      line(run.kl_step, { xaxis: "x", yaxis: "y" }, "KL of the step");
      line(run.kl_cumulative, { xaxis: "x2", yaxis: "y2" }, "KL from the base");
      line(run.kl_cumulative.map((value, i) => (run.length[i] ? value / run.length[i] ** 2 : null)), { xaxis: "x3", yaxis: "y3" }, "KL over squared length");
    });
    draw("figure-leash", traces, {
      height: 340, annotations: [heading("of each step, nats", middle(panel(0))), heading("from the base, nats", middle(panel(1))), heading("over squared length", middle(panel(2)))],
      xaxis: axis({ domain: panel(0), title: title("step") }), xaxis2: axis({ domain: panel(1), anchor: "y2", title: title("step") }), xaxis3: axis({ domain: panel(2), anchor: "y3", title: title("step") }),
      yaxis: axis({ type: "log", tickformat: "~g", dtick: 1 }), yaxis2: axis({ anchor: "x2", type: "log", tickformat: "~g", dtick: 1 }), yaxis3: axis({ anchor: "x3", type: "log", tickformat: "~g", dtick: 1 }),
    });
  }

  function bounds() {
    const found = data.theory.bounds, traces = [], layout = { annotations: [] }, rows = numbered(found.runs.length);
    found.bounds.forEach((bound, j) => {
      const domain = column(j, found.bounds.length, 0.04), on = { xaxis: "x" + suffix(j), type: "scatter", mode: "markers" };
      bound.runs.forEach((values, i) => {
        const colour = colourOf(found.runs[i]), mean = values.reduce((sum, value) => sum + value, 0) / values.length;
        traces.push({ ...on, x: values, y: values.map((_, k) => i + 0.5 * (((k * 0.618) % 1) - 0.5)), marker: { size: 5, color: colour, opacity: 0.5 }, name: label(found.runs[i]), hovertemplate: "%{fullData.name}<br>%{x:.3f}<extra></extra>" });
        if (values.length) traces.push({ ...on, x: [mean], y: [i], marker: { symbol: "line-ns", size: 22, line: { color: INK, width: 2.5 } }, name: label(found.runs[i]), hovertemplate: "%{fullData.name}<br>mean %{x:.3f}<extra></extra>" });
      });
      layout["xaxis" + suffix(j)] = axis({ domain, range: [-0.03, 1.05], tickvals: [0, 0.5, 1], zeroline: false });
      layout.annotations.push(heading(bound.title, middle(domain)));
    });
    layout.yaxis = axis({ tickvals: rows, ticktext: found.runs.map((name) => label(name)), range: [rows.length - 0.5, -0.5], zeroline: false });
    draw("figure-bounds", traces, { ...layout, height: 90 + 54 * rows.length });
  }

  const METHOD_COLOURS = ["#3b6fb6", "#d9772b", "#3f9a6c", "#a855a0", "#b8932c", "#4aa3b8", "#7a6f5d", "#6d62c4", "#8a9a3b"];
  const MASK_COLOURS = { full: PRECISION, safe: "#6fa0dc", principal: "#c24d52", random: "#3f9a6c", off_principal: "#a855a0", low_magnitude: "#b8932c" };

  function legend(id, items) {
    const element = document.getElementById(id);
    items.forEach(([kind, text, colour]) => {
      const item = document.createElement("span"), swatch = document.createElement("span");
      swatch.className = "swatch " + kind;
      if (colour) swatch.style[{ solid: "borderTopColor", dotted: "borderTopColor", diamond: "borderColor" }[kind] || "background"] = colour;
      item.append(swatch, text); element.appendChild(item);
    });
  }

  // Of accuracies: at least four points, so that nothing tiny looks large.
  function rangeOf(values) {
    const low = Math.min(...known(values)), high = Math.max(...known(values)), room = Math.max(0.06 * (high - low), 0.02 - (high - low) / 2);
    return [Math.max(low - room, -0.02), high + room];
  }

  const maskDensity = (found) => (found.density === null ? ", its own density" : `, density ${found.density}`);
  const maskNamed = (found, named) => (found.mask === "full" ? "full fine-tuning" : found.density === 1 ? "all projections" : named(found.mask.replace(/_/g, " ")) + maskDensity(found));
  const maskTitle = (found) => maskNamed(found, (mask) => label(mask, 18));
  const maskColour = (found) => (found.density === 1 ? INK : found.mask === "safe" && found.density === null ? "#1d4f8c" : MASK_COLOURS[found.mask] || METHOD_COLOURS[6]);
  const percentOf = (value) => (100 * value).toFixed(value < 0.0995 ? 1 : 0) + " %";

  function masks() {
    const [full, ...others] = data.fine_tuning.masks.masks, traces = [], layout = { annotations: [] };
    const wide = Math.min(others.length, 4), rows = Math.ceil(others.length / 4), gap = 104, panel = 200, height = rows * panel + (rows - 1) * gap;
    others.forEach((found, j) => {
      const domain = column(j % 4, wide, 0.05), top = 1 - (Math.floor(j / 4) * (panel + gap)) / height, on = { type: "scatter", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
      const mode = (steps) => (steps.length > 1 ? "lines" : "markers"); // one point alone makes no line
      const curves = (of, thin, thick, title) => {
        of.runs.forEach((run) => traces.push({ ...on, mode: mode(run.step), x: run.step, y: run.kl, marker: { color: thin, size: 6 }, line: { color: thin, width: 1 }, hovertemplate: `${title}, seed ${run.seed}<br>step %{x}: %{y:.3~g}<extra></extra>` }));
        traces.push({ ...on, mode: mode(of.mean.step), x: of.mean.step, y: of.mean.kl, marker: { color: thick, size: 9 }, line: { color: thick, width: 3 }, hovertemplate: `${title}, mean over seeds<br>step %{x}: %{y:.3~g}<extra></extra>` });
      };
      curves(full, "#c9ced6", "#a3abb7", "full fine-tuning");
      curves(found, maskColour(found) + "88", maskColour(found), maskTitle(found));
      layout["xaxis" + suffix(j)] = axis({ domain, anchor: "y" + suffix(j), rangemode: "tozero", title: title("step") });
      layout["yaxis" + suffix(j)] = axis({ domain: [top - panel / height, top], anchor: "x" + suffix(j), rangemode: "tozero", tickformat: "~g", nticks: 6, showticklabels: j % 4 === 0, title: j % 4 ? undefined : title("KL from the base, nats"), ...(j ? { matches: "y" } : {}) });
      layout.annotations.push(heading(`${maskTitle(found)}<br><span style="font-size:11px">trains ${percentOf(found.trained)} of the weights</span>`, middle(domain), top));
    });
    legend("masks-legend", [["solid", "full fine-tuning", "#a3abb7"], ...others.map((found) => ["", plainTitle(found), maskColour(found)])]);
    draw("figure-masks", traces, { ...layout, height: height + 110, margin: { l: 60, r: 20, t: 56, b: 50 } });
  }

  // Where text is set as text, a name needs no escaping.
  const plainTitle = (found) => maskNamed(found, (mask) => shortened(mask, 26));

  function maskSeeds() {
    const { masks: found, other_seeds: between, base } = data.fine_tuning.masks, traces = [], left = column(0, 2, 0.06), right = column(1, 2, 0.06);
    const spread = (k, count) => (count > 1 ? 0.5 * (k / (count - 1) - 0.5) : 0);
    const points = (i, values, texts, on, colour, what, form, open) => {
      const shown = numbered(values.length).filter((k) => values[k] !== null), mean = shown.reduce((sum, k) => sum + values[k], 0) / shown.length;
      if (shown.length) traces.push({ type: "scatter", mode: "lines", x: [mean, mean], y: [i - 0.34, i + 0.34], ...on, line: { color: colour, width: 2 }, opacity: 0.6, hovertemplate: `mean: %{x:${form}}<extra></extra>` });
      traces.push({ type: "scatter", mode: "markers", x: shown.map((k) => values[k]), y: shown.map((k) => i + spread(k, values.length)), customdata: shown.map((k) => texts[k]), ...on,
        marker: { size: 9, color: open ? "#fff" : colour, line: { color: colour, width: open ? 1.5 : 0 } }, hovertemplate: `%{customdata}<br>${what} %{x:${form}}<extra></extra>` });
    };
    found.forEach((of, i) => {
      const seeds = of.runs.map((run) => `${maskTitle(of)}, seed ${run.seed}`), colour = maskColour(of);
      if (of.mask !== "full") points(i, of.runs.map((run) => run.area), seeds, { xaxis: "x", yaxis: "y" }, colour, "distance", ".3~g");
      points(i, of.runs.map((run) => run.accuracy), seeds, { xaxis: "x2", yaxis: "y" }, colour, "accuracy", ".1%");
    });
    points(0, between, between.map(() => "two full runs of different seeds"), { xaxis: "x", yaxis: "y" }, PRECISION, "distance", ".3~g", true);
    draw("figure-mask-seeds", traces, {
      height: 96 + 54 * found.length, annotations: [heading("distance from the full run's curve", middle(left)), heading("accuracy at the end", middle(right))],
      shapes: base === null ? [] : [{ type: "line", xref: "x2", yref: "paper", x0: base, x1: base, y0: 0, y1: 1, layer: "below", line: { color: PRECISION, width: 2 } }],
      xaxis: axis({ domain: left, rangemode: "tozero", tickformat: "~g" }), xaxis2: axis({ domain: right, range: rangeOf(found.flatMap((of) => of.runs.map((run) => run.accuracy)).concat(base)), tickformat: "~%", nticks: 6 }),
      yaxis: axis({ tickvals: numbered(found.length), ticktext: found.map((of) => `${maskTitle(of)}<br><span style="font-size:11px">trains ${percentOf(of.trained)}</span>`), range: [found.length - 0.5, -0.5], zeroline: false }),
    });
  }

  const ranksOf = (groups) => [...new Set(groups.map((group) => group.rank))].sort((a, b) => a - b);
  const methodsOf = (groups) => [...new Set(groups.map((group) => group.method))];

  // One panel of accuracies: a line a ladder, hollow where collapsed, the range of collapse shaded, the base a line.
  function accuracies(traces, layout, groups, x, j, what) {
    const { base, least } = data.fine_tuning.ladders, methods = methodsOf(data.fine_tuning.ladders.groups), on = { type: "scatter", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
    const across = { xref: `x${suffix(j)} domain`, yref: "y" + suffix(j), x0: 0, x1: 1, layer: "below" };
    layout.shapes.push({ ...across, type: "rect", y0: -1, y1: least, fillcolor: "#f6eded", line: { width: 0 } }, { ...across, type: "line", y0: base, y1: base, line: { color: PRECISION, width: 2 } });
    groups.forEach((group) => group.ladders.forEach((ladder) => {
      const colour = METHOD_COLOURS[methods.indexOf(group.method) % METHOD_COLOURS.length], runs = ladder.runs.filter((run) => run[x] > 0);
      const told = (run) => `${label(group.method)}, rank ${group.rank}, seed ${ladder.seed}, rate ${run.rate}<br>`;
      traces.push({ ...on, mode: "lines+markers", x: runs.map((run) => run[x]), y: runs.map((run) => run.accuracy), customdata: runs.map(told), line: { color: colour, width: 1.5 },
        marker: { size: 7, color: runs.map((run) => (run.collapsed ? "#fff" : colour)), line: { color: colour, width: 1.5 } }, hovertemplate: `%{customdata}${what} %{x:.3~g}, accuracy %{y:.1%}<extra></extra>` });
      const highest = runs.filter((run) => run.highest);
      traces.push({ ...on, mode: "markers", x: highest.map((run) => run[x]), y: highest.map((run) => run.accuracy), hoverinfo: "skip", marker: { size: 14, color: "rgba(255,255,255,0)", line: { color: colour, width: 1.5 } } });
    }));
  }

  // All accuracies on one scale, so that panels can be compared; the base and the runs at matched rates are in it.
  function accuracyRange() {
    const { groups, matched, base } = data.fine_tuning.ladders;
    return rangeOf([...groups.flatMap((group) => group.ladders.flatMap((ladder) => ladder.runs)), ...matched].map((run) => run.accuracy).concat(base));
  }

  const inPowers = { type: "log", zeroline: false, tickformat: "~g", tickfont: { size: 11 } };

  function rates() {
    const { groups } = data.fine_tuning.ladders, ranks = ranksOf(groups), traces = [], layout = { annotations: [], shapes: [] }, range = accuracyRange();
    const tried = [...new Set(groups.flatMap((group) => group.ladders.flatMap((ladder) => ladder.runs.map((run) => run.rate))))].sort((a, b) => a - b);
    const ticks = tried.length <= 8 ? { tickvals: tried, ticktext: tried.map((rate) => rate.toExponential().replace("+", "")) } : {};
    ranks.forEach((rank, j) => {
      const domain = column(j, ranks.length, 0.06);
      accuracies(traces, layout, groups.filter((group) => group.rank === rank), "rate", j, "rate");
      layout["xaxis" + suffix(j)] = axis({ ...inPowers, ...ticks, domain, anchor: "y" + suffix(j), range: [Math.log10(tried[0]) - 0.15, Math.log10(tried.at(-1)) + 0.15], title: title("learning rate") });
      layout["yaxis" + suffix(j)] = axis({ anchor: "x" + suffix(j), tickformat: ".0%", range, title: j ? undefined : title("accuracy") });
      layout.annotations.push(heading(`rank ${rank}`, middle(domain)));
    });
    legend("ladders-legend", [...methodsOf(groups).map((method, i) => ["dot", method, METHOD_COLOURS[i % METHOD_COLOURS.length]]), ["solid", "base", PRECISION], ["ring", "highest stable rate"], ["collapse", "collapsed"]]);
    draw("figure-rates", traces, { ...layout, height: 340 });
  }

  function lengths() {
    const { groups, matched } = data.fine_tuning.ladders, ranks = ranksOf(groups), methods = methodsOf(groups), traces = [], layout = { annotations: [], shapes: [] }, range = accuracyRange();
    const decades = (x) => { const sizes = groups.flatMap((group) => group.ladders.flatMap((ladder) => ladder.runs.map((run) => run[x]))).filter((size) => size > 0); return Math.log10(Math.max(...sizes) / Math.min(...sizes)); };
    const measures = [["length", "relative norm of the update", "update_norm"], ["kl", "KL from the base, nats", "kl_to_base"]], heights = [[0.57, 1], [0, 0.43]];
    measures.forEach(([x, what, by], i) => ranks.forEach((rank, j) => {
      const k = i * ranks.length + j, domain = column(j, ranks.length, 0.06), on = { type: "scatter", xaxis: "x" + suffix(k), yaxis: "y" + suffix(k) };
      accuracies(traces, layout, groups.filter((group) => group.rank === rank), x, k, what);
      matched.filter((run) => run.by === by && run.rank === rank && run[x] > 0 && run.like[x] > 0).forEach((run) => {
        const colour = METHOD_COLOURS[methods.indexOf(run.method) % METHOD_COLOURS.length] || INK;
        traces.push({ ...on, mode: "lines", x: [run.like[x], run[x]], y: [run.like.accuracy, run.accuracy], line: { color: INK, width: 1.5, dash: "dot" }, hoverinfo: "skip" });
        traces.push({ ...on, mode: "markers", x: [run[x]], y: [run.accuracy], marker: { symbol: "diamond", size: 12, color: colour, line: { color: INK, width: 1.5 } },
          hovertemplate: `${label(run.method)}, rank ${rank}, seed ${run.seed}, rate ${run.rate}<br>at ${run.ratio} times the ${escaped(run.size)} of ${label(run.like.method)}<br>${what} %{x:.3~g}, accuracy %{y:.1%}<extra></extra>` });
      });
      layout["xaxis" + suffix(k)] = axis({ ...inPowers, ...(decades(x) > 3.5 || ranks.length > 3 ? { dtick: 1, tickformat: "~e" } : { dtick: "D2" }), domain, anchor: "y" + suffix(k), title: title(what), ...(j ? { matches: "x" + suffix(i * ranks.length) } : {}) });
      layout["yaxis" + suffix(k)] = axis({ domain: heights[i], anchor: "x" + suffix(k), tickformat: ".0%", range, title: j ? undefined : title("accuracy") });
      if (!i) layout.annotations.push(heading(`rank ${rank}`, middle(domain)));
    }));
    legend("lengths-legend", [...methods.map((method, i) => ["dot", method, METHOD_COLOURS[i % METHOD_COLOURS.length]]), ...(matched.length ? [["diamond", "at a matched rate", INK], ["dotted", "to the run that it matches", INK]] : []), ["solid", "base", PRECISION], ["collapse", "collapsed"]]);
    draw("figure-lengths", traces, { ...layout, height: 640 });
  }

  function control() {
    const found = data.fine_tuning.ladders.matched, ranks = ranksOf(found), symbols = ["circle", "square", "triangle-up", "star"], traces = [], rows = [];
    const symbol = (run) => symbols[ranks.indexOf(run.rank) % symbols.length];
    methodsOf(found).forEach((method) => {
      const own = found.filter((run) => run.method === method), pairs = `${label(own[0].like.method)} minus ${label(method)}`;
      const published = new Map(own.filter((run) => run.at_equal_rate !== null).map((run) => [`${run.rank} ${run.seed}`, { ...run, accuracy: run.at_equal_rate, rate: run.like.rate, equal: true, ratio: null }]));
      if (published.size) rows.push([`${pairs}<br>at equal learning rate`, [...published.values()]]);
      [...new Set(own.map((run) => run.size))].forEach((size) => rows.push([`${pairs}<br>at equal ${escaped(size)}`, own.filter((run) => run.size === size)]));
    });
    rows.forEach(([, runs], i) => {
      const values = runs.map((run) => 100 * (run.like.accuracy - run.accuracy)), counted = values.filter((_, k) => runs[k].equal), mean = counted.reduce((sum, value) => sum + value, 0) / counted.length;
      if (counted.length) traces.push({ type: "scatter", mode: "lines", x: [mean, mean], y: [i - 0.36, i + 0.36], line: { color: INK, width: 2 }, opacity: 0.6, hovertemplate: "mean: %{x:+.1f} points<extra></extra>" });
      traces.push({ type: "scatter", mode: "markers", x: values, y: runs.map((_, k) => i + (runs.length > 1 ? 0.5 * (k / (runs.length - 1) - 0.5) : 0)), customdata: runs.map((run) => `rank ${run.rank}, seed ${run.seed}: rates ${run.like.rate} and ${run.rate}` + (run.ratio === null ? "" : `, ${run.ratio} times the size`)),
        marker: { size: 10, symbol: runs.map(symbol), color: runs.map((run) => (run.equal ? INK : "#fff")), line: { color: INK, width: 1.5 } }, hovertemplate: "%{customdata}<br>%{x:+.1f} points<extra></extra>" });
    });
    legend("control-legend", ranks.map((rank) => [["dot", "square", "triangle", "star"][ranks.indexOf(rank) % 4], `rank ${rank}`]));
    draw("figure-control", traces, {
      height: 70 + 62 * rows.length, margin: { l: 50, r: 20, t: 10, b: 44 },
      shapes: [{ type: "rect", xref: "x", yref: "paper", x0: -2, x1: 2, y0: 0, y1: 1, fillcolor: "#eef1f5", line: { width: 0 }, layer: "below" }],
      xaxis: axis({ zeroline: true, zerolinewidth: 1.5, zerolinecolor: PRECISION, tickformat: "+~g", title: title("points of accuracy") }),
      yaxis: axis({ tickvals: numbered(rows.length), ticktext: rows.map(([text]) => text), range: [rows.length - 0.5, -0.5], zeroline: false }),
    });
  }

  const figures = { "figure-training": training, "figure-overlaps": overlaps, "figure-sweep": sweep, "figure-pairs": pairs, "figure-heat": heat, "figure-spectra": spectra, "figure-stripes": stripes, "figure-agreement": agreement, "figure-precision": precision, "figure-leash": leash, "figure-bounds": bounds, "figure-masks": masks, "figure-mask-seeds": maskSeeds, "figure-rates": rates, "figure-lengths": lengths, "figure-control": control };
  Object.entries(figures).forEach(([id, figure]) => {
    if (document.getElementById(id)) try { figure(); } catch (error) { failed(error.message); } // the others are still drawn
  });
  window.addEventListener("beforeprint", () => document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.Plots.resize(plot)));
}

function failed(message) {
  const note = document.getElementById("failure");
  note.hidden = false;
  note.textContent = "A figure could not be drawn: " + message;
}

window.addEventListener("error", (event) => failed(event.message));
report();

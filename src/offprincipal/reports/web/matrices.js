// Figures of single matrices: role by layer, singular values and angles, rows and columns.

figures["figure-heat"] = () => {
  const metrics = data.heat.metrics;
  const metric = fill("heat-metric", metrics.map((about, i) => [i, about.name, about.group]), show);
  const run = fill("heat-run", data.runs.map((name) => [name, name]), show);

  // Rows and columns in which no run has a value are left out.
  function filled(values) {
    const some = (test) => values.some((grid) => grid.some((row, i) => row.some((value, j) => value !== null && test(i, j))));
    return [numbered(data.heat.roles.length).filter((r) => some((i) => i === r)), numbered(data.heat.layers.length).filter((c) => some((_, j) => j === c))];
  }

  function panel(index, values, rows, columns, y, scale) {
    const grid = values[data.runs.indexOf(run.value)], count = data.heat.counts;
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
    const layout = { height: height + 90, annotations: [heading(known(values[data.runs.indexOf(run.value)].flat()).length ? "measured" : "measured: undefined for this run", 0.5)], margin: { l: 80, r: 20, t: 30, b: 50 } };
    layout.yaxis = axis({ ...ticks, domain: nulls.length ? [(size + gap) / height, 1] : [0, 1] });
    if (nulls.length) {
      traces.push({ ...panel(about.null, nulls, rows, columns, "y2", scale), showscale: false });
      layout.yaxis2 = axis({ ...ticks, domain: [0, size / height] });
      layout.annotations.push(heading(metrics[about.null].name.endsWith("_rounding_null") ? "rounding alone" : "a random update of equal length", 0.5, size / height));
    }
    const every = Math.ceil(columns.length / 24), marked = numbered(columns.length).filter((j) => j % every === 0 || data.heat.layers[columns[j]] === "none");
    layout.xaxis = axis({ range: [-0.5, columns.length - 0.5], anchor: nulls.length ? "y2" : "y", showgrid: false, zeroline: false, title: title("layer"), tickvals: marked, ticktext: marked.map((j) => data.heat.layers[columns[j]]) });
    draw("figure-heat", traces.filter((trace) => known(trace.z.flat()).length), layout); // Plotly fails on a grid of nothing
    const element = document.getElementById("figure-heat");
    element.removeAllListeners("plotly_click");
    element.on("plotly_click", ({ points: [{ x, y }] }) => openMatrix(data.heat.roles[rows[y]], data.heat.layers[columns[x]]));
    document.getElementById("heat-caption").textContent = `${about.meaning}; unit: ${about.unit === "1" ? "none" : about.unit}. Source: ${about.source}.`;
  }
  show();
};

// Choose the first matrix of a cell wherever its curves are, and go there.
function openMatrix(role, layer) {
  ["stripes", "spectra"].forEach((part) => {
    const at = data[part].matrices.findIndex((matrix) => matrix.role === role && matrix.layer === layer), select = document.getElementById(part + "-matrix");
    if (at < 0) return;
    select.value = at;
    select.onchange();
    document.getElementById(part).scrollIntoView();
  });
}

const matrixNames = (matrices) => matrices.map((matrix, i) => [i, matrix.tensor]);

figures["figure-spectra"] = () => {
  const matrices = data.spectra.matrices, select = fillSearchable("spectra-matrix", matrixNames(matrices), show);
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
        if (curve && null_ !== null) line({ x: [curve.x[0], curve.x.at(-1)], y: [null_, null_] }, panels[side], colour, { name: name + ", a random update of its length", line: { dash: "dash", width: 1.2 } });
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
};

figures["figure-stripes"] = () => {
  const matrices = data.stripes.matrices, several = data.runs.length > 1;
  const matrix = fillSearchable("stripes-matrix", matrixNames(matrices), show);
  const run = fill("stripes-run", [...(several ? [["all", "all runs (consensus)"]] : []), ...data.runs.map((name) => ["run " + name, name])], show);

  function mean(curves) {
    const present = curves.filter((curve) => curve);
    return present.length ? { x: present[0].x, y: present[0].y.map((_, k) => present.reduce((sum, curve) => sum + curve.y[k], 0) / present.length) } : null;
  }

  function show() {
    const found = matrices[matrix.value], at = data.runs.indexOf(run.value.slice(4)), all = at < 0, traces = [];
    ["row", "column"].forEach((side, j) => {
      const rates = all ? found[side].consensus : found[side].rates[at];
      const null_ = all ? mean(found[side].nulls) : found[side].nulls[at], on = { type: "scatter", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
      if (null_) traces.push({ ...on, ...null_, mode: "lines", fill: "tozeroy", fillcolor: LINE, line: { color: RANDOM, width: 1 }, hovertemplate: `${side} %{x}: %{y:.2%}<extra>spacing null</extra>` });
      if (rates) traces.push({ ...on, ...rates, mode: "markers", marker: { size: 4, color: all ? INK : data.colours[at], opacity: 0.75 }, hovertemplate: `${side} %{x}: %{y:.2%}<extra>measured</extra>` });
    });
    const extent = (side) => { const curve = known(found[side].rates)[0]; return curve ? [0, curve.x.at(-1) + 1] : undefined; };
    draw("figure-stripes", traces, {
      height: 320, annotations: [heading("rows", middle(column(0, 2, 0.08))), heading("columns", middle(column(1, 2, 0.08)))],
      xaxis: axis({ domain: column(0, 2, 0.08), range: extent("row"), title: title("row") }), xaxis2: axis({ domain: column(1, 2, 0.08), range: extent("column"), anchor: "y2", title: title("column") }),
      yaxis: axis({ tickformat: "~%", rangemode: "tozero", title: title("entries changed") }), yaxis2: axis({ anchor: "x2", tickformat: "~%", rangemode: "tozero" }),
    });
    const text = (value) => (value === null ? "–" : value.toPrecision(3));
    const shown = all ? numbered(data.runs.length) : [at];
    document.getElementById("stripes-caption").textContent = "Dispersion over rows and columns (1 is the spacing null): " + shown.map((i) => `${shortened(data.runs[i], 26)} ${text(found.dispersion[i][0])} and ${text(found.dispersion[i][1])}`).join("; ") + ".";
  }
  show();
};

// Figures of single matrices: role by layer, singular values and angles, rows and columns.

// What a scale of colours spans: all values, but for those further from the quartiles than three times their distance.
function fences(values) {
  const sorted = [...values].sort((a, b) => a - b),
    quartile = (q) => sorted[Math.round(q * (sorted.length - 1))];
  const width = 3 * (quartile(0.75) - quartile(0.25)),
    inside = sorted.filter((value) => value >= quartile(0.25) - width && value <= quartile(0.75) + width);
  return width > 0 ? [inside[0], inside.at(-1)] : [sorted[0], sorted.at(-1)];
}

figures["figure-heat"] = () => {
  const metrics = data.heat.metrics;
  const metric = fill(
    "heat-metric",
    metrics.flatMap((about, i) => (about.listed ? [[i, about.title, about.group]] : [])),
    show,
  );
  const null_ = document.getElementById("heat-null");
  const run = fill(
    "heat-run",
    data.runs.map((name) => [name, called(name)]),
    show,
  );

  // Rows and columns in which no run has a value are left out.
  function filled(values) {
    const some = (test) =>
      values.some((cells) => cells.some((row, i) => row.some((value, j) => value !== null && test(i, j))));
    return [
      numbered(data.heat.roles.length).filter((r) => some((i) => i === r)),
      numbered(data.heat.layers.length).filter((c) => some((_, j) => j === c)),
    ];
  }

  function panel(what, values, rows, columns, y, scale) {
    const cells = values[data.runs.indexOf(run.value)],
      count = data.heat.counts;
    return {
      type: "heatmap",
      yaxis: y,
      ...scale,
      xgap: columns.length > (narrow() ? 60 : 300) ? 0 : 1, // a gap would leave nothing of narrow cells
      ygap: 1,
      hoverongaps: false,
      z: rows.map((i) => columns.map((j) => cells[i][j])),
      x: numbered(columns.length),
      y: numbered(rows.length),
      text: rows.map((i) =>
        columns.map(
          (j) =>
            `${label(data.heat.roles[i])}, layer ${data.heat.layers[j]}<br>${escaped(what)}: ${cells[i][j] === null ? "undefined" : digits(cells[i][j], 4)}${count[i][j] > 1 ? `<br>mean of ${count[i][j]} tensors` : ""}`,
        ),
      ),
      hovertemplate: "%{text}<extra></extra>",
    };
  }

  function show() {
    const index = Number(metric.value),
      about = metrics[index],
      values = data.heat.values[index];
    const [nullIndex, nullWords] = offerNulls(about),
      nulls = nullIndex === null ? [] : data.heat.values[nullIndex],
      at = data.runs.indexOf(run.value);
    const [rows, columns] = filled(values);
    const all = known([values[at], nulls[at] || []].flat(2)),
      centred = about.name.endsWith("_z"); // this run's own, so that its cells can be told apart
    if (!all.length) all.push(0);
    const [low, high] = fences(all),
      reach = Math.max(Math.abs(low), Math.abs(high), 1e-12),
      beyond = all.filter((value) => value < low || value > high);
    const flat = high - low < 1e-12 * reach;
    const scale = centred
      ? { colorscale: DIVERGING, zmin: -reach, zmax: reach }
      : { colorscale: SEQUENTIAL, zmin: flat ? low - reach / 2 : low, zmax: flat ? high + reach / 2 : high };
    const percent = about.unit === "1" && low >= 0 && Math.max(...all) <= 1 && high > 0.001;
    scale.colorbar = { thickness: 12, outlinewidth: 0, len: 1, tickformat: percent ? "~%" : "~g", nticks: 6 };
    const size = 26 * rows.length,
      gap = 54,
      height = nulls.length ? 2 * size + gap : size;
    const traces = [panel(about.title, values, rows, columns, "y", scale)];
    const ticks = {
      tickvals: numbered(rows.length),
      ticktext: rows.map((i) => label(data.heat.roles[i])),
      zeroline: false,
      showgrid: false,
      range: [rows.length - 0.5, -0.5],
    };
    const layout = {
      height: height + 90,
      annotations: [heading(known(values[at].flat()).length ? "measured" : "measured: undefined for this run", 0.5)],
      margin: { l: 80, r: 20, t: 30, b: 50 },
    };
    layout.yaxis = axis({ ...ticks, domain: nulls.length ? [(size + gap) / height, 1] : [0, 1] });
    if (nulls.length) {
      traces.push({ ...panel(`null, ${nullWords}`, nulls, rows, columns, "y2", scale), showscale: false });
      layout.yaxis2 = axis({ ...ticks, domain: [0, size / height] });
      layout.annotations.push(heading("null: " + nullWords, 0.5, size / height));
    }
    const every = Math.ceil(columns.length / (narrow() ? 8 : 24)),
      none = columns.findIndex((c) => data.heat.layers[c] === "none"),
      ticked = numbered(columns.length).filter(
        (j) => j === none || (j % every === 0 && (none < 0 || none - j >= every)),
      );
    layout.xaxis = axis({
      range: [-0.5, columns.length - 0.5],
      anchor: nulls.length ? "y2" : "y",
      showgrid: false,
      zeroline: false,
      title: title("layer"),
      tickvals: ticked,
      ticktext: ticked.map((j) => data.heat.layers[columns[j]]),
    });
    draw(
      "figure-heat",
      traces.filter((trace) => known(trace.z.flat()).length),
      layout,
      `${sentence(about.title)} of ${called(run.value)}, by role and layer: ${spanned(values[at])}${nulls.length ? `; its null, ${nullWords}: ${spanned(nulls[at])}` : ""}.`,
    ); // Plotly fails on a grid of nothing
    const element = document.getElementById("figure-heat");
    element.removeAllListeners("plotly_click");
    element.on("plotly_click", ({ points: [{ x, y }] }) =>
      openMatrix(data.heat.roles[rows[y]], data.heat.layers[columns[x]]),
    );
    document.getElementById("heat-caption").textContent =
      `${sentence(about.title)}${UNITS[about.unit] || ""}. Colours span the values of this run${nulls.length ? " and of its null" : ""}${outside(beyond)}. Source: ${about.source}.`;
    document.getElementById("heat-field").textContent = about.name;
  }
  // Which of a metric's nulls is drawn: its place and its words; a choice where there are several.
  function offerNulls({ nulls }) {
    null_.parentElement.hidden = nulls.length < 2;
    fill("heat-null", nulls, show);
    return nulls.find(([place]) => String(place) === null_.value) || [null, ""];
  }
  show();
};

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function spanned(cells) {
  const values = known(cells.flat());
  return values.length
    ? `from ${digits(Math.min(...values))} to ${digits(Math.max(...values))}, ${digits(values.reduce((sum, value) => sum + value, 0) / values.length)} on average`
    : "undefined";
}

// How many cells lie outside the scale of colours, and where.
function outside(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)].map((value) => digits(value));
  if (!values.length) return "";
  const where = low === high ? `at ${low}` : `from ${low} to ${high}`;
  return values.length === 1
    ? `, but for one cell that lies far beyond the others, ${where}`
    : `, but for ${values.length} cells that lie far beyond the others, ${where}`;
}

const UNITS = { degrees: ", in degrees", weight: ", in units of the weights" };

// Choose the first matrix of a cell wherever its curves are, and go there.
function openMatrix(role, layer) {
  ["stripes", "spectra"].forEach((part) => {
    const at = data[part].matrices.findIndex((matrix) => matrix.role === role && matrix.layer === layer),
      select = document.getElementById(part + "-matrix");
    if (at < 0) return;
    select.value = at;
    select.onchange();
    document.getElementById(part).scrollIntoView();
  });
}

const matrixNames = (matrices) => matrices.map((matrix, i) => [i, matrix.tensor]);

figures["figure-spectra"] = () => {
  const matrices = data.spectra.matrices,
    select = fillSearchable("spectra-matrix", matrixNames(matrices), show);
  function show() {
    const matrix = matrices[select.value],
      traces = [],
      { at, height } = panels(2, 446, 0.1),
      [values, turns] = [at(0), at(1)];
    const line = (curve, on, i, more) =>
      curve &&
      traces.push({
        type: "scatter",
        ...(i === null ? { mode: "lines" } : marked(i)),
        ...curve,
        ...on,
        hovertext: curve.y.map((value) => digits(value, 4)),
        line: { color: i === null ? INK : data.colours[i], width: 1.8, ...more.line },
        name: more.name,
        hovertemplate: "%{fullData.name}<br>no. %{x}: %{hovertext}<extra></extra>",
      });
    const on = {
      values: { xaxis: "x", yaxis: "y" },
      shifts: { xaxis: "x3", yaxis: "y2" },
      left: { xaxis: "x2", yaxis: "y3" },
      right: { xaxis: "x2", yaxis: "y4" },
    };
    line(matrix.base, on.values, null, { name: "base" });
    matrix.runs.forEach((run, i) => {
      const name = runLabel(data.runs[i]);
      line(run.tuned, on.values, i, { name, line: { dash: "dot" } });
      line(run.shift, on.shifts, i, { name });
      ["left", "right"].forEach((side, s) => {
        line(run[side], on[side], i, { name });
        const null_ = run.nulls[s],
          curve = run[side];
        if (curve && null_ !== null)
          line({ x: [curve.x[0], curve.x.at(-1)], y: [null_, null_] }, on[side], i, {
            name: name + ", a random update of its length",
            line: { dash: "dash", width: 1.2 },
          });
      });
    });
    const angles = Math.max(1, ...matrix.runs.map((run) => (run.left ? run.left.x.at(-1) : 1))),
      every = Math.ceil(angles / 8);
    const upper = (panel) => portion(panel.y, 0.56, 1),
      lower = (panel) => portion(panel.y, 0, 0.44);
    const last = (curves) => Math.max(1, ...known(curves).map((curve) => curve.x.at(-1))),
      extent = (curves) => [0.5, last(curves) + 0.5];
    const says = listed(
      data.runs.map((name) => called(name)),
      matrix.runs.map(({ left }) => (left ? `${digits(Math.max(...known(left.y)))}\u00b0` : "undefined")),
    );
    draw(
      "figure-spectra",
      traces,
      {
        height: height + 74,
        margin: { l: 60, r: 20, t: 30, b: 44 },
        annotations: [
          heading("singular values", middle(values.x), values.y[1]),
          heading("shift: tuned − base", middle(values.x), lower(values)[1]),
          heading("principal angles, left", middle(turns.x), turns.y[1]),
          heading("principal angles, right", middle(turns.x), lower(turns)[1]),
        ],
        xaxis: axis({
          domain: values.x,
          anchor: "y",
          range: extent([matrix.base, ...matrix.runs.map((run) => run.tuned)]),
        }),
        xaxis3: axis({
          domain: values.x,
          anchor: "y2",
          range: extent(matrix.runs.map((run) => run.shift)),
          title: title("singular value, no."),
        }),
        xaxis2: axis({ domain: turns.x, anchor: "y4", tick0: 1, dtick: every, title: title("angle, no.") }),
        yaxis: axis({ domain: upper(values), type: "log", dtick: "D2", tickformat: "~g", tickfont: { size: 11 } }),
        yaxis2: axis({ domain: lower(values), anchor: "x3", tickformat: "~g", nticks: 6 }),
        yaxis3: axis({ domain: upper(turns), anchor: "x2", ticksuffix: "°", rangemode: "tozero" }),
        yaxis4: axis({ domain: lower(turns), anchor: "x2", ticksuffix: "°", rangemode: "tozero" }),
      },
      `Singular values, their shifts and the principal angles of ${matrix.tensor}; largest left angle: ${says}.`,
    );
  }
  show();
};

figures["figure-stripes"] = () => {
  const matrices = data.stripes.matrices,
    several = data.runs.length > 1;
  const matrix = fillSearchable("stripes-matrix", matrixNames(matrices), show);
  const run = fill(
    "stripes-run",
    [
      ...(several ? [["all", "mean of the runs shown"]] : []),
      ...data.runs.map((name) => ["run " + name, called(name)]),
    ],
    show,
  );

  // Over the same runs for a measurement and its null: those that are shown and have both, or all of them where none has a null.
  function mean(curves, among) {
    const present = curves.filter((curve, i) => curve && among[i]);
    return present.length
      ? {
          x: present[0].x,
          y: present[0].y.map((_, k) => present.reduce((sum, curve) => sum + curve.y[k], 0) / present.length),
        }
      : null;
  }

  function show() {
    const found = matrices[matrix.value],
      at = data.runs.indexOf(run.value.slice(4)),
      all = at < 0,
      traces = [],
      { at: panel, height } = panels(2, 246, 0.08),
      [rows, columns] = [panel(0), panel(1)];
    ["row", "column"].forEach((side, j) => {
      const { rates: measured, nulls } = found[side],
        both = measured.map((curve, i) => Boolean(curve && nulls[i])),
        among = both.includes(true) ? both : measured.map(Boolean);
      const rates = all ? mean(measured, among) : measured[at];
      const null_ = all ? mean(nulls, among) : nulls[at],
        on = { type: "scatter", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
      if (null_)
        traces.push({
          ...on,
          ...null_,
          mode: "lines",
          fill: "tozeroy",
          fillcolor: LINE,
          line: { color: RANDOM, width: 1 },
          hovertemplate: `${side} %{x}: %{y:.2%}<extra>spacing null</extra>`,
        });
      if (rates)
        traces.push({
          ...on,
          ...rates,
          mode: "markers",
          marker: { size: 4, color: all ? INK : data.colours[at], opacity: 0.75 },
          hovertemplate: `${side} %{x}: %{y:.2%}<extra>measured</extra>`,
        });
    });
    const extent = (side) => {
      const curve = known(found[side].rates)[0];
      return curve ? [0, curve.x.at(-1) + 1] : undefined;
    };
    const text = (value) => digits(value);
    const shown = all ? numbered(data.runs.length) : [at];
    const says = `Dispersion over rows and columns (1 is the spacing null): ${shown
      .map((i) => `${called(data.runs[i])} ${text(found.dispersion[i][0])} and ${text(found.dispersion[i][1])}`)
      .join("; ")}.`;
    document.getElementById("stripes-caption").textContent = says;
    draw(
      "figure-stripes",
      traces,
      {
        height: height + 74,
        annotations: [heading("rows", middle(rows.x), rows.y[1]), heading("columns", middle(columns.x), columns.y[1])],
        xaxis: axis({ domain: rows.x, anchor: "y", range: extent("row"), title: title("row") }),
        xaxis2: axis({ domain: columns.x, range: extent("column"), anchor: "y2", title: title("column") }),
        yaxis: axis({ domain: rows.y, tickformat: "~%", rangemode: "tozero", title: title("entries changed") }),
        yaxis2: axis({ domain: columns.y, anchor: "x2", tickformat: "~%", rangemode: "tozero" }),
      },
      `${found.tensor}: ${says}`,
    );
  }
  show();
};

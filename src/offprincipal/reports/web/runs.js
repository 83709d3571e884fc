// Figures of whole runs: how they were trained, where their changes fell, and which they share.

// Intervals around a value of each, as Plotly's error bars.
const intervals = (found, value) => ({
  type: "data",
  symmetric: false,
  array: found.map((each) => each.high - each[value]),
  arrayminus: found.map((each) => each[value] - each.low),
  color: INK,
});

figures["figure-training"] = () => {
  const traces = [],
    runs = data.training.filter((run) => known([run.before.sampled_accuracy, run.after.sampled_accuracy]).length),
    rows = numbered(runs.length);
  runs.forEach((run, i) => {
    const before = run.before.sampled_accuracy,
      after = run.after.sampled_accuracy;
    const error = run.after.sampled_accuracy_se;
    const interval =
      known([error, after]).length === 2
        ? { type: "data", array: [1.96 * error], color: run.colour, thickness: 1.5, width: 4 }
        : undefined;
    const common = {
      type: "scatter",
      name: runLabel(run.name),
      hovertemplate: "%{fullData.name}<br>%{x:.1%}<extra>%{meta}</extra>",
    };
    traces.push({
      ...common,
      mode: "lines",
      x: [before, after],
      y: [i, i],
      line: { color: light(run.colour), width: 4 },
      hoverinfo: "skip",
      hovertemplate: undefined,
    });
    traces.push({
      ...common,
      meta: "before",
      mode: "markers",
      x: [before],
      y: [i],
      marker: { size: 11, color: GROUND, line: { color: run.colour, width: 2 } },
    });
    traces.push({
      ...common,
      meta: "after",
      mode: "markers",
      x: [after],
      y: [i],
      error_x: interval,
      marker: { size: 11, color: run.colour },
    });
  });
  const some = runs.some((run) => run.before.sampled_accuracy > 0 || run.after.sampled_accuracy > 0);
  draw(
    "figure-training",
    traces,
    {
      height: 70 + 34 * runs.length,
      margin: { l: 50, r: 20, t: 8, b: 44 },
      xaxis: axis({
        tickformat: ".0%",
        ...(some ? { rangemode: "normal" } : { range: [-0.02, 1] }),
        title: title("sampled accuracy on held-out prompts"),
      }),
      yaxis: axis({
        tickvals: rows,
        ticktext: runs.map((run) => runLabel(run.name)),
        range: [runs.length - 0.5, -0.5],
        zeroline: false,
      }),
    },
    `Sampled accuracy before and after training: ${listed(
      runs.map((run) => called(run.name)),
      runs.map((run) => `${inPercent(run.before.sampled_accuracy)} to ${inPercent(run.after.sampled_accuracy)}`),
    )}.`,
  );
};

figures["figure-anatomy"] = () => {
  const masks = data.anatomy,
    parts = data.anatomy_parts,
    rows = numbered(data.runs.length),
    traces = [],
    layout = { annotations: [], barmode: "relative", bargap: 0.3 };
  const all = masks.flatMap((mask) => mask.runs),
    sum = (values) => values.reduce((total, value) => total + value, 0);
  const ends = all.flatMap((run) =>
    [1, -1].map((sign) => sum(known(run.parts).filter((value) => value * sign > 0)) * sign),
  ); // of the bars to either side
  const reach = 1.08 * Math.max(1, ...ends),
    { at, height } = panels(masks.length, 22 + 34 * data.runs.length);
  masks.forEach((mask, j) => {
    const panel = at(j),
      on = {
        orientation: "h",
        xaxis: "x" + suffix(j),
        yaxis: "y" + suffix(j),
        y: rows,
        customdata: data.runs.map(runLabel),
      };
    parts.forEach(([part, colour], k) =>
      traces.push({
        ...on,
        type: "bar",
        x: mask.runs.map((run) => run.parts[k]),
        marker: { color: colour },
        hovertext: mask.runs.map((run) => (run.parts[k] === null ? "" : signed(run.parts[k]))),
        hovertemplate: `%{customdata}<br>${part}: %{hovertext} points<extra></extra>`,
      }),
    );
    traces.push({
      ...on,
      type: "scatter",
      mode: "markers",
      x: mask.runs.map((run) => run.measured),
      marker: { symbol: "line-ns", size: 20, line: { color: INK, width: 2.5 } },
      hovertext: mask.runs.map((run) => (run.measured === null ? "" : signed(run.measured))),
      hovertemplate: "%{customdata}<br>measured: %{hovertext} points beyond chance<extra></extra>",
    });
    layout["xaxis" + suffix(j)] = axis({
      domain: panel.x,
      anchor: "y" + suffix(j),
      range: [-reach, reach],
      zerolinewidth: 1.5,
      tickformat: "~g",
      nticks: 6,
      title: title("points beyond chance"),
    });
    layout["yaxis" + suffix(j)] = ofRuns(data.runs, panel, rows, "x" + suffix(j));
    layout.annotations.push(heading(mask.title, middle(panel.x), panel.y[1]));
  });
  const drawn = parts.filter((_, k) => k < parts.length - 1 || all.some((run) => run.parts[k] !== null)); // of what is not told apart only where there is such
  legend("anatomy-legend", [...drawn.map(([part, colour]) => ["", part, colour]), ["tick", "measured", ""]]);
  const says = masks.map(
    (mask) =>
      `How far the share of changed entries on ${mask.title} is from chance, in points: ${listed(
        data.runs.map((run) => called(run)),
        mask.runs.map((run) => (run.measured === null ? "undefined" : signed(run.measured))),
      )}.`,
  );
  draw("figure-anatomy", traces, { ...layout, height: height + 74 }, says.join(" "));
};

figures["figure-overlaps"] = () => {
  const masks = data.overlaps,
    rows = numbered(data.runs.length),
    traces = [],
    layout = { annotations: [], barmode: "group", bargap: 0.28, bargroupgap: 0.08 },
    rounded = masks.some((mask) => mask.runs.some((run) => run.rounding !== null));
  const { at, height } = panels(masks.length, 6 + 66 * data.runs.length);
  masks.forEach((mask, j) => {
    const panel = at(j),
      defined = rows.filter((i) => mask.runs[i].value !== null),
      on = { type: "bar", orientation: "h", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j), y: defined };
    const shown = defined.map((i) => mask.runs[i]),
      colours = defined.map((i) => data.colours[i]);
    const hover = (what) => `%{customdata}<br>${what} %{x:.2%}<extra></extra>`,
      customdata = defined.map((i) => runLabel(data.runs[i]));
    const error = { ...intervals(shown, "value"), thickness: 1, width: 3 };
    traces.push({
      ...on,
      customdata,
      x: shown.map((run) => run.random),
      marker: { color: RANDOM },
      hovertemplate: hover("chance"),
    });
    if (rounded)
      traces.push({
        ...on,
        customdata,
        x: shown.map((run) => run.rounding),
        hovertemplate: hover("rounding alone"),
        marker: {
          color: GROUND,
          line: { color: colours, width: 1 },
          pattern: { shape: "/", bgcolor: GROUND, fgcolor: colours, size: 5, solidity: 0.25 },
        },
      });
    traces.push({
      ...on,
      customdata,
      x: shown.map((run) => run.value),
      marker: { color: colours },
      error_x: error,
      hovertemplate: hover("measured"),
    });
    layout["xaxis" + suffix(j)] = axis({
      domain: panel.x,
      anchor: "y" + suffix(j),
      range: [0, 1.04],
      tickformat: ".0%",
      tickvals: [0, 0.5, 1],
    });
    layout["yaxis" + suffix(j)] = ofRuns(data.runs, panel, rows, "x" + suffix(j));
    layout.annotations.push(heading(mask.title, middle(panel.x), panel.y[1]));
  });
  const says = masks.map(
    (mask) =>
      `Share of the changed entries on ${mask.title}: ${listed(
        data.runs.map((run) => called(run)),
        mask.runs.map((run) => `${inPercent(run.value)} (rounding alone ${inPercent(run.rounding)})`),
      )}.`,
  );
  draw("figure-overlaps", traces, { ...layout, height: height + 74 }, says.join(" "));
};

// Percentage points; undefined where the rounding null is.
const beyondRounding = (run) =>
  run.overlap.map((value, k) =>
    value === null || run.overlap_rounding_null[k] === null ? null : 100 * (value - run.overlap_rounding_null[k]),
  );

figures["figure-sweep"] = () => {
  const masks = data.sweep,
    traces = [],
    layout = { annotations: [] },
    beyond = masks.map((mask) => mask.runs.flatMap((run) => known(beyondRounding(run)).map(Math.abs))),
    both = beyond.some((values) => values.length),
    reach = Math.max(1, ...beyond.flat()) * 1.1, // never zoomed further than one point, so that nothing tiny looks large
    { at, height } = panels(masks.length, both ? 386 : 206);
  masks.forEach((mask, j) => {
    const panel = at(j),
      below_too = beyond[j].length > 0,
      x = "x" + suffix(j),
      above = "y" + suffix(j),
      below = "y" + suffix(j + masks.length);
    mask.runs.forEach((run, i) => {
      const line = { x: run.alpha, xaxis: x, yaxis: above, type: "scatter", name: runLabel(data.runs[i]) };
      const hover = (what, format) => `%{fullData.name}<br>density %{x:.0%}, ${what} ${format}<extra></extra>`,
        colour = data.colours[i];
      const own = {
        mode: "lines+markers",
        marker: { symbol: data.symbols[i], size: data.symbols[i] === "circle" ? 5 : 8 },
        line: { color: colour, width: 2 },
      };
      traces.push({
        ...line,
        y: run.overlap_random,
        mode: "lines",
        line: { color: PRECISION, dash: "dot", width: 1.5 },
        hovertemplate: hover("chance", "%{y:.2%}"),
      });
      traces.push({ ...line, ...own, y: run.overlap, hovertemplate: hover("measured", "%{y:.2%}") });
      traces.push({
        ...line,
        ...marked(i),
        y: run.overlap_rounding_null,
        line: { color: colour, dash: "dash", width: 2 },
        opacity: 0.6,
        hovertemplate: hover("rounding", "%{y:.2%}"),
      });
      if (below_too)
        traces.push({
          ...line,
          ...own,
          y: beyondRounding(run),
          yaxis: below,
          hovertext: beyondRounding(run).map((value) => (value === null ? "" : signed(value))),
          hovertemplate: hover("beyond rounding", "%{hovertext} points"),
        });
    });
    layout["xaxis" + suffix(j)] = axis({
      domain: panel.x,
      anchor: below_too ? below : above,
      tickformat: ".0%",
      range: [0, 0.53],
      tickvals: [0.1, 0.3, 0.5],
      title: title("density of the mask"),
    });
    layout["yaxis" + suffix(j)] = axis({
      domain: both ? portion(panel.y, 0.47, 1) : panel.y,
      anchor: x,
      tickformat: ".0%",
      range: [-0.03, 1.05],
      title: panel.first ? title("overlap") : undefined,
    });
    if (below_too)
      layout["yaxis" + suffix(j + masks.length)] = axis({
        domain: portion(panel.y, 0, 0.37),
        anchor: x,
        zerolinewidth: 1.5,
        nticks: 5,
        range: [-reach, reach],
        title: panel.first ? title("beyond rounding, points") : undefined,
      });
    layout.annotations.push(heading(mask.title, middle(panel.x), panel.y[1]));
  });
  const ends = (run) => `${inPercent(run.overlap.at(0))} to ${inPercent(run.overlap.at(-1))}`;
  const says = masks.map(
    (mask) =>
      `Share of the changed entries on ${mask.title}, from the smallest mask to the largest: ${listed(
        data.runs.map((run) => called(run)),
        mask.runs.map(ends),
      )}.`,
  );
  draw("figure-sweep", traces, { ...layout, height: height + 74 }, says.join(" "));
};

const MOST_PAIRS = 30; // that are drawn unasked

// How far the agreement of two runs is from what margins explain of it; last where that is unknown.
const departure = (pair) =>
  pair.jaccard_margin_null === null ? -1 : Math.abs(pair.jaccard - pair.jaccard_margin_null);

figures["figure-pairs"] = () => {
  const every = data.pairs.filter((pair) => pair.jaccard !== null),
    furthest = [...every].sort((a, b) => departure(b) - departure(a)).slice(0, MOST_PAIRS),
    many = every.length > MOST_PAIRS;
  const select = fill(
    "pairs-shown",
    [
      ["furthest", `the ${MOST_PAIRS} furthest from the margin null`],
      ["all", `all ${every.length}`],
    ],
    () => drawPairs(every, select.value === "all" ? every : furthest),
  );
  select.closest(".controls").hidden = !many;
  drawPairs(every, many && select.value === "furthest" ? furthest : every);
};

function drawPairs(every, shown) {
  const rows = numbered(shown.length);
  document.getElementById("pairs-caption").textContent =
    shown.length < every.length
      ? `Of ${every.length} pairs of runs, the ${shown.length} whose agreement is furthest from the margin null, the furthest first.`
      : "";
  const names = shown.map((pair) => `${runLabel(pair.run_a)}${narrow() ? "<br>" : " · "}${runLabel(pair.run_b)}`);
  const dots = (key, what, marker, more) => ({
    type: "scatter",
    mode: "markers",
    x: shown.map((pair) => pair[key]),
    y: rows,
    customdata: names,
    marker,
    hovertemplate: `%{customdata}<br>${what} %{x:.4f}<extra></extra>`,
    ...more,
  });
  const interval = { ...intervals(shown, "jaccard"), thickness: 1.2, width: 4 };
  const traces = [
    dots("jaccard_random", "chance", { size: 11, color: RANDOM }),
    dots("jaccard_rounding_null", "rounding alone", {
      size: 16,
      color: "rgba(255,255,255,0)",
      line: { color: PRECISION, width: 2 },
    }),
    dots("jaccard_margin_null", "margins", { symbol: "line-ns", size: 14, line: { color: PRECISION, width: 2 } }),
    dots("jaccard", "measured", { size: 8, color: INK }, { error_x: interval }),
  ];
  const says = `Measured agreement and the margin null of ${shown.length === 1 ? "a pair" : shown.length + " pairs"} of runs: ${listed(
    shown.map((pair) => `${called(pair.run_a)} and ${called(pair.run_b)}`),
    shown.map((pair) => `${digits(pair.jaccard)} beside ${digits(pair.jaccard_margin_null)}`),
  )}.`;
  draw(
    "figure-pairs",
    traces,
    {
      height: 80 + (narrow() ? 40 : 30) * Math.max(shown.length, 1),
      margin: { l: 50, r: 20, t: 8, b: 44 },
      xaxis: axis({ range: [-0.02, 1.02], title: title("Jaccard index of the changed entries") }),
      yaxis: axis({ tickvals: rows, ticktext: names, range: [shown.length - 0.5, -0.5], zeroline: false }),
    },
    says,
  );
}

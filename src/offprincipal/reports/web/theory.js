// Figures of the claims about the theory, C7 to C10.

figures["figure-agreement"] = () => {
  const found = data.theory.agreement,
    traces = [],
    layout = { annotations: [] },
    { at, height } = panels(found.length, 286, 0.08);
  found.forEach((panel, j) => {
    const domain = at(j).x,
      on = { type: "scatter", mode: "markers", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
    const both = (layer) => panel.points.filter((point) => point.layer === layer).length > 1;
    const place = (point) => point.layer + (both(point.layer) ? (point.touched ? -0.16 : 0.16) : 0);
    const dots = (points, key, what, marker) =>
      traces.push({
        ...on,
        x: points.map(place),
        y: points.map((point) => point[key]),
        marker,
        customdata: points.map(
          (point) => `layer ${point.layer}, ${point.matrices} ${point.touched ? "intervened" : "untouched"}`,
        ),
        hovertemplate: `%{customdata}<br>${what} %{y:.4f}<extra></extra>`,
      });
    dots(panel.points, "random", "chance", { size: 10, color: RANDOM });
    dots(panel.points, "spacing", "spacing null", {
      size: 15,
      color: "rgba(255,255,255,0)",
      line: { color: PRECISION, width: 2 },
    });
    dots(
      panel.points.filter((point) => point.touched),
      "undone",
      "brought back",
      { size: 10, symbol: "diamond-open", color: "#c24d52", line: { width: 2 } },
    );
    dots(
      panel.points.filter((point) => point.touched),
      "measured",
      "as trained",
      { size: 8, color: "#c24d52" },
    );
    dots(
      panel.points.filter((point) => !point.touched),
      "measured",
      "as trained",
      { size: 8, color: INK },
    );
    layout["xaxis" + suffix(j)] = axis({
      domain,
      anchor: "y" + suffix(j),
      dtick: 1,
      zeroline: false,
      title: title("layer"),
    });
    layout["yaxis" + suffix(j)] = axis({
      domain: at(j).y,
      anchor: "x" + suffix(j),
      zeroline: false,
      title: at(j).first ? title("Jaccard index") : undefined,
      ...(j ? { matches: "y" } : {}),
    });
    layout.annotations.push(heading(label(panel.title), middle(domain), at(j).y[1]));
  });
  const mean = ({ points }, touched) =>
    digits(meanOf(known(points.filter((point) => point.touched === touched).map((point) => point.measured))));
  const says = listed(
    found.map((panel) => panel.title),
    found.map((panel) => `${mean(panel, true)} in intervened matrices, ${mean(panel, false)} in untouched ones`),
  );
  draw("figure-agreement", traces, { ...layout, height: height + 74 }, `Jaccard index, mean over layers: ${says}.`);
};

figures["figure-precision"] = () => {
  const runs = data.theory.precision,
    colours = ["#3b6fb6", "#3f9a6c", INK, "#c24d52"];
  const select = fill(
    "precision-run",
    runs.map((run, i) => [i, called(run.run)]),
    show,
  );
  legend(
    "precision-legend",
    runs[0].formats.map((format, i) => ["", format.title, colours[i]]),
  );
  function show() {
    const run = runs[select.value],
      traces = [],
      { at, height } = panels(2, 286, 0.1),
      [left, right] = [at(0), at(1)],
      inPoints = (value) => `${signed(value)} points`,
      points = (values) => values.map((value) => (value === null ? null : 100 * value));
    run.formats.forEach((format, i) => {
      const line = (y, on, more, what, text) =>
        traces.push({
          type: "scatter",
          mode: "lines+markers",
          x: format.step,
          y,
          ...on,
          marker: { size: 5 },
          line: { color: colours[i], width: 2, ...more },
          name: format.title,
          hovertext: y.map((value) => (value === null ? "" : text(value))),
          hovertemplate: `%{fullData.name}<br>%{x} times the step, ${what} %{hovertext}<extra></extra>`,
        });
      line(format.unchanged, { xaxis: "x", yaxis: "y" }, {}, "unchanged", inPercent);
      line(points(format.bias), { xaxis: "x2", yaxis: "y2" }, {}, "beyond chance", inPoints);
      line(points(format.beyond), { xaxis: "x2", yaxis: "y2" }, { dash: "dash" }, "beyond rounding", inPoints);
      if (format.title === "float32")
        line(points(format.by_size), { xaxis: "x2", yaxis: "y2" }, { dash: "dot" }, "by size, beyond chance", inPoints);
    });
    const steps = run.formats[0].step,
      text = steps.map((step) => (step < 1 ? "1/" + 1 / step : String(step))),
      x = { type: "log", tickvals: steps, ticktext: text, title: title("times the step"), zeroline: false };
    draw(
      "figure-precision",
      traces,
      {
        height: height + 74,
        annotations: [
          heading("unchanged", middle(left.x), left.y[1]),
          heading("on principal weights, points", middle(right.x), right.y[1]),
        ],
        xaxis: axis({ ...x, domain: left.x, anchor: "y" }),
        xaxis2: axis({ ...x, domain: right.x, anchor: "y2" }),
        yaxis: axis({ domain: left.y, tickformat: ".0%", range: [-0.03, 1.03] }),
        yaxis2: axis({ domain: right.y, anchor: "x2", zerolinewidth: 1.5 }),
      },
      `Unchanged weights of ${called(run.run)}, from the shortest update to the longest: ${listed(
        run.formats.map((format) => format.title),
        run.formats.map((format) => `${inPercent(format.unchanged[0])} to ${inPercent(format.unchanged.at(-1))}`),
      )}.`,
    );
    stepsIn(data.theory.steps[select.value]);
  }
  show();
};

function stepsIn(run) {
  const x = numbered(run.measured.length),
    ticks = x.map((i) =>
      i === 0
        ? "none"
        : i === 1
          ? "<1/4096"
          : i === x.length - 1
            ? "≥16"
            : i % 2 === 0
              ? i - 14 < 0
                ? "1/" + 2 ** (14 - i)
                : String(2 ** (i - 14))
              : "",
    );
  const hover = (what) => `%{y:.2%}<extra>${what}</extra>`;
  const percent = (value) => (100 * value).toFixed(1) + " %";
  const says = `${called(run.run)}: bfloat16 hides ${percent(run.hidden.value)} of the entries' moves; of a Gaussian update's it would hide ${percent(run.hidden.gaussian_null)}, of the same steps dealt out at random ${percent(run.hidden.permuted_null)}.`;
  document.getElementById("steps-caption").textContent = says;
  draw(
    "figure-steps",
    [
      { type: "bar", x, y: run.measured, marker: { color: RANDOM }, hovertemplate: hover("measured") },
      {
        type: "scatter",
        mode: "lines",
        x,
        y: run.permuted,
        line: { color: INK, width: 2, shape: "hvh" },
        hovertemplate: hover("dealt out at random"),
      },
      {
        type: "scatter",
        mode: "lines",
        x,
        y: run.gaussian,
        line: { color: INK, width: 1.5, dash: "dash", shape: "hvh" },
        hovertemplate: hover("Gaussian"),
      },
    ],
    {
      height: 260,
      bargap: 0.1,
      xaxis: axis({ tickvals: x, ticktext: ticks, title: title("step over spacing, from") }),
      yaxis: axis({ tickformat: "~%", title: title("entries") }),
    },
    says,
  );
}

figures["figure-kl"] = () => {
  const traces = [],
    { at, height } = panels(3, 266, 0.08);
  data.theory.kl.forEach((run) => {
    const line = (y, on, what) =>
      traces.push({
        type: "scatter",
        ...markedBy(symbolOf(run.run)),
        x: run.step,
        y,
        ...on,
        line: { color: colourOf(run.run), width: 2 },
        name: runLabel(run.run),
        hovertemplate: `%{fullData.name}<br>step %{x}, ${what} %{y:.3~g}<extra></extra>`,
      });
    line(run.kl_step, { xaxis: "x", yaxis: "y" }, "KL of the step");
    line(run.kl_cumulative, { xaxis: "x2", yaxis: "y2" }, "KL from the base");
    line(
      run.kl_cumulative.map((value, i) => (run.length[i] ? value / run.length[i] ** 2 : null)),
      { xaxis: "x3", yaxis: "y3" },
      "KL over squared length",
    );
  });
  draw(
    "figure-kl",
    traces,
    {
      height: height + 74,
      annotations: ["of each step, nats", "from the base, nats", "over squared length"].map((what, j) =>
        heading(what, middle(at(j).x), at(j).y[1]),
      ),
      ...Object.fromEntries(
        numbered(3).flatMap((j) => [
          ["xaxis" + suffix(j), axis({ domain: at(j).x, anchor: "y" + suffix(j), title: title("step") })],
          [
            "yaxis" + suffix(j),
            axis({ domain: at(j).y, anchor: "x" + suffix(j), type: "log", tickformat: "~g", dtick: 1 }),
          ],
        ]),
      ),
    },
    `KL from the base after the last step, in nats per token: ${listed(
      data.theory.kl.map((run) => called(run.run)),
      data.theory.kl.map((run) => digits(run.kl_cumulative.at(-1))),
    )}.`,
  );
};

figures["figure-bounds"] = () => {
  const found = data.theory.bounds,
    traces = [],
    layout = { annotations: [] },
    rows = numbered(found.runs.length),
    { at, height } = panels(found.bounds.length, 16 + 54 * rows.length, 0.04);
  found.bounds.forEach((bound, j) => {
    const panel = at(j),
      on = { xaxis: "x" + suffix(j), yaxis: "y" + suffix(j), type: "scatter", mode: "markers" };
    bound.runs.forEach((values, i) => {
      const colour = colourOf(found.runs[i]),
        mean = values.reduce((sum, value) => sum + value, 0) / values.length;
      traces.push({
        ...on,
        x: values,
        y: values.map((_, k) => i + 0.5 * (((k * 0.618) % 1) - 0.5)),
        marker: { size: 5, color: colour, opacity: 0.5 },
        name: runLabel(found.runs[i]),
        hovertemplate: "%{fullData.name}<br>%{x:.3f}<extra></extra>",
      });
      if (values.length)
        traces.push({
          ...on,
          x: [mean],
          y: [i],
          marker: { symbol: "line-ns", size: 22, line: { color: INK, width: 2.5 } },
          name: runLabel(found.runs[i]),
          hovertemplate: "%{fullData.name}<br>mean %{x:.3f}<extra></extra>",
        });
    });
    layout["xaxis" + suffix(j)] = axis({
      domain: panel.x,
      anchor: "y" + suffix(j),
      range: [-0.03, 1.05],
      tickvals: [0, 0.5, 1],
      zeroline: false,
    });
    layout["yaxis" + suffix(j)] = ofRuns(found.runs, panel, rows, "x" + suffix(j));
    layout.annotations.push(heading(bound.title, middle(panel.x), panel.y[1]));
  });
  const says = found.bounds.map(
    (bound) =>
      `${bound.title}, mean over matrices: ${listed(
        found.runs.map((run) => called(run)),
        bound.runs.map((values) => (values.length ? digits(meanOf(values)) : "undefined")),
      )}.`,
  );
  draw(
    "figure-bounds",
    traces,
    { ...layout, height: height + 74 },
    `Share of each bound that is used. ${says.join(" ")}`,
  );
};

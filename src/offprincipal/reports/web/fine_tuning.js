// Figures of the claims about fine-tuning methods, C11 and C12.

const METHOD_COLOURS = [
  "#3b6fb6",
  "#d9772b",
  "#3f9a6c",
  "#a855a0",
  "#b8932c",
  "#4aa3b8",
  "#7a6f5d",
  "#6d62c4",
  "#8a9a3b",
];
const MASK_COLOURS = {
  safe: "#6fa0dc",
  principal: "#c24d52",
  random: "#3f9a6c",
  off_principal: "#a855a0",
  low_magnitude: "#b8932c",
};

// Of accuracies: at least four points, so that nothing tiny looks large.
function rangeOf(values) {
  const low = Math.min(...known(values)),
    high = Math.max(...known(values)),
    room = Math.max(0.06 * (high - low), 0.02 - (high - low) / 2);
  return [Math.max(low - room, -0.02), high + room];
}

const maskDensity = (found) => (found.density === null ? ", its own density" : `, density ${found.density}`);
const maskNamed = (found, named) =>
  found.mask === "full"
    ? "full fine-tuning"
    : found.density === 1
      ? "all projections"
      : named(found.mask.replace(/_/g, " ")) + maskDensity(found);
const maskTitle = (found) => maskNamed(found, (mask) => label(mask, 18));
const maskColour = (found) =>
  found.density === 1
    ? INK
    : found.mask === "safe" && found.density === null
      ? "#1d4f8c"
      : MASK_COLOURS[found.mask] || (found.mask === "full" ? PRECISION : METHOD_COLOURS[6]);
const percentOf = (value) => (100 * value).toFixed(value < 0.0995 ? 1 : 0) + " %";

figures["figure-masks"] = () => {
  const [full, ...others] = data.fine_tuning.masks.masks,
    traces = [],
    layout = { annotations: [] };
  const wide = Math.min(others.length, 4),
    { at, height } = grid(Math.ceil(others.length / 4), wide, 200, 0.05, 104);
  others.forEach((found, j) => {
    const panel = at(Math.floor(j / 4), j % 4),
      on = { type: "scatter", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
    const mode = (steps) => (steps.length > 1 ? "lines" : "markers"); // one point alone makes no line
    const curves = (of, thin, thick, whose) => {
      of.runs.forEach((run) =>
        traces.push({
          ...on,
          mode: mode(run.step),
          x: run.step,
          y: run.kl,
          marker: { color: thin, size: 6 },
          line: { color: thin, width: 1 },
          hovertemplate: `${whose}, seed ${run.seed}<br>step %{x}: %{y:.3~g}<extra></extra>`,
        }),
      );
      traces.push({
        ...on,
        mode: mode(of.mean.step),
        x: of.mean.step,
        y: of.mean.kl,
        marker: { color: thick, size: 9 },
        line: { color: thick, width: 3 },
        hovertemplate: `${whose}, mean over seeds<br>step %{x}: %{y:.3~g}<extra></extra>`,
      });
    };
    curves(full, "#c9ced6", "#a3abb7", "full fine-tuning");
    curves(found, maskColour(found) + "88", maskColour(found), maskTitle(found));
    layout["xaxis" + suffix(j)] = axis({
      domain: panel.x,
      anchor: "y" + suffix(j),
      rangemode: "tozero",
      title: title("step"),
    });
    layout["yaxis" + suffix(j)] = axis({
      domain: panel.y,
      anchor: "x" + suffix(j),
      rangemode: "tozero",
      tickformat: "~g",
      nticks: 6,
      showticklabels: panel.first,
      title: panel.first ? title("KL from the base, nats") : undefined,
      ...(j ? { matches: "y" } : {}),
    });
    layout.annotations.push(
      heading(
        `${maskTitle(found)}<br><span style="font-size:11px">trains ${percentOf(found.trained)} of the weights</span>`,
        middle(panel.x),
        panel.y[1],
      ),
    );
  });
  legend("masks-legend", [
    ["solid", "full fine-tuning", "#a3abb7"],
    ...others.map((found) => ["", plainTitle(found), maskColour(found)]),
  ]);
  const lastOf = (found) => digits(found.mean.kl.at(-1));
  draw(
    "figure-masks",
    traces,
    { ...layout, height: height + 110, margin: { l: 60, r: 20, t: 56, b: 50 } },
    `KL per token from the base at the last step, mean over seeds: ${listed([full, ...others].map(plainTitle), [full, ...others].map(lastOf))}.`,
  );
};

// Where text is set as text, a name needs no escaping.
const plainTitle = (found) => maskNamed(found, (mask) => shortened(mask, 26));

figures["figure-mask-seeds"] = () => {
  const { masks: found, other_seeds: between, base } = data.fine_tuning.masks,
    traces = [],
    { at, height } = panels(2, 22 + 54 * data.fine_tuning.masks.masks.length),
    [left, right] = [at(0), at(1)];
  const spread = (k, count) => (count > 1 ? 0.5 * (k / (count - 1) - 0.5) : 0);
  const points = (i, values, texts, on, colour, what, form, open) => {
    const shown = numbered(values.length).filter((k) => values[k] !== null),
      mean = shown.reduce((sum, k) => sum + values[k], 0) / shown.length;
    if (shown.length)
      traces.push({
        type: "scatter",
        mode: "lines",
        x: [mean, mean],
        y: [i - 0.34, i + 0.34],
        ...on,
        line: { color: colour, width: 2 },
        opacity: 0.6,
        hovertemplate: `mean: %{x:${form}}<extra></extra>`,
      });
    traces.push({
      type: "scatter",
      mode: "markers",
      x: shown.map((k) => values[k]),
      y: shown.map((k) => i + spread(k, values.length)),
      customdata: shown.map((k) => texts[k]),
      ...on,
      marker: { size: 9, color: open ? GROUND : colour, line: { color: colour, width: open ? 1.5 : 0 } },
      hovertemplate: `%{customdata}<br>${what} %{x:${form}}<extra></extra>`,
    });
  };
  const named = (panel, anchor) =>
    axis({
      domain: panel.y,
      anchor,
      showticklabels: panel.first,
      tickvals: numbered(found.length),
      ticktext: found.map(
        (of) => `${maskTitle(of)}<br><span style="font-size:11px">trains ${percentOf(of.trained)}</span>`,
      ),
      range: [found.length - 0.5, -0.5],
      zeroline: false,
    });
  found.forEach((of, i) => {
    const seeds = of.runs.map((run) => `${maskTitle(of)}, seed ${run.seed}`),
      colour = maskColour(of);
    if (of.mask !== "full")
      points(
        i,
        of.runs.map((run) => run.area),
        seeds,
        { xaxis: "x", yaxis: "y" },
        colour,
        "distance",
        ".3~g",
      );
    points(
      i,
      of.runs.map((run) => run.accuracy),
      seeds,
      { xaxis: "x2", yaxis: "y2" },
      colour,
      "accuracy",
      ".1%",
    );
  });
  points(
    0,
    between,
    between.map(() => "two full runs of different seeds"),
    { xaxis: "x", yaxis: "y" },
    PRECISION,
    "distance",
    ".3~g",
    true,
  );
  const says = listed(
    found.map(plainTitle),
    found.map((of) => inPercent(meanOf(known(of.runs.map((run) => run.accuracy))))),
  );
  draw(
    "figure-mask-seeds",
    traces,
    {
      height: height + 74,
      annotations: [
        heading("distance from the full run", middle(left.x), left.y[1]),
        heading("accuracy at the end", middle(right.x), right.y[1]),
      ],
      shapes:
        base === null
          ? []
          : [
              {
                type: "line",
                xref: "x2",
                yref: "y2 domain",
                x0: base,
                x1: base,
                y0: 0,
                y1: 1,
                layer: "below",
                line: { color: PRECISION, width: 2 },
              },
            ],
      xaxis: axis({ domain: left.x, anchor: "y", rangemode: "tozero", tickformat: "~g" }),
      xaxis2: axis({
        domain: right.x,
        anchor: "y2",
        range: rangeOf(found.flatMap((of) => of.runs.map((run) => run.accuracy)).concat(base)),
        tickformat: "~%",
        nticks: 6,
      }),
      yaxis: named(left, "x"),
      yaxis2: named(right, "x2"),
    },
    `Accuracy at the end, mean over seeds: ${says}.`,
  );
};

const ranksOf = (groups) => [...new Set(groups.map((group) => group.rank))].sort((a, b) => a - b);
const methodsOf = (groups) => [...new Set(groups.map((group) => group.method))];

// One panel of accuracies: a line a sweep, hollow where collapsed, the range of collapse shaded, the base a line.
function accuracies(traces, layout, groups, x, j, what) {
  const { base, least } = data.fine_tuning.sweeps,
    methods = methodsOf(data.fine_tuning.sweeps.groups),
    on = { type: "scatter", xaxis: "x" + suffix(j), yaxis: "y" + suffix(j) };
  const across = { xref: `x${suffix(j)} domain`, yref: "y" + suffix(j), x0: 0, x1: 1, layer: "below" };
  layout.shapes.push(
    { ...across, type: "rect", y0: -1, y1: least, fillcolor: COLLAPSE, line: { width: 0 } },
    { ...across, type: "line", y0: base, y1: base, line: { color: PRECISION, width: 2 } },
  );
  groups.forEach((group) =>
    group.sweeps.forEach((sweep) => {
      const colour = METHOD_COLOURS[methods.indexOf(group.method) % METHOD_COLOURS.length],
        runs = sweep.runs.filter((run) => run[x] > 0);
      const told = (run) => `${label(group.method)}, rank ${group.rank}, seed ${sweep.seed}, rate ${run.rate}<br>`;
      traces.push({
        ...on,
        mode: "lines+markers",
        x: runs.map((run) => run[x]),
        y: runs.map((run) => run.accuracy),
        customdata: runs.map(told),
        line: { color: colour, width: 1.5 },
        marker: {
          size: 7,
          color: runs.map((run) => (run.collapsed ? GROUND : colour)),
          line: { color: colour, width: 1.5 },
        },
        hovertemplate: `%{customdata}${what} %{x:.3~g}, accuracy %{y:.1%}<extra></extra>`,
      });
      const highest = runs.filter((run) => run.highest);
      traces.push({
        ...on,
        mode: "markers",
        x: highest.map((run) => run[x]),
        y: highest.map((run) => run.accuracy),
        hoverinfo: "skip",
        marker: { size: 14, color: "rgba(255,255,255,0)", line: { color: colour, width: 1.5 } },
      });
    }),
  );
}

// All accuracies on one scale, so that panels can be compared; the base and the runs at matched rates are in it.
function accuracyRange() {
  const { groups, matched, base } = data.fine_tuning.sweeps;
  return rangeOf(
    [...groups.flatMap((group) => group.sweeps.flatMap((sweep) => sweep.runs)), ...matched]
      .map((run) => run.accuracy)
      .concat(base),
  );
}

const inPowers = { type: "log", zeroline: false, tickformat: "~g", tickfont: { size: 11 } };

figures["figure-rates"] = () => {
  const { groups } = data.fine_tuning.sweeps,
    ranks = ranksOf(groups),
    traces = [],
    layout = { annotations: [], shapes: [] },
    range = accuracyRange(),
    { at, height } = panels(ranks.length, 266);
  const tried = [
    ...new Set(groups.flatMap((group) => group.sweeps.flatMap((sweep) => sweep.runs.map((run) => run.rate)))),
  ].sort((a, b) => a - b);
  const ticks =
    tried.length <= 8 ? { tickvals: tried, ticktext: tried.map((rate) => rate.toExponential().replace("+", "")) } : {};
  ranks.forEach((rank, j) => {
    const panel = at(j);
    accuracies(
      traces,
      layout,
      groups.filter((group) => group.rank === rank),
      "rate",
      j,
      "rate",
    );
    layout["xaxis" + suffix(j)] = axis({
      ...inPowers,
      ...ticks,
      domain: panel.x,
      anchor: "y" + suffix(j),
      range: [Math.log10(tried[0]) - 0.15, Math.log10(tried.at(-1)) + 0.15],
      title: title("learning rate"),
    });
    layout["yaxis" + suffix(j)] = axis({
      domain: panel.y,
      anchor: "x" + suffix(j),
      tickformat: ".0%",
      range,
      title: panel.first ? title("accuracy") : undefined,
    });
    layout.annotations.push(heading(`rank ${rank}`, middle(panel.x), panel.y[1]));
  });
  legend("sweeps-legend", [
    ...methodsOf(groups).map((method, i) => ["dot", method, METHOD_COLOURS[i % METHOD_COLOURS.length]]),
    ["solid", "base", PRECISION],
    ["ring", "highest stable rate"],
    ["collapse", "collapsed"],
  ]);
  const named = groups.map((group) => `${group.method} of rank ${group.rank}`),
    stable = groups.map((group) => group.sweeps.map((sweep) => sweep.stable).join(" and "));
  draw(
    "figure-rates",
    traces,
    { ...layout, height: height + 74 },
    `Highest stable learning rate, a number a seed: ${listed(named, stable)}.`,
  );
};

figures["figure-lengths"] = () => {
  const { groups, matched } = data.fine_tuning.sweeps,
    ranks = ranksOf(groups),
    methods = methodsOf(groups),
    traces = [],
    layout = { annotations: [], shapes: [] },
    range = accuracyRange();
  const decades = (x) => {
    const sizes = groups
      .flatMap((group) => group.sweeps.flatMap((sweep) => sweep.runs.map((run) => run[x])))
      .filter((size) => size > 0);
    return Math.log10(Math.max(...sizes) / Math.min(...sizes));
  };
  const measures = [
      ["length", "relative norm of the update", "update_norm"],
      ["kl", "KL from the base, nats", "kl_to_base"],
    ],
    { at, height } = grid(2, ranks.length, 240);
  measures.forEach(([x, what, by], i) =>
    ranks.forEach((rank, j) => {
      const k = i * ranks.length + j,
        panel = at(i, j),
        on = { type: "scatter", xaxis: "x" + suffix(k), yaxis: "y" + suffix(k) };
      accuracies(
        traces,
        layout,
        groups.filter((group) => group.rank === rank),
        x,
        k,
        what,
      );
      matched
        .filter((run) => run.by === by && run.rank === rank && run[x] > 0 && run.like[x] > 0)
        .forEach((run) => {
          const colour = METHOD_COLOURS[methods.indexOf(run.method) % METHOD_COLOURS.length] || INK;
          traces.push({
            ...on,
            mode: "lines",
            x: [run.like[x], run[x]],
            y: [run.like.accuracy, run.accuracy],
            line: { color: INK, width: 1.5, dash: "dot" },
            hoverinfo: "skip",
          });
          traces.push({
            ...on,
            mode: "markers",
            x: [run[x]],
            y: [run.accuracy],
            marker: { symbol: "diamond", size: 12, color: colour, line: { color: INK, width: 1.5 } },
            hovertemplate: `${label(run.method)}, rank ${rank}, seed ${run.seed}, rate ${run.rate}<br>at ${run.ratio} times the ${escaped(run.size)} of ${label(run.like.method)}<br>${what} %{x:.3~g}, accuracy %{y:.1%}<extra></extra>`,
          });
        });
      layout["xaxis" + suffix(k)] = axis({
        ...inPowers,
        ...(decades(x) > 3.5 || ranks.length > 3 ? { dtick: 1, tickformat: "~e" } : { dtick: "D2" }),
        domain: panel.x,
        anchor: "y" + suffix(k),
        title: title(what),
        ...(j ? { matches: "x" + suffix(i * ranks.length) } : {}),
      });
      layout["yaxis" + suffix(k)] = axis({
        domain: panel.y,
        anchor: "x" + suffix(k),
        tickformat: ".0%",
        range,
        title: panel.first ? title("accuracy") : undefined,
      });
      if (!i || narrow()) layout.annotations.push(heading(`rank ${rank}`, middle(panel.x), panel.y[1]));
    }),
  );
  legend("lengths-legend", [
    ...methods.map((method, i) => ["dot", method, METHOD_COLOURS[i % METHOD_COLOURS.length]]),
    ...(matched.length
      ? [
          ["diamond", "at a matched rate", INK],
          ["dotted", "to the run that it matches", INK],
        ]
      : []),
    ["solid", "base", PRECISION],
    ["collapse", "collapsed"],
  ]);
  const named = groups.map((group) => `${group.method} of rank ${group.rank}`),
    best = groups.map((group) => inPercent(meanOf(known(group.sweeps.map((sweep) => sweep.best)))));
  draw(
    "figure-lengths",
    traces,
    { ...layout, height: height + 74 },
    `Accuracy over the relative norm of the update and over the KL from the base; best accuracy, mean over seeds: ${listed(named, best)}.`,
  );
};

figures["figure-control"] = () => {
  const found = data.fine_tuning.sweeps.matched,
    ranks = ranksOf(found),
    symbols = ["circle", "square", "triangle-up", "star"],
    traces = [],
    rows = [];
  const symbol = (run) => symbols[ranks.indexOf(run.rank) % symbols.length];
  methodsOf(found).forEach((method) => {
    const own = found.filter((run) => run.method === method),
      pairs = `${label(own[0].like.method)} minus ${label(method)}`;
    const published = new Map(
      own
        .filter((run) => run.at_equal_rate !== null)
        .map((run) => [
          `${run.rank} ${run.seed}`,
          { ...run, accuracy: run.at_equal_rate, rate: run.like.rate, equal: true, ratio: null },
        ]),
    );
    if (published.size) rows.push([`${pairs}<br>at equal learning rate`, [...published.values()]]);
    [...new Set(own.map((run) => run.size))].forEach((size) =>
      rows.push([`${pairs}<br>at equal ${escaped(size)}`, own.filter((run) => run.size === size)]),
    );
  });
  rows.forEach(([, runs], i) => {
    const values = runs.map((run) => 100 * (run.like.accuracy - run.accuracy)),
      counted = values.filter((_, k) => runs[k].equal),
      mean = counted.reduce((sum, value) => sum + value, 0) / counted.length;
    if (counted.length)
      traces.push({
        type: "scatter",
        mode: "lines",
        x: [mean, mean],
        y: [i - 0.36, i + 0.36],
        line: { color: INK, width: 2 },
        opacity: 0.6,
        hovertemplate: `mean: ${signed(mean, 1)} points<extra></extra>`,
      });
    traces.push({
      type: "scatter",
      mode: "markers",
      x: values,
      y: runs.map((_, k) => i + (runs.length > 1 ? 0.5 * (k / (runs.length - 1) - 0.5) : 0)),
      customdata: runs.map(
        (run) =>
          `rank ${run.rank}, seed ${run.seed}: rates ${run.like.rate} and ${run.rate}` +
          (run.ratio === null ? "" : `, ${run.ratio} times the size`),
      ),
      marker: {
        size: 10,
        symbol: runs.map(symbol),
        color: runs.map((run) => (run.equal ? INK : GROUND)),
        line: { color: INK, width: 1.5 },
      },
      hovertext: values.map((value) => signed(value, 1)),
      hovertemplate: "%{customdata}<br>%{hovertext} points<extra></extra>",
    });
  });
  legend(
    "control-legend",
    ranks.map((rank) => [["dot", "square", "triangle", "star"][ranks.indexOf(rank) % 4], `rank ${rank}`]),
  );
  const means = rows.map(([, runs]) => {
    const values = runs.filter((run) => run.equal).map((run) => 100 * (run.like.accuracy - run.accuracy));
    return values.length ? `${signed(meanOf(values), 1)} points` : "nothing to count";
  });
  const says = `Difference in accuracy, mean over ranks and seeds: ${listed(
    rows.map(([text]) => text.replace("<br>", " ")),
    means,
  )}.`;
  draw(
    "figure-control",
    traces,
    {
      height: 70 + 62 * rows.length,
      margin: { l: 50, r: 20, t: 10, b: 44 },
      shapes: [
        {
          type: "rect",
          xref: "x",
          yref: "paper",
          x0: -2,
          x1: 2,
          y0: 0,
          y1: 1,
          fillcolor: PANEL,
          line: { width: 0 },
          layer: "below",
        },
      ],
      xaxis: axis({
        zeroline: true,
        zerolinewidth: 1.5,
        zerolinecolor: PRECISION,
        tickformat: "~g",
        title: title("points of accuracy"),
      }),
      yaxis: axis({
        tickvals: numbered(rows.length),
        ticktext: rows.map(([text]) => text),
        range: [rows.length - 0.5, -0.5],
        zeroline: false,
      }),
    },
    says,
  );
};

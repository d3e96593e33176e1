// Curves: one figure a metric, all runs in it, one cursor for all figures.
const data = JSON.parse(document.getElementById("curves-data").textContent);
const HEIGHT = 154;
const DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4], [1, 3]];
const runs = data.runs.map((run, number) => ({
  ...run, shown: true, colour: `var(--run-${number % 6})`, dash: DASHES[number % 6],
  at: Object.fromEntries(Object.entries(run.axes).map(([axis, values]) =>
    [axis, values && new Map(values.map((value, i) => [run.axes.step[i], value]))])),
}));
const longest = Math.max(...runs.flatMap((run) => run.axes.hours), 0);
const AXES = {
  step: { label: "step", scale: 1, digits: 0 },
  generations: { label: "generations", scale: 1, digits: 0 },
  hours: longest < 2 ? { label: "minutes", scale: 60, digits: 1 } : { label: "hours", scale: 1, digits: 2 },
};
let axis = "step";
let cursor = null; // a value on the axis
const figures = [];

function number(value, chart) {
  if (chart?.percent) return `${(100 * value).toFixed(Math.abs(value) < 0.0995 && value ? 1 : 0)}%`;
  const size = Math.abs(value);
  if (size && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 6 : 3 });
}

const place = (value) => value.toLocaleString("en", { maximumFractionDigits: AXES[axis].digits });
const visible = () => runs.filter((run) => run.shown);
const key = (run) => {
  const node = make("span", { className: "key", aria: { hidden: "true" } });
  node.style.setProperty("--colour", run.colour);
  node.style.setProperty("--dash", run.dash[1] ? `${run.dash[0]}px` : "100%");
  return node;
};

// Points of a run in a chart, on the axis; a run without the axis has none.
function points(run, chart) {
  const curve = run.curves[chart.tag];
  const at = run.at[axis];
  if (!curve || !at) return [];
  return curve[0].map((step, i) => ({ x: at.get(step) * AXES[axis].scale, y: curve[1][i], step }));
}

function warned(run) {
  const first = new Map();
  for (const [step, name] of run.warnings) if (!first.has(name)) first.set(name, step);
  return [...first].map(([name, step]) => ({ name, step, x: (run.at[axis]?.get(step) ?? NaN) * AXES[axis].scale }));
}

function domain(chart, values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (chart.percent) return [0, high > 0.3 || chart.low !== null ? Math.max(1, 1.04 * high) : Math.max(0.05, 1.3 * high)];
  for (const bound of [chart.low, chart.high, 0]) if (bound !== null) [low, high] = [Math.min(low, bound), Math.max(high, bound)];
  const room = 0.06 * (high - low) || 1;
  return [low < 0 ? low - room : 0, high > 0 ? high + room : high + room / 2];
}

function spec(figure, width) {
  const { chart } = figure;
  const drawn = visible().map((run) => ({ run, points: points(run, chart) }));
  const values = drawn.flatMap(({ run, points }) => points.map((point) => ({ ...point, run: run.name })));
  const yDomain = domain(chart, values.map((value) => value.y));
  const right = Math.max(...visible().flatMap((run) => run.axes[axis] ?? [0])) * AXES[axis].scale || 1;
  const y = { field: "y", type: "quantitative", title: null, scale: { domain: yDomain, nice: false, zero: false } };
  const x = { field: "x", type: "quantitative", title: AXES[axis].label, scale: { domain: [0, right], nice: false } };
  const layer = [];
  if (chart.low !== null || chart.high !== null)
    layer.push({
      data: { values: [{ low: chart.low ?? yDomain[0], high: Math.min(chart.high ?? yDomain[1], yDomain[1]) }] },
      mark: { type: "rect", fill: "var(--healthy)" },
      encoding: { y: { ...y, field: "low" }, y2: { field: "high" } },
    });
  const warnings = figure.warnings ? visible().flatMap((run) => warned(run).filter((ring) => ring.x <= right)) : [];
  if (warnings.length)
    layer.push(
      { data: { values: warnings }, mark: { type: "rule", stroke: "var(--warning)", strokeDash: [3, 3] }, encoding: { x } },
      {
        data: { values: warnings }, mark: { type: "text", text: "▲", fill: "var(--warning)", fontSize: 10, baseline: "top", y: 0 },
        encoding: { x },
      },
    );
  layer.push({
    data: { values },
    mark: { type: "line", strokeWidth: 1.7, interpolate: "linear", point: values.length <= 8 * drawn.length && { size: 18, strokeWidth: 0 } },
    encoding: {
      x, y,
      color: { field: "run", type: "nominal", legend: null, scale: { domain: runs.map((r) => r.name), range: runs.map((r) => r.colour) } },
      strokeDash: { field: "run", type: "nominal", legend: null, scale: { domain: runs.map((r) => r.name), range: runs.map((r) => r.dash) } },
    },
  });
  return {
    width, height: HEIGHT, autosize: { type: "fit", contains: "padding" }, padding: { left: 0, right: 6, top: 2, bottom: 4 }, layer,
    config: {
      font: "system-ui, sans-serif", background: null, aria: false, view: { stroke: null },
      axis: {
        domainColor: "var(--line)", tickColor: "var(--line)", gridColor: "var(--grid)", labelColor: "var(--muted)", titleColor: "var(--muted)",
        labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal", labelPadding: 4, tickSize: 3, tickCount: 4, titlePadding: 4,
      },
      axisX: { grid: false, titleAnchor: "end", titleAlign: "right", format: "~s" },
      axisY: { domain: false, ticks: false, format: chart.percent ? "~%" : "~r", minExtent: 34 },
    },
  };
}

function summary(chart) {
  const of = visible().map((run) => {
    const found = points(run, chart);
    if (!found.length) return `${run.name}: not logged`;
    const ys = found.map((point) => point.y);
    const [first, last] = [found[0], found[found.length - 1]];
    return `${run.name}: ${number(first.y, chart)} at step ${first.step}, ${number(last.y, chart)} at step ${last.step}, `
      + `least ${number(Math.min(...ys), chart)}, most ${number(Math.max(...ys), chart)}`;
  });
  return `${chart.title}, ${chart.words}. ${of.join(". ")}.`;
}

async function draw(figure) {
  figure.stale = false;
  const { plot, chart, node } = figure;
  node.setAttribute("aria-label", `${summary(chart)} Left and right arrow keys read values.`);
  const some = visible().some((run) => points(run, chart).length);
  figure.view?.finalize();
  figure.view = null;
  if (!some) {
    const why = visible().length ? `Not logged over ${AXES[axis].label} by the runs shown.` : "No run is shown.";
    plot.replaceChildren(make("p", { className: "none", textContent: why }));
    read(figure);
    return;
  }
  const canvas = make("div");
  const width = plot.clientWidth;
  const options = { actions: false, renderer: "svg", ast: true, mode: "vega-lite", tooltip: false, defaultStyle: false };
  const { view } = await window.vegaEmbed(canvas, spec(figure, width), options);
  canvas.querySelector("svg").setAttribute("aria-hidden", "true");
  Object.assign(figure, { view, width });
  figure.line = make("div", { className: "cursor", hidden: true });
  plot.replaceChildren(canvas, figure.line);
  read(figure);
}

function nearest(found, x) {
  let best = null;
  for (const point of found) if (!best || Math.abs(point.x - x) < Math.abs(best.x - x)) best = point;
  return best;
}

// Writes a figure's values at the cursor, or its last ones, and puts the line there.
function read(figure) {
  const { chart, readout, line, view } = figure;
  const values = [];
  for (const run of visible()) {
    const found = points(run, chart);
    const point = cursor === null ? found[found.length - 1] : nearest(found, cursor);
    if (point) values.push(make("span", { className: "value" }, runs.length > 1 ? key(run) : null, number(point.y, chart)));
  }
  const where = cursor === null ? "last" : `${AXES[axis].label} ${place(cursor)}`;
  readout.replaceChildren(...values, make("span", { className: "where", textContent: values.length ? where : "" }));
  if (!line) return;
  line.hidden = cursor === null || !view;
  if (!line.hidden) line.style.left = `${view.origin()[0] + view.scale("x")(cursor)}px`;
}

function point(value) {
  cursor = value;
  for (const figure of figures) if (figure.near) read(figure);
}

function stops(chart) {
  return [...new Set(visible().flatMap((run) => points(run, chart).map((p) => p.x)))].sort((a, b) => a - b);
}

function follow(figure) {
  const at = (event) => {
    if (!figure.view) return;
    const x = figure.view.scale("x").invert(event.clientX - figure.plot.getBoundingClientRect().left - figure.view.origin()[0]);
    const found = nearest(stops(figure.chart).map((value) => ({ x: value })), x);
    if (found) point(found.x);
  };
  figure.plot.addEventListener("pointermove", at);
  figure.plot.addEventListener("pointerdown", at);
  figure.plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));
  figure.node.addEventListener("focus", () => figure.readout.setAttribute("aria-live", "polite"));
  figure.node.addEventListener("blur", () => (figure.readout.removeAttribute("aria-live"), point(null)));
  figure.node.addEventListener("keydown", (event) => {
    const all = stops(figure.chart);
    const now = cursor === null ? all.length - 1 : all.indexOf(nearest(all.map((x) => ({ x })), cursor)?.x);
    const to = { ArrowLeft: now - (cursor === null ? 0 : 1), ArrowRight: now + 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || !all.length) return;
    event.preventDefault();
    point(all[Math.min(Math.max(to, 0), all.length - 1)]);
  });
}

function add(section, chart, warnings) {
  const readout = make("p", { className: "readout" });
  const plot = make("div", { className: "plot" });
  const node = make("figure", { className: "chart", tabIndex: 0, aria: { role: "group" } },
    make("figcaption", {}, make("h3", { textContent: chart.title }), make("p", { className: "words", textContent: chart.words })),
    readout, plot);
  const figure = { chart, node, plot, readout, warnings, stale: true, near: false };
  section.append(node);
  figures.push(figure);
  follow(figure);
}

function redraw() {
  cursor = null;
  for (const figure of figures) {
    figure.stale = true;
    if (figure.near) draw(figure);
  }
}

const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const figure = figures.find((one) => one.node === entry.target);
    figure.near = entry.isIntersecting;
    if (figure.near && figure.stale) draw(figure);
  }
}, { rootMargin: "400px" });
new ResizeObserver(() => {
  for (const figure of figures)
    if (figure.view && figure.plot.clientWidth && figure.plot.clientWidth !== figure.width) {
      figure.stale = true;
      if (figure.near) draw(figure);
    }
}).observe(document.body);

function duration(hours) {
  if (hours >= 1) return `${hours.toFixed(1)} h`;
  return hours * 60 >= 1 ? `${(hours * 60).toFixed(1)} min` : `${(hours * 3600).toFixed(0)} s`;
}

function cards() {
  document.getElementById("runs").append(...runs.map((run) => {
    const accuracy = Object.keys(run.curves).find((tag) => tag.startsWith("eval/") && /_pass\d+$/.test(tag));
    const [, values] = run.curves[accuracy] ?? [[], []];
    const made = run.axes.generations?.at(-1);
    const facts = [
      `${run.steps} ${run.steps === 1 ? "step" : "steps"}`, made ? `${made.toLocaleString("en")} generations` : null,
      duration(run.axes.hours.at(-1) ?? 0),
      values.length ? `accuracy ${number(values[0], { percent: true })} → ${number(values.at(-1), { percent: true })}` : null,
      run.warnings.length ? `▲ warning at step ${run.warnings[0][0]}` : null,
    ].filter(Boolean);
    return make("p", { className: "run", title: run.directory }, key(run), make("b", { textContent: run.name }),
      ...facts.map((fact) => make("span", { textContent: fact, className: fact.startsWith("▲") ? "warning" : "" })));
  }));
}

function controls() {
  const axes = document.getElementById("axes");
  for (const [name, { label }] of Object.entries(AXES)) {
    const known = runs.some((run) => run.axes[name]);
    const input = make("input", { type: "radio", name: "axis", value: name, checked: name === axis, disabled: !known });
    input.addEventListener("change", () => ((axis = name), redraw()));
    const words = name === "hours" ? "wall time" : label;
    axes.append(make("label", { title: known ? "" : "the runs did not log it" }, input, make("span", { textContent: words })));
  }
  if (runs.length < 2) return;
  const shown = document.getElementById("shown");
  shown.hidden = false;
  for (const run of runs) {
    const input = make("input", { type: "checkbox", checked: true });
    input.addEventListener("change", () => ((run.shown = input.checked), redraw()));
    shown.append(make("label", {}, input, key(run), make("span", { textContent: run.name })));
  }
}

function warningList() {
  const place = document.getElementById("warnings");
  const rows = runs.flatMap((run) => warned(run).map((ring) => {
    const times = run.warnings.filter(([, name]) => name === ring.name).length;
    const again = times > 1 ? `, and ${times - 1} more ${times === 2 ? "time" : "times"}` : "";
    return make("li", {}, make("b", { textContent: `▲ ${run.name}, step ${ring.step}` }), `: ${data.warnings[ring.name] ?? ring.name}${again}`);
  }));
  if (rows.length) place.append(make("ul", { className: "warnings" }, ...rows));
  const lacks = [
    [runs.filter((run) => run.monitored && !run.warnings.length), "no warnings"],
    [runs.filter((run) => !run.monitored), "no warning metrics (warning/...) were logged; the collapse monitor runs with --algo and --diagnostics.on_collapse other than off"],
  ];
  for (const [of, words] of lacks)
    if (of.length) place.append(make("p", { className: "lead", textContent: `${of.map((run) => run.name).join(", ")}: ${words}.` }));
}

function times() {
  const parts = [...new Set(runs.flatMap((run) => run.timing.map(([name]) => name)))];
  const section = document.querySelector("#time .charts");
  if (!parts.length) {
    lead("time", "The runs logged no times (timing/...).");
    return;
  }
  const totals = runs.map((run) => run.timing.reduce((sum, [, seconds]) => sum + seconds, 0));
  const most = Math.max(...totals);
  const cell = (seconds, total) => {
    if (seconds === undefined) return make("td", { className: "no", textContent: "–" });
    const bar = make("i", { className: "part" });
    bar.style.width = `${(100 * seconds) / most}%`;
    return make("td", {}, make("span", { textContent: `${number(seconds)} s` }), make("small", { textContent: `${Math.round((100 * seconds) / total)}%` }), bar);
  };
  const row = (name, cells, className = "") => make("tr", { className }, make("th", { scope: "row", textContent: name }), ...cells);
  section.append(make("div", { className: "scroll", tabIndex: 0, aria: { label: "Seconds of a step by its parts", role: "region" } },
    make("table", { className: "times" },
      make("caption", { textContent: "Medians, without the first step" }),
      make("thead", {}, make("tr", {}, make("th", { textContent: "part" }), ...runs.map((run) => make("th", { scope: "col" }, runs.length > 1 ? key(run) : null, run.name)))),
      make("tbody", {}, ...parts.map((name) => row(name.replaceAll("_", " "), runs.map((run, i) => cell(run.timing.find(([part]) => part === name)?.[1], totals[i])))),
        row("sum", totals.map((total) => make("td", {}, make("span", { textContent: `${number(total)} s` }))), "sum")))));
}

function lead(id, words) {
  document.querySelector(`#${id} .charts`).before(make("p", { className: "lead", textContent: words }));
}

cards();
controls();
warningList();
times();
for (const [id, charts] of Object.entries(data.sections)) {
  const section = document.querySelector(`#${id} .charts`);
  for (const chart of charts) add(section, chart, id !== "time");
}
if (!data.sections.learning.length) lead("learning", "The runs logged neither evaluations nor rewards.");
if (Math.max(...runs.map((run) => run.steps)) === 1) lead("learning", "One step was logged: its values are points, there is no curve yet.");
const drawn = Math.max(...runs.map((run) => run.longest));
if (drawn > data.most) lead("learning", `Of each curve (up to ${drawn.toLocaleString("en")} points) at most ${data.most.toLocaleString("en")} are drawn, the least and the greatest of every stretch among them.`);
if (data.sections.monitor.some((chart) => chart.low !== null || chart.high !== null)) {
  const sign = make("p", { className: "signs" }, make("i", { className: "healthy" }), "healthy range");
  if (runs.some((run) => run.warnings.length)) sign.append(make("b", { textContent: "▲" }), "first step of a warning");
  document.querySelector("#monitor .charts").before(sign);
}
for (const figure of figures) observer.observe(figure.node);
document.documentElement.dataset.charts = "ready";

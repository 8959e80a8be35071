// Line charts with bands, on uPlot. One chart shows one or several metrics of every recipe: colour tells recipes apart
// where there are several, metrics where there is one recipe; dashes tell the metrics apart in the first case.
// @ts-check
import { h } from "cispo/dom";
import { faded, line } from "cispo/colour";
import { number } from "cispo/format";

/* global uPlot */
/** @typedef {import("cispo/data").Data} Data */
/** @typedef {{label: string, color: string, width?: number, dash?: number[], y: (number | null)[], low?: (number | null)[], high?: (number | null)[]}} Line */
/** @typedef {{title: string, note?: string, x: number[], lines: Line[], log?: boolean, xLabel?: string, logX?: boolean, range?: [number, number],
 *   marks?: {y: number, label: string}[], points?: boolean}} Spec */

/** @type {Set<{plot: any, box: HTMLElement, redraw: () => void}>} */
const drawn = new Set();
const MANY = 3;
const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap((e) => [1, 2, 5].map((m) => m * 10 ** e)); // there are no half steps
const DASHES = [undefined, [6, 4], [2, 3], [10, 3, 2, 3]];
const T_95 = [NaN, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]; // two-sided, by degrees of freedom

/** Charts live as long as their element is in the page. */
export function forget() {
  for (const one of drawn) if (!one.box.isConnected) { one.plot?.destroy(); drawn.delete(one); }
}

/** After a change of theme or width. */
export function redraw() {
  forget();
  for (const one of drawn) if (one.plot) one.redraw();
}

/** @param {Spec} spec @returns {HTMLElement} */
export function chart(spec) {
  const box = h("figure", { class: "chart" });
  const caption = h("figcaption", {}, h("strong", {}, spec.title), spec.note ? h("span", { class: "muted" }, " " + spec.note) : null);
  box.append(caption);
  const has = spec.lines.some((l) => l.y.some((v) => v !== null && (!spec.log || v > 0)));
  if (!has) {
    box.append(h("p", { class: "empty" }, "Not measured in this run."));
    return box;
  }
  const place = h("div", { class: "plot", role: "img", "aria-label": `${spec.title}: ${summary(spec)}` });
  box.append(place);
  const one = { plot: /** @type {any} */ (null), box, redraw: draw };
  /** @param {number} [width] */
  function draw(width = place.clientWidth) {
    if (!width) return;
    one.plot?.destroy();
    place.replaceChildren();
    // @ts-ignore uPlot is a classic script
    one.plot = new uPlot(options(spec, width), columns(spec), place);
  }
  // a page of many charts opens quickly because only those near the window are drawn
  new IntersectionObserver((entries) => {
    if (!one.plot && entries.some((e) => e.isIntersecting)) draw();
  }, { rootMargin: "600px" }).observe(place);
  new ResizeObserver(() => {
    const width = place.clientWidth;
    if (one.plot && width && Math.abs(one.plot.width - width) > 1) one.plot.setSize({ width, height: 200 });
  }).observe(place);
  drawn.add(one);
  // @ts-ignore for tests and the console: the data that is drawn
  box.chart = { spec, data: () => columns(spec) };
  return box;
}

/** @param {Spec} spec */
function summary(spec) {
  return spec.lines.map((l) => {
    const values = l.y.filter((v) => v !== null);
    return values.length ? `${l.label} from ${number(values[0])} to ${number(values[values.length - 1])}` : `${l.label} empty`;
  }).join("; ");
}

/** @param {Spec} spec @returns {(number | null)[][]} */
function columns(spec) {
  const safe = (/** @type {(number | null)[]} */ ys) => (spec.log ? ys.map((y) => (y !== null && y > 0 ? y : null)) : ys);
  const all = [/** @type {(number | null)[]} */ (spec.x)];
  for (const l of spec.lines) {
    all.push(safe(l.y));
    if (l.low && l.high) all.push(safe(l.low), safe(l.high));
  }
  return all;
}

/** @param {Spec} spec @param {number} width */
function options(spec, width) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--muted").trim(), grid = style.getPropertyValue("--grid").trim();
  const series = /** @type {any[]} */ ([{ label: spec.xLabel ?? "step", value: (/** @type {any} */ u, /** @type {number} */ v) => (u.cursor.idx === null ? "last" : number(v)) }]);
  const bands = [];
  const few = spec.x.length <= 60;
  for (const l of spec.lines) {
    series.push({
      label: l.label, stroke: l.color, width: l.width ?? 2, dash: l.dash, spanGaps: true, points: { show: few, size: 4, fill: l.color },
      value: (/** @type {any} */ _, /** @type {number | null} */ v) => number(v),
    });
    if (l.low && l.high) {
      const at = series.length;
      const edge = { stroke: "transparent", width: 0, spanGaps: true, points: { show: false }, legend: false, class: "edge" };
      series.push({ ...edge, label: `${l.label} low` }, { ...edge, label: `${l.label} high` });
      bands.push({ series: [at + 1, at], fill: faded(l.color, 0.18) });
    }
  }
  const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "11px system-ui, sans-serif" };
  const marks = spec.marks ?? [];
  const texts = (/** @type {any} */ _, /** @type {number[]} */ vs) => vs.map((v) => (v === null ? "" : number(v)));
  const wide = (/** @type {any} */ _, /** @type {string[] | null} */ ts) => Math.max(40, 18 + 6.5 * Math.max(0, ...(ts ?? []).map((t) => t.length)));
  const ticks = spec.log ? { splits: (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ low, /** @type {number} */ high) => decades(low, high), filter: (/** @type {any} */ _, /** @type {number[]} */ vs) => vs } : {};
  return {
    width, height: 200, series, bands,
    scales: {
      x: { time: false, distr: spec.logX ? 3 : 1 },
      // uPlot's own range of a constant 0 is 0 to 100
      y: spec.log ? { distr: 3 } : { range: (/** @type {any} */ u, /** @type {number} */ low, /** @type {number} */ high) =>
        spec.range ?? (low === 0 && high === 0 ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true)) },
    },
    axes: [
      { ...axis, size: 30, values: texts, ...(spec.logX ? {} : { incrs: WHOLE }) },
      { ...axis, size: wide, values: texts, ...ticks },
    ],
    legend: { live: true, markers: { width: 2 } },
    cursor: { points: { size: 6 } },
    hooks: {
      // while nothing is pointed at, the legend shows the last values
      ready: [resting],
      setCursor: [(/** @type {any} */ u) => u.cursor.idx === null && resting(u)],
      draw: [(/** @type {any} */ u) => {
        const ctx = u.ctx;
        ctx.save();
        ctx.strokeStyle = ink;
        ctx.fillStyle = ink;
        ctx.setLineDash([4, 4]);
        ctx.textAlign = "right";
        ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
        for (const mark of marks) {
          const y = u.valToPos(mark.y, "y", true);
          if (!(y > u.bbox.top && y < u.bbox.top + u.bbox.height)) continue;
          ctx.beginPath();
          ctx.moveTo(u.bbox.left, y);
          ctx.lineTo(u.bbox.left + u.bbox.width, y);
          ctx.stroke();
          ctx.fillText(mark.label, u.bbox.left + u.bbox.width - 4, y - 4);
        }
        ctx.restore();
      }],
    },
  };
}

/** The values that a legend shows at rest: each line's last. @param {any} u */
function resting(u) {
  u.setLegend({ idxs: u.data.map((/** @type {(number | null)[]} */ ys) => ys.findLastIndex((y) => y !== null)) }, false);
}

/** Ticks of a logarithmic axis: 1, 2, 5 of each decade, or at most about six powers of ten. @param {number} low @param {number} high */
function decades(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.ceil((last - first) / 6), found = [];
  for (let e = first; e <= last; e += every) for (const m of last - first <= 3 ? [1, 2, 5] : [1]) found.push(m * 10 ** e);
  return found.filter((y) => y >= low * 0.999 && y <= high * 1.001);
}

/**
 * The lines of one or several metrics over steps, for every recipe; seeds of a recipe as their mean and a
 * 95 % band (of two seeds: their range). Of more than three recipes only the first metric is drawn.
 * @param {Data} data
 * @param {[string, string][]} metrics name and label
 * @param {(run: import("cispo/data").Run, row: Record<string, any>) => [number, number] | null} [own] a band of a single run
 */
export function lines(data, metrics, own) {
  const x = [...new Set(data.runs.flatMap((r) => r.lines.filter((l) => metrics.some(([m]) => has(l[m]))).map((l) => l.step)))].sort((a, b) => a - b);
  const at = new Map(x.map((step, i) => [step, i]));
  const many = data.recipes.length > 1;
  if (data.recipes.length > MANY) metrics = metrics.slice(0, 1); // the first is the most telling
  /** @type {Line[]} */
  const all = [];
  data.recipes.forEach((recipe, i) => {
    metrics.forEach(([metric, label], j) => {
      /** @type {number[][]} */
      const values = x.map(() => []);
      /** @type {([number, number] | null)[]} */
      const owns = x.map(() => null);
      for (const r of recipe.runs)
        for (const row of data.runs[r].lines)
          if (has(row[metric]) && at.has(row.step)) {
            values[/** @type {number} */ (at.get(row.step))].push(row[metric]);
            if (own && j === 0) owns[/** @type {number} */ (at.get(row.step))] = own(data.runs[r], row);
          }
      if (!values.some((v) => v.length)) return;
      const y = values.map((v) => (v.length ? mean(v) : null));
      /** @type {Line} */
      const l = { label: many ? (metrics.length > 1 ? `${recipe.label}: ${label}` : recipe.label) : label, color: line(many ? i : j), dash: many ? DASHES[(j + Math.floor(i / 8)) % 4] : undefined, y };
      if (recipe.runs.length === 2) {
        l.low = values.map((v) => (v.length ? Math.min(...v) : null));
        l.high = values.map((v) => (v.length ? Math.max(...v) : null));
      } else if (recipe.runs.length > 2) {
        const half = values.map((v) => (v.length > 1 ? (T_95[v.length - 1] ?? 2.1) * deviation(v) / Math.sqrt(v.length) : 0));
        l.low = y.map((v, k) => (v === null ? null : v - half[k]));
        l.high = y.map((v, k) => (v === null ? null : v + half[k]));
      } else if (owns.some((o) => o)) {
        l.low = owns.map((o) => (o ? o[0] : null));
        l.high = owns.map((o) => (o ? o[1] : null));
      }
      all.push(l);
    });
  });
  return { x, lines: all };
}

/** @param {any} v */
function has(v) {
  return typeof v === "number";
}
/** @param {number[]} v */
export function mean(v) {
  return v.reduce((a, b) => a + b, 0) / v.length;
}
/** @param {number[]} v sample standard deviation */
export function deviation(v) {
  const m = mean(v);
  return Math.sqrt(v.reduce((a, b) => a + (b - m) ** 2, 0) / (v.length - 1));
}

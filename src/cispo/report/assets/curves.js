// The run in curves: what was learned, what the clip did, how stable it was, and where the time went.
// @ts-check
import { chart, lines, mean } from "cispo/charts";
import { line } from "cispo/colour";
import { h } from "cispo/dom";
import { duration, number, percent } from "cispo/format";

/** @typedef {import("cispo/data").Data} Data */
/** @typedef {import("cispo/data").Run} Run */

/** 95 % band of a share of n draws (Wilson, 1927). @param {number} p @param {number} n @returns {[number, number]} */
export function wilson(p, n) {
  const z = 1.96, d = 1 + (z * z) / n, middle = (p + (z * z) / (2 * n)) / d;
  const half = (z / d) * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

/** @param {Data} data */
export function headline(data) {
  const one = data.recipes.length > 1;
  const seeds = data.runs.length > data.recipes.length;
  const band = seeds ? `band: ${data.recipes.every((r) => r.runs.length < 3) ? "range of" : "95 % over"} seeds` : "band: 95 % by the number of completions";
  return h("div", { class: "charts two" },
    chart({ title: "Held-out accuracy", note: band, range: [0, 1.02],
      ...lines(data, one ? [["eval/accuracy", "accuracy"]] : [["eval/accuracy", "accuracy"], ...passes(data)], (run, row) => {
        return run.held_out ? wilson(row["eval/accuracy"], run.held_out) : null;
      }) }),
    chart({ title: "Reward in training", note: band,
      ...lines(data, [["reward/mean", "mean reward"]], (run, row) => {
        const n = (run.config["rollout.groups_per_step"] ?? 0) * (run.config["rollout.group_size"] ?? 0);
        const half = n ? (1.96 * (row["reward/std"] ?? NaN)) / Math.sqrt(n) : NaN;
        return Number.isFinite(half) ? [row["reward/mean"] - half, row["reward/mean"] + half] : null;
      }) }));
}

/** @param {Data} data @returns {[string, string][]} */
function passes(data) {
  return names(data, "eval/pass@").filter((n) => n !== "eval/pass@1").map((n) => [n, n.slice(5)]);
}

/** @param {Data} data @param {string} prefix */
function names(data, prefix) {
  return [...new Set(data.runs.flatMap((r) => r.lines.flatMap((l) => Object.keys(l).filter((k) => k.startsWith(prefix)))))].sort();
}

/** @param {Data} data */
export function curves(data) {
  const caps = new Set(data.runs.map((r) => r.objective.clip_high_threshold ?? (r.objective.type === "cispo" ? 4 : null)));
  const cap = caps.size === 1 ? [...caps][0] : null;
  const rewards = names(data, "reward/function/");
  const tasks = [...names(data, "task/"), ...names(data, "eval/task/")];
  const entries = /** @type {[string, HTMLElement[]][]} */ ([
    ["The importance ratio", [
      chart({ title: "Ratio r = π/μ", note: "log scale", log: true, marks: cap ? [{ y: cap, label: `cap ${cap}` }] : [],
        ...lines(data, [["ratio/p99", "99th percentile"], ["ratio/p50", "median"], ["ratio/max", "max"]]) }),
      chart({ title: "Above the cap", note: "share of tokens, by sign of advantage", ...lines(data, [["clip/above_positive", "A > 0"], ["clip/above_negative", "A < 0"]]) }),
      chart({ title: "Below the floor", note: "share of tokens, by sign of advantage", ...lines(data, [["clip/below_positive", "A > 0"], ["clip/below_negative", "A < 0"]]) }),
      chart({ title: "What PPO's 0.8 – 1.2 would have silenced", note: "share of trained tokens", ...lines(data, [["clip/ppo_silenced", "silenced"]]) }),
      chart({ title: "First and last update of a step", note: "ratio, log scale", log: true, ...lines(data, [["ratio/last_update_max", "max, last"], ["ratio/first_update_max", "max, first"], ["ratio/last_update_mean", "mean, last"]]) }),
      chart({ title: "Effective sample size", note: "of the clipped weights, a share of all tokens", range: [0, 1.02], ...lines(data, [["ess", "ESS"]]) }),
    ]],
    ["Stability", [
      chart({ title: "Entropy", note: "nats per token", ...lines(data, [["policy/entropy", "entropy"]]) }),
      chart({ title: "Gradient norm", note: "before clipping, log scale", log: true, ...lines(data, [["optim/grad_norm", "mean"], ["optim/grad_norm_max", "max"]]) }),
      chart({ title: "Sampler/trainer KL", note: "at the first update, log scale", log: true, ...lines(data, [["kl/sampler_k3", "k3"], ["kl/sampler_max_abs", "max |Δ log p|"]]) }),
      chart({ title: "Staleness", note: "of sampled tokens", ...lines(data, [["staleness/steps_mean", "RL steps, mean"], ["staleness/steps_max", "RL steps, max"], ["staleness/updates_max", "updates, max"]]) }),
      staleness(data),
      chart({ title: "Learning rate", ...lines(data, [["optim/learning_rate", "learning rate"]]) }),
    ]],
    ["What was written", [
      chart({ title: "Length by correctness", note: "sampled tokens", ...lines(data, [["rollout/length_correct", "correct"], ["rollout/length_incorrect", "not correct"]]) }),
      chart({ title: "Groups and completions", note: "shares", ...lines(data, [["rollout/zero_variance", "zero-variance groups"], ["rollout/truncated", "truncated"], ["reward/none", "without a reward"]]) }),
      ...(rewards.length > 1 ? [chart({ title: "Reward by function", ...lines(data, rewards.map((n) => [n, n.slice(16)])) })] : []),
      ...(tasks.length ? [chart({ title: "The task's own metrics", ...lines(data, tasks.map((n) => [n, n.replace("task/", "")])) })] : []),
    ]],
    ["Where the time went", [
      time(data),
      chart({ title: "Tokens per second", note: "log scale", log: true, ...lines(data, [["tokens/sample_per_s", "sampling"], ["tokens/train_per_s", "training"]]) }),
    ]],
  ]);
  return h("div", {}, ...entries.flatMap(([title, charts]) => [h("h3", {}, title), h("div", { class: "charts" }, ...charts)]), anything(data));
}

/** Any metric of the run, by name. @param {Data} data */
function anything(data) {
  const all = names(data, "").filter((n) => data.runs.some((r) => r.lines.some((l) => typeof l[n] === "number")));
  const place = h("div", { class: "charts" });
  const box = h("select", { onchange: (/** @type {any} */ e) => {
    const name = e.target.value;
    if (name) place.replaceChildren(chart({ title: name, note: data.names[name] ?? "", ...lines(data, [[name, name]]) }));
  } }, h("option", { value: "" }, "choose one of the run's metrics"), ...all.map((n) => h("option", { value: n }, n)));
  return h("div", { class: "anything" }, h("label", { class: "field" }, h("span", {}, "any other metric"), box), place);
}

/** @param {Data} data */
function staleness(data) {
  const rows = data.recipes.map((recipe) => {
    /** @type {number[]} */
    const total = [];
    for (const r of recipe.runs) for (const l of data.runs[r].lines) (l["staleness/histogram"] ?? []).forEach((/** @type {number} */ n, /** @type {number} */ i) => (total[i] = (total[i] ?? 0) + n));
    const all = total.reduce((a, b) => a + b, 0);
    return { label: recipe.label, shares: total.map((n) => n / all) };
  }).filter((r) => r.shares.length);
  const box = h("figure", { class: "chart" }, h("figcaption", {}, h("strong", {}, "Tokens by staleness"), h("span", { class: "muted" }, " RL steps, whole run")));
  if (!rows.length) box.append(h("p", { class: "empty" }, "Not measured in this run."));
  rows.forEach((row, i) => {
    if (rows.length > 1) box.append(h("p", { class: "muted" }, row.label));
    box.append(h("div", { class: "bars" }, ...row.shares.map((share, s) => bar(String(s), share, line(i)))));
  });
  return box;
}

const PARTS = /** @type {[string, string][]} */ ([
  ["time/sample_s", "sampling"], ["time/reward_s", "waiting for rewards"], ["time/forward_s", "other log-probs"],
  ["time/train_s", "forward and backward"], ["time/optim_s", "optimizer"],
]);

/** Whether its sampler works while the learner does. @param {Run} run */
function asynchronous(run) {
  return (run.config["async.max_staleness"] ?? 0) > 0;
}

/** @param {Data} data */
function time(data) {
  const box = h("figure", { class: "chart" }, h("figcaption", {}, h("strong", {}, "Share of the steps' wall time")));
  let any = false;
  data.recipes.forEach((recipe) => {
    const sum = (/** @type {string} */ name) => mean(recipe.runs.map((r) => data.runs[r].lines.reduce((a, l) => a + (l[name] ?? 0), 0)));
    const whole = sum("time/step_s");
    if (!whole) return;
    any = true;
    const parts = PARTS.map(([name, label], i) => ({ label, seconds: sum(name), color: line(i) }));
    // rewards are waited for within the time of sampling, which beside an asynchronous sampler is waiting too
    parts[0].seconds = Math.max(0, parts[0].seconds - parts[1].seconds);
    if (recipe.runs.some((r) => asynchronous(data.runs[r]))) parts[0].label = "waiting for rollouts";
    parts.push({ label: "the rest: metrics, writing", seconds: Math.max(0, whole - parts.reduce((a, p) => a + p.seconds, 0)), color: line(5) });
    const measured = recipe.runs.every((r) => data.runs[r].lines.some((l) => l["time/sampler_idle_s"] !== undefined));
    const idle = measured ? `; the sampler had nothing to do for ${percent(sum("time/sampler_idle_s") / whole)} of it` : "";
    box.append(h("p", { class: "muted" }, `${data.recipes.length > 1 ? recipe.label + ": " : ""}${duration(whole)}${recipe.runs.length > 1 ? " on average" : ""}, and ${duration(sum("time/eval_s"))} of evaluation${idle}`));
    box.append(h("div", { class: "stack", "aria-hidden": "true" }, ...parts.map((p) => h("span", { style: `flex:${p.seconds / whole};background:${p.color}`, title: `${p.label}: ${percent(p.seconds / whole)}` }))));
    box.append(h("div", { class: "bars" }, ...parts.filter((p) => p.seconds > 0.0005 * whole).map((p) => bar(p.label, p.seconds / whole, p.color, duration(p.seconds)))));
  });
  if (!any) box.append(h("p", { class: "empty" }, "Not measured in this run."));
  return box;
}

/** @param {string} label @param {number} share @param {string} color @param {string} [more] */
function bar(label, share, color, more) {
  return h("div", { class: "bar" }, h("span", { class: "barlabel" }, label), h("span", { class: "track" }, h("span", { style: `width:${(100 * share).toFixed(2)}%;background:${color}` })), h("span", { class: "num" }, `${percent(share)}${more ? ` · ${more}` : ""}`));
}

/** The forecast of `cispo fit`. @param {any} forecast */
export function forecastView(forecast) {
  const x = [...new Set(forecast.fits.flatMap((/** @type {any} */ f) => [...f.line.map((/** @type {any} */ p) => p[0]), ...f.curves.flatMap((/** @type {any} */ c) => c[0])]))].filter((C) => C > 0).sort((a, b) => a - b);
  const at = new Map(x.map((C, i) => [C, i]));
  /** @type {import("cispo/charts").Line[]} */
  const all = [];
  forecast.fits.forEach((/** @type {any} */ f, /** @type {number} */ i) => {
    const empty = () => /** @type {(number | null)[]} */ (x.map(() => null));
    const y = empty(), low = empty(), high = empty();
    for (const [C, R, l, u] of f.line) {
      const k = /** @type {number} */ (at.get(C));
      [y[k], low[k], high[k]] = [R, l, u];
    }
    const fitted = f.sigmoid !== null;
    if (fitted) all.push({ label: `${f.label}: fit`, color: line(i), y, low, high });
    f.curves.forEach((/** @type {any} */ c, /** @type {number} */ s) => {
      const measured = empty();
      c[0].forEach((/** @type {number} */ C, /** @type {number} */ k) => C > 0 && (measured[/** @type {number} */ (at.get(C))] = c[1][k]));
      all.push({ label: `${f.label}: seed ${s + 1}`, color: line(i), dash: [2, 4], y: measured });
    });
  });
  const words = forecast.fits.map((/** @type {any} */ f) => h("p", {}, h("strong", {}, `${f.label}: `), f.verdict,
    f.sigmoid ? ` A ${number(f.sigmoid.A)} (${number(f.A_range[0])} to ${number(f.A_range[1])}, by ${f.range_from}), B ${number(f.sigmoid.B)}, C_mid ${number(f.sigmoid.C_mid)}; the power law would say A ${number(f.power_law.A)}.` : ""));
  return h("section", { id: "forecast" }, h("h2", {}, "Forecast"), ...words,
    chart({ title: `${forecast.metric} over ${forecast.compute}`, note: "log scale; dotted: measured; band: 95 %", x, lines: all, logX: true, xLabel: forecast.compute }));
}

/** The table of `cispo compare`. @param {any} comparison */
export function comparisonView(comparison) {
  return h("section", { id: "comparison" }, h("h2", {}, comparison.title ?? "Comparison"),
    ...comparison.notes.map((/** @type {string} */ n) => h("p", {}, n)),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Comparison" }, h("table", {},
      h("thead", {}, h("tr", {}, ...comparison.columns.map((/** @type {string} */ c) => h("th", {}, c)))),
      h("tbody", {}, ...comparison.rows.map((/** @type {string[]} */ row) => h("tr", {}, ...row.map((cell) => h("td", {}, cell))))))));
}

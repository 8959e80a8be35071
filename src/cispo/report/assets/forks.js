// The fork tokens of a run: how their probability rose, the push they got, and what PPO's clip would have left of it.
// @ts-check
import { chart } from "cispo/charts";
import { line } from "cispo/colour";
import { h } from "cispo/dom";
import { number, oneLine, percent } from "cispo/format";

/** @typedef {import("cispo/data").Fork} Fork */

/**
 * @param {import("cispo/data").Run} run
 * @param {(fork: Fork, step: number) => void} show opens the inspector where the fork is
 */
export function forksView(run, show) {
  const found = run.forks;
  if (!found || found.forks.length === 0)
    return h("p", { class: "empty" }, found && found.steps.length < 2
      ? "Fork tokens need the rollout files of at least two steps."
      : "No token's probability rose after a token that was seen often enough at both ends of the run.");
  const top = found.forks.slice(0, 5);
  const plot = chart({
    title: "Probability of the token, given the one before",
    x: found.steps,
    range: [0, 1.02],
    lines: top.map((f, i) => ({ label: name(f), color: line(i), width: i === 0 ? 3 : 1.5, y: f.series })),
  });
  const rows = found.forks.map((f, i) => {
    const open = h("button", { type: "button", class: "link", title: "Show in the inspector", onclick: () => show(f, firstStep(found.steps, f)) }, chip(f.before, true), chip(f.token));
    return h("tr", {},
      h("td", {}, h("span", { class: "swatch", style: i < 5 ? `background:${line(i)}` : "" }), open),
      h("td", { class: "num" }, percent(f.first)),
      h("td", { class: "num" }, h("strong", {}, percent(f.last))),
      h("td", { class: "num" }, number(f.count)),
      h("td", { class: "num" }, signed(f.got)),
      h("td", { class: "num" }, signed(f.ppo)),
      h("td", { class: "num" }, f.raised > 0 ? percent(f.silenced / f.trained) : "–"),
    );
  });
  const table = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Fork tokens" },
    h("table", {},
      h("thead", {}, h("tr", {},
        h("th", {}, "token before, token"), h("th", { class: "num" }, "first"), h("th", { class: "num" }, "last"), h("th", { class: "num" }, "seen"),
        h("th", { class: "num", title: "Sum of −∂loss/∂log π over its occurrences: how hard the updates raised it (+) or lowered it (−)" }, "push it got"),
        h("th", { class: "num", title: "The same sum under PPO's clip 0.8 – 1.2, on the same tokens" }, "push under PPO"),
        h("th", { class: "num", title: "Share of its trained occurrences whose gradient PPO's clip would have removed" }, "PPO silences"))),
      h("tbody", {}, ...rows)));
  return h("div", { class: "two" }, plot, table);
}

/** @param {Fork} f */
function name(f) {
  return `${oneLine(f.before)} → ${oneLine(f.token)}`;
}

/** @param {string | null} piece @param {boolean} [context] */
function chip(piece, context = false) {
  return h("span", { class: context ? "chip context" : "chip" }, oneLine(piece));
}

/** @param {number | null} x */
function signed(x) {
  return x === null ? "–" : (x > 0 ? "+" : "") + number(x);
}

/** @param {number[]} steps @param {Fork} f */
function firstStep(steps, f) {
  return steps[Math.max(0, f.series.findIndex((p) => p !== null && p > 0))];
}

// What the runs were told, and in what they differ.
// @ts-check
import { fill, h } from "cispo/dom";

/** @param {import("cispo/data").Data} data */
export function configsView(data) {
  const runs = data.runs;
  const keys = [...new Set(runs.flatMap((r) => Object.keys(r.config)))];
  if (!keys.length) return h("p", { class: "empty" }, "No config.yaml could be read.");
  const differs = (/** @type {string} */ key) => runs.some((r) => text(r.config[key]) !== text(runs[0].config[key]));
  const body = h("tbody");
  let only = runs.length > 1, words = "";
  const draw = () => {
    const kept = keys.filter((k) => (!only || differs(k)) && (k.includes(words) || runs.some((r) => text(r.config[k]).includes(words))));
    fill(body, ...kept.map((key) => h("tr", { class: runs.length > 1 && differs(key) ? "differs" : "" }, h("th", { scope: "row" }, key), ...runs.map((r) => h("td", {}, text(r.config[key]))))));
    if (!kept.length) body.append(h("tr", {}, h("td", { colspan: runs.length + 1 }, only ? "The configs are equal." : "No key matches.")));
  };
  const filter = h("input", { type: "search", placeholder: "filter", "aria-label": "Filter the config", oninput: (/** @type {any} */ e) => {
    words = e.target.value;
    draw();
  } });
  const toggle = h("label", { class: "check" }, h("input", { type: "checkbox", checked: only, onchange: (/** @type {any} */ e) => {
    only = e.target.checked;
    draw();
  } }), " only what differs");
  draw();
  return h("div", {}, h("div", { class: "controls" }, filter, runs.length > 1 ? toggle : null),
    h("div", { class: "scroll config", tabindex: 0, role: "region", "aria-label": "Config" }, h("table", {}, runs.length > 1 ? h("thead", {}, h("tr", {}, h("th", {}, ""), ...runs.map((r) => h("th", {}, r.name)))) : null, body)));
}

/** @param {any} value */
function text(value) {
  return value === undefined ? "–" : value === null ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value);
}

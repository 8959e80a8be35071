// The page: its parts in order, the theme, and live updates.
// @ts-check
import { forget, redraw } from "cispo/charts";
import { line } from "cispo/colour";
import { configsView } from "cispo/configs";
import { comparisonView, curves, forecastView, headline } from "cispo/curves";
import { follow, load } from "cispo/data";
import { fill, h, select } from "cispo/dom";
import { duration, number, percent, rough } from "cispo/format";
import { forksView } from "cispo/forks";
import { Inspector } from "cispo/inspector";
import { describe } from "cispo/objectives";

export function start() {
  const data = load();
  const page = /** @type {HTMLElement} */ (document.getElementById("page"));
  const inspector = new Inspector(data);
  let forksOf = Math.max(0, data.runs.findIndex((r) => r.forks?.forks.length));
  const tiles = h("div", { class: "tiles" }), top = h("div"), forks = h("div"), all = h("div"), notes = h("div");
  const status = h("span", { class: "status", role: "status" });
  document.title = `${data.runs.map((r) => r.name).join(", ").slice(0, 80)} · cispo`;

  const drawForks = () => fill(forks,
    data.runs.length > 1 ? select("run", data.runs.map((r, i) => [String(i), r.name]), String(forksOf), (v) => {
      forksOf = Number(v);
      drawForks();
    }) : "",
    forksView(data.runs[forksOf], async (fork, step) => {
      if (inspector.run !== forksOf) await inspector.choose(forksOf);
      await inspector.open(step, fork);
      document.getElementById("inspector")?.scrollIntoView({ behavior: "smooth" });
    }));
  const draw = () => {
    fill(tiles, ...headTiles(data));
    fill(top, headline(data));
    drawForks();
    fill(all, curves(data));
    fill(notes, notesView(data));
    forget();
  };

  const sections = /** @type {[string, string, HTMLElement, string?][]} */ ([
    ["learned", "What was learned", top],
    ["forks", "Fork tokens", forks, "The tokens whose probability rose most over the run, given the token before them; what the updates did to them; and what PPO's clip would have left of it. A row opens the inspector."],
    ["inspector", "Token inspector", inspector.element, "One step, one prompt, its completions side by side. Point at a token, or move with the arrow keys, for its numbers."],
    ["curves", "Curves", all],
    ["config", data.runs.length > 1 ? "Configs and how they differ" : "Config", configsView(data)],
    ["notes", "What is missing or left out", notes],
  ]);
  page.append(
    h("header", { class: "top" },
      h("div", { class: "brand" }, h("h1", {}, data.runs.length === 1 ? data.runs[0].name : `${data.runs.length} runs`), status),
      h("p", { class: "muted" }, subtitle(data)),
      h("nav", { "aria-label": "Sections" }, ...sections.map(([id, title]) => h("a", { href: `#${id}` }, title)), themeButton())),
    h("main", {},
      tiles,
      recipesKey(data),
      data.comparison ? comparisonView(data.comparison) : "",
      data.forecast?.fits.length ? forecastView(data.forecast) : "",
      ...sections.map(([id, title, element, words]) => h("section", { id }, h("h2", {}, title), words ? h("p", { class: "lead" }, words) : null, element))),
    h("footer", {}, `Made by cispo, ${data.generated.replace("T", " ")}.`),
  );
  draw();
  if (data.live) {
    let waiting = 0;
    follow(data, () => {
      inspector.grown();
      window.clearTimeout(waiting);
      waiting = window.setTimeout(draw, 150);
    }, (text) => (status.textContent = text));
  }
  document.documentElement.dataset.ready = "true";
}

/** Which colour is which recipe, for all charts. @param {import("cispo/data").Data} data */
function recipesKey(data) {
  if (data.runs.length < 2) return "";
  return h("ul", { class: "key" }, ...data.recipes.map((r, i) => h("li", {},
    h("span", { class: "swatch", style: data.recipes.length > 1 ? `background:${line(i)}` : "" }), r.label,
    h("span", { class: "muted" }, ` ${r.runs.length} run${r.runs.length > 1 ? "s" : ""}`))));
}

/** @param {import("cispo/data").Data} data */
function subtitle(data) {
  const run = data.runs[0];
  if (data.runs.length > 1) return "";
  const c = run.config;
  const parts = [c["task.type"], describe(run.objective), c["algorithm.updates_per_rollout"] && `${c["algorithm.updates_per_rollout"]} updates per rollout`,
    c["rollout.groups_per_step"] && `${c["rollout.groups_per_step"]} prompts × ${c["rollout.group_size"]}`, run.seed !== null && `seed ${run.seed}`];
  return parts.filter(Boolean).join(" · ");
}

/** @param {import("cispo/data").Data} data */
function headTiles(data) {
  if (data.runs.length > 1) return [];
  const lines = data.runs[0].lines;
  const ends = (/** @type {string} */ name) => {
    const seen = lines.filter((l) => typeof l[name] === "number");
    return seen.length ? [seen[0][name], seen[seen.length - 1][name]] : null;
  };
  const arrow = (/** @type {string} */ label, /** @type {string} */ name, /** @type {(x: number) => string} */ show) => {
    const pair = ends(name);
    return pair ? h("div", { class: "tile" }, h("span", { class: "muted" }, label), h("b", {}, `${show(pair[0])} → ${show(pair[1])}`)) : "";
  };
  const last = lines[lines.length - 1] ?? {};
  const steps = data.runs[0].config.steps;
  const wall = lines.reduce((a, l) => a + (l["time/step_s"] ?? 0) + (l["time/eval_s"] ?? 0), 0);
  const worst = lines.reduce((a, l) => Math.max(a, l["clip/ppo_silenced"] ?? 0), 0);
  return [
    arrow("held-out accuracy", "eval/accuracy", percent),
    arrow("reward", "reward/mean", rough),
    arrow("entropy", "policy/entropy", rough),
    h("div", { class: "tile" }, h("span", { class: "muted" }, "PPO would silence up to"), h("b", {}, percent(worst), h("small", {}, " of a step's tokens"))),
    h("div", { class: "tile" }, h("span", { class: "muted" }, "steps"), h("b", {}, `${last.step ?? 0}${steps ? ` of ${steps}` : ""}`)),
    h("div", { class: "tile" }, h("span", { class: "muted" }, "time, tokens"), h("b", {}, `${duration(wall)}, ${number(last["tokens/total"])}`)),
  ];
}

/** @param {import("cispo/data").Data} data */
function notesView(data) {
  const all = data.runs.filter((r) => r.notes.length);
  if (!all.length) return h("p", { class: "muted" }, "Nothing: every step, group and token of the run folder is in this page.");
  return h("div", {}, ...all.map((r) => h("div", {}, data.runs.length > 1 ? h("h3", {}, r.name) : "", h("ul", {}, ...r.notes.map((n) => h("li", {}, n))))));
}

function themeButton() {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = h("button", { type: "button", class: "theme", onclick: () => {
    set(root.dataset.theme === "dark" ? "light" : "dark");
  } });
  const set = (/** @type {string} */ theme) => {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "☀ light" : "☾ dark";
    redraw();
  };
  set(dark.matches ? "dark" : "light");
  dark.addEventListener("change", (e) => set(e.matches ? "dark" : "light"));
  return button;
}

// The token inspector: one step, one group, its completions side by side, every token with its numbers.
// @ts-check
import { diverging, sequential } from "cispo/colour";
import { loadStep, ratio } from "cispo/data";
import { choice, fill, h, select } from "cispo/dom";
import { number, oneLine, percent, visible } from "cispo/format";
import { KNOWN, describe, silenced, weight } from "cispo/objectives";

/** @typedef {import("cispo/data").Data} Data */
/** @typedef {import("cispo/data").Step} Step */
/** @typedef {import("cispo/data").Group} Group */
/** @typedef {import("cispo/data").Completion} Completion */

const AT_ONCE = 1500; // tokens of one completion drawn before a person asks for the rest

/** What a token can be coloured by. `of` gives −1 … 1 (two colours) or 0 … 1 (one). */
const COLOURS = /** @type {const} */ ({
  weight: { label: "importance weight", two: true, low: "weight ¼", high: "weight 4",
    meaning: "r = π/μ as the objective uses it: clipped, and 0 where the token is silenced. Blue above 1, orange below." },
  push: { label: "gradient", two: true, low: "lowers it", high: "raises it",
    meaning: "−∂loss/∂log π: how hard the update raises (blue) or lowers (orange) this token, against the largest of the step." },
  change: { label: "log-prob change", two: true, low: "−1", high: "+1",
    meaning: "log π − log μ, from sampling to the first update that trained the token." },
  entropy: { label: "entropy", two: false, low: "0", high: "2 nats", meaning: "Entropy of the distribution that the token was drawn from." },
  surprise: { label: "surprise", two: false, low: "p = 1", high: "p ≤ 2 %", meaning: "How improbable the token was when it was sampled." },
});

export class Inspector {
  /** @param {Data} data */
  constructor(data) {
    this.data = data;
    this.run = 0;
    this.step = 0;
    this.group = 0;
    /** @type {keyof typeof COLOURS} */
    this.colour = "weight";
    this.objective = "own";
    /** @type {{before: string | null, token: string} | null} */
    this.fork = null;
    this.cursor = { completion: 0, token: 0 };
    this.playing = 0;
    /** @type {Step | null} */
    this.shown = null;
    this.element = h("div", { class: "inspector" });
    this.controls = h("div", { class: "controls" });
    this.map = h("div", { class: "map scroll", role: "group", "aria-label": "Groups of this step" });
    this.summary = h("p", { class: "summary", "aria-live": "polite" });
    this.legend = h("div", { class: "legend" });
    this.prompt = h("div", { class: "prompt" });
    this.cards = h("div", { class: "cards" });
    this.tip = h("div", { class: "tip", role: "status", hidden: true });
    const overview = h("div", { class: "overview" }, this.map, h("div", {}, this.summary, this.legend));
    this.element.append(this.controls, overview, this.prompt, this.cards, this.tip);
    this.cards.addEventListener("mouseover", (e) => this.#hover(e));
    this.cards.addEventListener("click", (e) => this.#hover(e));
    this.cards.addEventListener("mouseleave", () => (this.tip.hidden = true));
    this.cards.addEventListener("keydown", (e) => this.#key(e));
    const first = Math.max(0, data.runs.findIndex((r) => r.rollouts.length > 0));
    this.step = mostSilenced(data.runs[first]);
    const fork = data.runs[first].forks?.forks[0];
    this.choose(first).then(() => fork && this.open(this.step, fork));
  }

  get objectiveNow() {
    return this.objective === "own" ? this.data.runs[this.run].objective : KNOWN[this.objective];
  }

  /** A run; its first step that shows something. @param {number} run */
  choose(run) {
    this.run = run;
    const steps = this.data.runs[run].rollouts;
    this.step = steps.includes(this.step) ? this.step : steps[0] ?? 0;
    this.#controls();
    return this.open(this.step);
  }

  /** New rollout files are there (a live page). */
  grown() {
    const steps = this.data.runs[this.run].rollouts;
    if (!this.shown && steps.length) return this.choose(this.run);
    this.#slider();
  }

  /** @param {number} step @param {{before: string | null, token: string}} [fork] goes to the group that has most of it */
  async open(step, fork) {
    const steps = this.data.runs[this.run].rollouts;
    if (!steps.length) {
      fill(this.map, h("p", { class: "empty" }, "This run has no rollout files to inspect."));
      return;
    }
    // a step that is not in the page: the nearest that is
    this.step = steps.reduce((best, s) => (Math.abs(s - step) < Math.abs(best - step) ? s : best), steps[0]);
    try {
      this.shown = await loadStep(this.data, this.run, this.step);
    } catch (error) {
      fill(this.map, h("p", { class: "empty" }, `Step ${this.step} cannot be shown: ${/** @type {Error} */ (error).message}`));
      return;
    }
    if (fork) {
      this.fork = fork;
      const counts = this.shown.groups.map((g) => g.completions.filter((c) => this.#hasFork(c)).length);
      this.group = counts.indexOf(Math.max(...counts));
    }
    this.group = Math.min(this.group, this.shown.groups.length - 1);
    this.cursor = { completion: 0, token: 0 };
    this.draw();
  }

  draw() {
    this.#slider();
    this.#map();
    this.#summary();
    this.#legend();
    this.#group();
  }

  // ------------------------------------------------------------------------------------------------------ controls

  #controls() {
    const run = this.data.runs[this.run];
    this.slider = /** @type {HTMLInputElement} */ (h("input", {
      type: "range", min: 0, step: 1, "aria-label": "Step", oninput: () => {
        this.stop();
        this.open(run.rollouts[Number(this.slider?.value)]);
      },
    }));
    this.stepLabel = h("output", { class: "step" });
    this.play = h("button", { type: "button", title: "Play the steps in order", onclick: () => (this.playing ? this.stop() : this.start()) }, "▶ play");
    const row = [];
    if (this.data.runs.length > 1)
      row.push(select("run", this.data.runs.map((r, i) => [String(i), r.name]), String(this.run), (v) => this.choose(Number(v))));
    row.push(
      h("div", { class: "field grow" }, h("span", {}, "step ", this.stepLabel), h("div", { class: "row" }, this.slider, this.play)),
      choice("colour by", Object.entries(COLOURS).map(([k, c]) => [k, c.label, c.meaning]), this.colour, (v) => {
        this.colour = /** @type {any} */ (v);
        this.draw();
      }),
      choice("the same batch under", [
        ["own", "this run", describe(run.objective)], ["cispo", "CISPO", describe(KNOWN.cispo)],
        ["grpo", "GRPO", `${describe(KNOWN.grpo)}`], ["clip_higher", "clip-higher", `DAPO: ${describe(KNOWN.clip_higher)}`],
      ], this.objective, (v) => {
        this.objective = v;
        this.draw();
      }),
    );
    fill(this.controls, ...row);
    this.#slider();
  }

  #slider() {
    const steps = this.data.runs[this.run].rollouts;
    if (!this.slider || !this.stepLabel) return;
    this.slider.max = String(Math.max(0, steps.length - 1));
    this.slider.value = String(steps.indexOf(this.step));
    this.slider.setAttribute("aria-valuetext", `step ${this.step}`);
    this.stepLabel.textContent = steps.length ? String(this.step) : "–";
  }

  start() {
    const steps = this.data.runs[this.run].rollouts;
    if (steps.indexOf(this.step) === steps.length - 1) this.open(steps[0]);
    if (this.play) this.play.textContent = "❚❚ pause";
    this.playing = window.setInterval(() => {
      const next = steps[steps.indexOf(this.step) + 1];
      if (next === undefined) this.stop();
      else this.open(next);
    }, 700);
  }

  stop() {
    window.clearInterval(this.playing);
    this.playing = 0;
    if (this.play) this.play.textContent = "▶ play";
  }

  // ----------------------------------------------------------------------------------------------- the step's groups

  #map() {
    const step = /** @type {Step} */ (this.shown);
    const rewards = step.groups.flatMap((g) => g.completions.map((c) => c.reward ?? NaN)).filter((r) => !Number.isNaN(r));
    const low = Math.min(...rewards), high = Math.max(...rewards);
    // a server that trains for others knows no rewards: its completions are told apart by advantage
    const most = Math.max(0, ...step.groups.flatMap((g) => g.completions.map((c) => Math.abs(c.advantage ?? 0))));
    const tint = (/** @type {Completion} */ c) =>
      !rewards.length ? diverging(most ? (c.advantage ?? 0) / most : 0)
      : c.reward === null ? "transparent" : sequential(high > low ? (c.reward - low) / (high - low) : c.reward > 0 ? 1 : 0);
    const columns = step.groups.map((g, i) => {
      const mean = g.completions.reduce((a, c) => a + (c.reward ?? 0), 0) / g.completions.length;
      const forks = this.fork ? g.completions.filter((c) => this.#hasFork(c)).length : 0;
      const cells = g.completions.map((c) => h("span", {
        class: "cell" + (this.fork && this.#hasFork(c) ? " has-fork" : "") + (c.truncated ? " truncated" : ""),
        style: `background:${tint(c)}`,
      }));
      return h("button", {
        type: "button", class: "group", "aria-pressed": String(i === this.group),
        "aria-label": `Group ${i + 1}${rewards.length ? `, mean reward ${number(mean)}` : ""}${this.fork ? `, ${forks} with the fork token` : ""}`,
        title: promptText(g.prompt).slice(0, 200) + (rewards.length ? `\nmean reward ${number(mean)}` : ""),
        onclick: () => {
          this.group = i;
          this.cursor = { completion: 0, token: 0 };
          this.draw();
          /** @type {HTMLElement | null} */ (this.map.querySelector("[aria-pressed=true]"))?.focus({ preventScroll: true });
        },
      }, ...cells);
    });
    const partial = step.groups.length < step.groups_of ? ` · ${step.groups.length} of ${step.groups_of} groups are in this page` : "";
    const key = h("div", { class: "mapkey" },
      h("span", {}, h("i", { class: "cell", style: `background:${rewards.length ? sequential(0) : diverging(-1)}` }), rewards.length ? ` reward ${number(low)}` : ` advantage −${number(most)}`),
      h("span", {}, h("i", { class: "cell", style: `background:${rewards.length ? sequential(1) : diverging(1)}` }), rewards.length ? ` reward ${number(high)}` : ` advantage +${number(most)}`),
      this.fork ? h("span", {}, h("i", { class: "cell has-fork" }), " has ", h("span", { class: "chip" }, oneLine(this.fork.token))) : null,
      h("span", { class: "muted" }, `a column is a prompt, a square a completion${partial}`));
    fill(this.map, h("div", { class: "columns" }, ...columns), key);
  }

  /** @param {Completion} c */
  #hasFork(c) {
    if (!this.fork || !this.shown) return false;
    const { pieces } = this.shown;
    const token = pieces.indexOf(this.fork.token), before = this.fork.before === null ? -1 : pieces.indexOf(this.fork.before);
    for (let i = 0; i < c.tokens.length; i++)
      if (c.tokens[i] === token && (i === 0 ? this.fork.before === null : c.tokens[i - 1] === before)) return true;
    return false;
  }

  // ------------------------------------------------------------------------------------------------ what a step lost

  #summary() {
    const unknown = Number.isNaN(weight(this.objectiveNow, 1, 1));
    const step = /** @type {Step} */ (this.shown);
    let tokens = 0, trained = 0, cut = 0, force = 0, lost = 0;
    this.largest = 0;
    for (const g of step.groups)
      for (const c of g.completions) {
        tokens += c.tokens.length;
        for (let i = 0; i < c.tokens.length; i++) {
          const t = this.token(c, i);
          if (!t.trained) continue;
          trained++;
          this.largest = Math.max(this.largest, Math.abs(t.push) || 0);
          const unclipped = Math.abs(t.ratio * t.advantage * t.reduction);
          force += unclipped;
          if (t.weight === 0) {
            cut++;
            lost += unclipped;
          }
        }
      }
    const silent = step.groups.flatMap((g) => g.completions).reduce((n, c) => n + countSilenced(c), 0);
    const what = trained
      ? unknown && !this.largest
        ? `The gradient under ${describe(this.objectiveNow)} is not known here; PPO's 0.8 – 1.2 would silence ${number(silent)} of ${number(trained)} trained tokens.`
        : (trained < tokens ? `${number(trained)} of ${number(tokens)} tokens are trained (the others' advantage is 0). ` : `All ${number(tokens)} tokens are trained. `) +
          `${describe(this.objectiveNow)}: silences ${cut ? `${number(cut)} of them (${percent(cut / trained)}), with ${percent(lost / force)} of the unclipped gradient` : "none"}.` +
          (this.objective === "grpo" ? "" : ` PPO's 0.8 – 1.2 would silence ${number(silent)}.`)
      : step.groups.some((g) => g.completions.some((c) => c.reward !== null))
        ? "No token of this step was trained: every group's rewards are all equal."
        : "No token of this step was trained: every advantage is 0.";
    this.summary.textContent = what;
  }

  #legend() {
    const c = COLOURS[this.colour];
    const stops = Array.from({ length: 9 }, (_, i) => (c.two ? diverging(-1 + i / 4) : sequential(i / 8)));
    fill(this.legend,
      h("div", {}, c.low, h("span", { class: "ramp", style: `background:linear-gradient(90deg, ${stops.join(",")})` }), c.high),
      h("div", { class: "muted" }, c.meaning),
      h("div", {}, h("span", { class: "t silenced" }, "outlined"), " PPO's clip 0.8 – 1.2 would have silenced it ", h("span", { class: "t cut" }, "hatched"), " silenced under the chosen objective"));
  }

  // ------------------------------------------------------------------------------------------------------- one group

  #group() {
    const g = /** @type {Step} */ (this.shown).groups[this.group];
    if (!g) return;
    fill(this.prompt, h("span", { class: "muted" }, "prompt ", h("code", {}, String(g.prompt_id))), h("pre", { tabindex: 0 }, promptText(g.prompt)));
    fill(this.cards, ...g.completions.map((c, i) => this.#card(c, i)));
    this.tip.hidden = true;
  }

  /** @param {Completion} c @param {number} index */
  #card(c, index) {
    const badges = [
      c.correct === null ? null : h("span", { class: c.correct ? "badge good" : "badge" }, c.correct ? "✓ correct" : "✗ not correct"),
      c.truncated ? h("span", { class: "badge warn" }, "truncated") : null,
      c.trained ? null : h("span", { class: "badge" }, "not trained"),
    ];
    const more = Object.entries(c.rewards ?? {});
    const body = h("div", { class: "tokens", tabindex: 0, role: "application", "aria-label": `Completion ${c.sample}: arrow keys move from token to token`, "data-completion": index });
    this.#tokens(body, c, 0, AT_ONCE);
    return h("article", { class: "card" },
      h("header", {}, h("strong", {}, `#${c.sample}`), ...badges),
      h("dl", {},
        h("dt", {}, "reward"), h("dd", { title: more.map(([k, v]) => `${k}: ${number(v)}`).join("\n") }, number(c.reward)),
        h("dt", { title: "advantage" }, "adv."), h("dd", {}, c.advantage === null ? "–" : (c.advantage > 0 ? "+" : "") + number(c.advantage)),
        h("dt", {}, "tokens"), h("dd", {}, c.tokens.length),
        h("dt", { title: "the optimizer update of the step that trained it first" }, "update"), h("dd", {}, c.update ?? "–")),
      body);
  }

  /** @param {HTMLElement} body @param {Completion} c @param {number} from @param {number} to */
  #tokens(body, c, from, to) {
    const { pieces } = /** @type {Step} */ (this.shown);
    for (let i = from; i < Math.min(to, c.tokens.length); i++) {
      const t = this.token(c, i);
      const classes = ["t"];
      if (t.silenced) classes.push("silenced");
      if (t.trained && t.weight === 0) classes.push("cut");
      body.append(h("span", { class: classes.join(" "), "data-i": i, style: `background-color:${this.#tint(t)}` }, visible(pieces[c.tokens[i]])));
    }
    if (to < c.tokens.length)
      body.append(h("button", { type: "button", class: "link", onclick: (/** @type {any} */ e) => {
        e.target.remove();
        this.#tokens(body, c, to, to + 4 * AT_ONCE);
      } }, `… ${c.tokens.length - to} more tokens`));
  }

  /** Every number of one token under the chosen objective. @param {Completion} c @param {number} i */
  token(c, i) {
    const r = ratio(c, i), advantage = c.advantage ?? NaN, reduction = c.weightOf(i);
    const trained = c.trained && Number.isFinite(r) && advantage !== 0 && !(reduction === 0);
    const given = this.objective === "own" && c.given ? c.given[i] : NaN;
    const w = Number.isNaN(given) ? weight(this.objectiveNow, r, advantage) : given / (advantage * reduction);
    return {
      ratio: r, advantage, reduction, trained, weight: w, push: trained ? w * advantage * reduction : 0,
      sampler: c.sampler[i], logprob: c.logprobs ? c.logprobs[i] : NaN, entropy: c.entropy ? c.entropy[i] : NaN,
      silenced: trained && silenced(r, advantage), version: c.versionOf(i),
    };
  }

  /** @param {ReturnType<Inspector["token"]>} t */
  #tint(t) {
    switch (this.colour) {
      case "weight":
        return diverging(t.trained ? (t.weight > 0 ? Math.log(t.weight) / Math.log(4) : -1) : NaN);
      case "push":
        return diverging(t.trained && this.largest ? Math.sign(t.push) * Math.sqrt(Math.abs(t.push) / this.largest) : NaN);
      case "change":
        return diverging(t.logprob - t.sampler);
      case "entropy":
        return sequential(t.entropy / 2);
      case "surprise":
        return sequential(-t.sampler / -Math.log(0.02));
    }
  }

  // -------------------------------------------------------------------------------------------------------- the tip

  /** @param {Event} event */
  #hover(event) {
    const span = /** @type {HTMLElement} */ (event.target).closest?.(".t");
    if (!span) return;
    const body = /** @type {HTMLElement} */ (span.parentElement);
    this.cursor = { completion: Number(body.dataset.completion), token: Number(/** @type {HTMLElement} */ (span).dataset.i) };
    this.#point(/** @type {HTMLElement} */ (span));
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const body = /** @type {HTMLElement} */ (event.target).closest?.(".tokens");
    if (!body) return;
    const index = Number(/** @type {HTMLElement} */ (body).dataset.completion);
    const spans = /** @type {HTMLElement[]} */ ([...body.querySelectorAll(".t")]);
    if (index !== this.cursor.completion) this.cursor = { completion: index, token: -1 };
    let at = this.cursor.token;
    if (event.key === "ArrowRight" || event.key === "ArrowDown") at++;
    else if (event.key === "ArrowLeft" || event.key === "ArrowUp") at--;
    else if (event.key === "Home") at = 0;
    else if (event.key === "End") at = spans.length - 1;
    else if (event.key === "Escape") {
      this.tip.hidden = true;
      return;
    } else return;
    event.preventDefault();
    this.cursor.token = Math.max(0, Math.min(spans.length - 1, at));
    if (spans.length) this.#point(spans[this.cursor.token]);
  }

  /** @param {HTMLElement} span */
  #point(span) {
    const g = /** @type {Step} */ (this.shown).groups[this.group];
    const c = g.completions[this.cursor.completion], i = this.cursor.token;
    const t = this.token(c, i);
    for (const old of this.cards.querySelectorAll(".here")) old.classList.remove("here");
    span.classList.add("here");
    const { pieces } = /** @type {Step} */ (this.shown);
    const rows = /** @type {[string, string][]} */ ([
      ["log μ, at sampling", `${full(t.sampler)} (p ${percent(Math.exp(t.sampler))})`],
      ["log π, at its update", Number.isNaN(t.logprob) ? "–" : `${full(t.logprob)} (p ${percent(Math.exp(t.logprob))})`],
      ["ratio r = π/μ", full(t.ratio)],
      [`weight, ${this.objective === "own" ? "this run" : this.objective.replace("_", "-")}`, t.trained ? full(t.weight) : "–"],
      ["advantage A", full(t.advantage)],
      ["reduction's weight w", full(t.reduction)],
      ["gradient −∂loss/∂log π", t.trained ? full(t.push) : "0, not trained"],
      ["under PPO 0.8 – 1.2", t.trained ? full(weight(KNOWN.grpo, t.ratio, t.advantage) * t.advantage * t.reduction) : "–"],
      ["entropy", `${full(t.entropy)}`],
      ["written by version", number(t.version)],
    ]);
    fill(this.tip,
      h("div", { class: "tiphead" }, h("span", { class: "chip" }, oneLine(pieces[c.tokens[i]])), ` token ${i + 1} of ${c.tokens.length}`, t.silenced ? h("span", { class: "badge silent" }, "PPO silences") : ""),
      h("table", {}, h("tbody", {}, ...rows.map(([k, v]) => h("tr", {}, h("th", { scope: "row" }, k), h("td", { class: "num" }, v))))));
    this.tip.hidden = false;
    const at = span.getBoundingClientRect(), frame = this.element.getBoundingClientRect();
    const width = this.tip.offsetWidth, height = this.tip.offsetHeight;
    const below = at.bottom + height + 12 < window.innerHeight;
    this.tip.style.left = `${Math.max(0, Math.min(at.left - frame.left, frame.width - width))}px`;
    this.tip.style.top = `${below ? at.bottom - frame.top + 6 : at.top - frame.top - height - 6}px`;
  }
}

/** The step of a run at which PPO's clip would have silenced the most. @param {import("cispo/data").Run} run */
function mostSilenced(run) {
  let best = run.rollouts[0] ?? 0, most = -1;
  for (const l of run.lines)
    if ((l["clip/ppo_silenced"] ?? 0) > most && run.rollouts.includes(l.step)) [best, most] = [l.step, l["clip/ppo_silenced"]];
  return best;
}

/** @param {Completion} c */
function countSilenced(c) {
  if (!c.trained || !c.advantage) return 0;
  let n = 0;
  for (let i = 0; i < c.tokens.length; i++) if (silenced(ratio(c, i), c.advantage) && c.weightOf(i) !== 0) n++;
  return n;
}

/** @param {number} x */
function full(x) {
  if (x === null || Number.isNaN(x)) return "–";
  return x === 0 ? "0" : String(Number(x.toPrecision(5)));
}

/** A prompt as text: a string, or chat messages. @param {any} prompt */
export function promptText(prompt) {
  if (Array.isArray(prompt)) return prompt.map((m) => `${m.role ?? "?"}: ${typeof m.content === "string" ? m.content : JSON.stringify(m.content)}`).join("\n\n");
  return String(prompt ?? "");
}

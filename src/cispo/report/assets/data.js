// What the page shows, and where it comes from: embedded in the file, or from the server of `cispo watch`.
// @ts-check

/**
 * @typedef {{name: string, seed: number | null, config: Record<string, any>, objective: import("cispo/objectives").Objective, held_out: number | null,
 *   lines: Record<string, any>[], rollouts: number[], notes: string[], forks: Forks | null, steps: Record<string, any>}} Run
 * @typedef {{steps: number[], forks: Fork[]}} Forks
 * @typedef {{before: string | null, token: string, first: number, last: number, count: number, series: (number | null)[],
 *   got: number | null, ppo: number | null, raised: number, silenced: number, trained: number, worth: number}} Fork
 * @typedef {{label: string, runs: number[]}} Recipe
 * @typedef {{generated: string, live: boolean, names: Record<string, string>, recipes: Recipe[], runs: Run[],
 *   forecast?: any, comparison?: any}} Data
 * @typedef {{sample: number, reward: number | null, rewards: Record<string, number | null>, correct: boolean | null,
 *   advantage: number | null, truncated: boolean | null, trained: boolean, version: number | null, update: number | null,
 *   tokens: Uint32Array, sampler: Float32Array, logprobs: Float32Array | null, entropy: Float32Array | null, given: Float32Array | null,
 *   weightOf: (i: number) => number, versionOf: (i: number) => number}} Completion
 * @typedef {{admission: number, prompt_id: string, prompt: any, completions: Completion[]}} Group
 * @typedef {{pieces: string[], groups: Group[], groups_of: number}} Step
 */

/** @returns {Data} */
export function load() {
  return JSON.parse(/** @type {HTMLElement} */ (document.getElementById("data")).textContent ?? "{}");
}

/** @type {Map<string, Promise<Step>>} */
const steps = new Map();

/** One step's groups, decoded; fetched where the page is live. @param {Data} data @param {number} run @param {number} step */
export function loadStep(data, run, step) {
  const key = `${run}/${step}`;
  let found = steps.get(key);
  if (!found) {
    found = data.live
      ? fetch(`api/run/${run}/step/${step}`).then(async (answer) => {
          if (!answer.ok) throw new Error(await answer.text());
          return decode(await answer.json());
        })
      : Promise.resolve(decode(data.runs[run].steps[step]));
    found.catch(() => steps.delete(key));
    steps.set(key, found);
  }
  return found;
}

/** @param {any} raw @returns {Step} */
function decode(raw) {
  for (const group of raw.groups) group.completions = group.completions.map(completion);
  return raw;
}

/** @param {any} c @returns {Completion} */
function completion(c) {
  return {
    ...c,
    tokens: new Uint32Array(bytes(c.t)),
    sampler: floats(c.s) ?? new Float32Array(0),
    logprobs: floats(c.l),
    entropy: floats(c.e),
    given: floats(c.g ?? null), // −∂(w·loss)/∂log π where objectives.js does not know the run's objective
    weightOf: reader(c.w),
    versionOf: reader(c.v),
  };
}

/** @param {string} text base64 @returns {ArrayBuffer} */
function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
}

/** @param {string | null} text */
function floats(text) {
  return text === null ? null : new Float32Array(bytes(text));
}

/** @param {string | number | null} column one number for all tokens, or base64 @returns {(i: number) => number} */
function reader(column) {
  if (typeof column === "number") return () => column;
  const values = floats(column);
  return (i) => (values ? values[i] : NaN);
}

/** The importance ratio of token i; NaN where the trainer did not see it. @param {Completion} c @param {number} i */
export function ratio(c, i) {
  return c.logprobs ? Math.exp(c.logprobs[i] - c.sampler[i]) : NaN;
}

/**
 * Follow the server: new lines of metrics and new rollout files, as they are written.
 * @param {Data} data @param {() => void} changed @param {(text: string) => void} status
 */
export function follow(data, changed, status) {
  const source = new EventSource("api/events");
  source.addEventListener("run", (event) => {
    const news = JSON.parse(/** @type {MessageEvent} */ (event).data);
    const run = data.runs[news.run];
    if (news.restarted) {
      run.lines = [];
      steps.clear();
    }
    const last = run.lines.length ? run.lines[run.lines.length - 1].step : -1;
    run.lines.push(...news.lines.filter((/** @type {any} */ l) => news.restarted || l.step > last));
    run.rollouts = news.rollouts;
    run.notes = news.notes;
    if (news.forks) run.forks = news.forks;
    changed();
  });
  source.addEventListener("reload", () => {
    source.close();
    window.location.reload();
  });
  source.onopen = () => status("live");
  source.onerror = () => status("disconnected; trying again");
}

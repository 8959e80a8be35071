// What an objective does to one token, given its importance ratio r = π/μ and advantage A: the derivatives of
// objectives.py's formulas, which cites them. A test holds these to autograd of those.
// @ts-check

/** @typedef {{type: string, clip_low_threshold?: number | null, clip_high_threshold?: number | null,
 *   mask_low_threshold?: number | null, mask_high_threshold?: number | null, dual_clip?: number | null,
 *   negative_clip_low_threshold?: number | null, negative_clip_high_threshold?: number | null}} Objective */

/** @type {Record<string, Objective>} */
export const KNOWN = {
  cispo: { type: "cispo", clip_low_threshold: 0, clip_high_threshold: 4 },
  grpo: { type: "ppo_clip", clip_low_threshold: 0.8, clip_high_threshold: 1.2 },
  clip_higher: { type: "ppo_clip", clip_low_threshold: 0.8, clip_high_threshold: 1.28 },
};

/** Where PPO's clip leaves no gradient. @param {number} r @param {number} A */
export function silenced(r, A, low = 0.8, high = 1.2) {
  return (A > 0 && r > high) || (A < 0 && r < low);
}

/**
 * The weight on A·∇log π: clip(r) under CISPO, r or 0 under PPO.
 * @param {Objective} objective @param {number} r @param {number} A @returns {number} NaN for an objective that is
 * not written here: its gradient then comes with the data (`Completion.given`)
 */
export function weight(objective, r, A) {
  const low = objective.clip_low_threshold, high = objective.clip_high_threshold;
  switch (objective.type) {
    case "cispo": {
      const masked = silenced(r, A, objective.mask_low_threshold ?? 0, objective.mask_high_threshold ?? Infinity);
      if (masked) return 0;
      if (A < 0) return Math.min(Math.max(r, objective.negative_clip_low_threshold ?? low ?? 0), objective.negative_clip_high_threshold ?? high ?? 4);
      return Math.min(Math.max(r, low ?? 0), high ?? 4);
    }
    case "ppo_clip": {
      const dual = objective.dual_clip;
      const cut = silenced(r, A, low ?? 0.8, high ?? 1.2) || (dual != null && A < 0 && r > dual);
      return cut ? 0 : r;
    }
    case "importance_sampling":
      return r;
    case "reinforce":
      return 1;
  }
  return NaN;
}

/** @param {Objective} o */
export function describe(o) {
  const bounds = `${o.clip_low_threshold ?? (o.type === "cispo" ? 0 : 0.8)} – ${o.clip_high_threshold ?? (o.type === "cispo" ? 4 : 1.2)}`;
  switch (o.type) {
    case "cispo":
      return `CISPO, ratio clipped to ${bounds}`;
    case "ppo_clip":
      return `PPO clip ${bounds}`;
    case "importance_sampling":
      return "importance sampling";
    case "reinforce":
      return "REINFORCE";
  }
  return o.type;
}

// Colours that a colour-blind person can tell apart (Okabe and Ito), as tints over whatever the theme's ground is.
// @ts-check

const BLUE = "0 114 210", ORANGE = "224 108 0", TEAL = "0 150 130";

/** Lines of charts, in order; each is legible on both grounds. */
export const LINES = ["#2a86d6", "#e07b1a", "#12a181", "#c269a5", "#8a8f98", "#b79b12", "#5bb4e5", "#d4483b"];

/** @param {number} i */
export function line(i) {
  return LINES[i % LINES.length];
}

/** @param {string} hex @param {number} alpha */
export function faded(hex, alpha) {
  const n = parseInt(hex.slice(1), 16);
  return `rgb(${n >> 16} ${(n >> 8) & 255} ${n & 255} / ${alpha})`;
}

/** −1 … 1 as orange … nothing … blue. @param {number} x */
export function diverging(x) {
  if (Number.isNaN(x)) return "transparent";
  const size = Math.min(1, Math.abs(x));
  return `rgb(${x > 0 ? BLUE : ORANGE} / ${(0.75 * size).toFixed(3)})`;
}

/** 0 … 1 as nothing … teal. @param {number} x */
export function sequential(x) {
  if (Number.isNaN(x)) return "transparent";
  return `rgb(${TEAL} / ${(0.75 * Math.min(1, Math.max(0, x))).toFixed(3)})`;
}

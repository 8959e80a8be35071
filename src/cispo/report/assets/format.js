// Numbers, percentages and token texts as a person reads them.
// @ts-check

/** @param {number | null | undefined} x @returns {string} about three significant digits */
export function number(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size >= 1e12 || size < 1e-4) return x.toExponential(1).replace("e+", "e");
  if (size >= 1e9) return `${trim(x / 1e9)} G`;
  if (size >= 1e6) return `${trim(x / 1e6)} M`;
  if (size >= 1e4) return `${trim(x / 1e3)} k`;
  if (size >= 100) return x.toFixed(0);
  return trim(x);
}

/** @param {number} x */
function trim(x) {
  return String(Number(x.toPrecision(3)));
}

/** @param {number} x @returns {string} about two significant digits */
export function rough(x) {
  return Math.abs(x) >= 100 || x === 0 ? number(x) : String(Number(x.toPrecision(2)));
}

/** @param {number | null | undefined} x a share @returns {string} */
export function percent(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const p = 100 * x;
  if (p === 0) return "0 %";
  if (p > 0 && p < 0.1) return `${p.toPrecision(1)} %`;
  return `${p.toFixed(p < 10 && p % 1 ? 1 : 0)} %`;
}

/** @param {number} s @returns {string} */
export function duration(s) {
  if (s < 90) return `${number(s)} s`;
  if (s < 5400) return `${(s / 60).toFixed(0)} min`;
  return `${(s / 3600).toFixed(1)} h`;
}

/** A token's text with what is invisible made visible. @param {string} piece */
export function visible(piece) {
  return piece.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t").replace(/\r/g, "␍") || "∅";
}

/** A token's text on one line, quoted by its own box. @param {string | null} piece */
export function oneLine(piece) {
  if (piece === null) return "start";
  return piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
}

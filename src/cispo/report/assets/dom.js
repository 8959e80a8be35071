// The document, built from strings that are only ever text: nothing here parses HTML.
// @ts-check

/**
 * @param {string} tag
 * @param {Record<string, any>} [attributes] `on…` adds a listener, `class` and `style` as in HTML, false leaves it out
 * @param {...(Node | string | number | null | undefined)} children
 * @returns {HTMLElement}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((c) => c !== null && c !== undefined).map((c) => (c instanceof Node ? c : String(c))));
  return element;
}

/** @param {Element} element @param {...(Node | string)} children */
export function fill(element, ...children) {
  element.replaceChildren(...children);
  return element;
}

/**
 * A labelled <select>.
 * @param {string} label
 * @param {[string, string][]} options value and text
 * @param {string} value
 * @param {(value: string) => void} changed
 */
export function select(label, options, value, changed) {
  const box = h("select", { onchange: (/** @type {any} */ e) => changed(e.target.value) });
  for (const [v, text] of options) box.append(h("option", { value: v, selected: v === value }, text));
  return h("label", { class: "field" }, h("span", {}, label), box);
}

/**
 * A row of toggle buttons of which one is pressed.
 * @param {string} label
 * @param {[string, string, string?][]} options value, text, what it means
 * @param {string} value
 * @param {(value: string) => void} changed
 */
export function choice(label, options, value, changed) {
  const row = h("div", { class: "choice", role: "group", "aria-label": label });
  for (const [v, text, meaning] of options) {
    row.append(
      h("button", {
        type: "button", "data-value": v, "aria-pressed": String(v === value), title: meaning,
        onclick: () => {
          for (const b of row.children) b.setAttribute("aria-pressed", String(b.getAttribute("data-value") === v));
          changed(v);
        },
      }, text),
    );
  }
  return h("div", { class: "field" }, h("span", {}, label), row);
}

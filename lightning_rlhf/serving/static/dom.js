// Small helpers for elements. Texts are set as texts, never as HTML.

export const $ = (id) => document.getElementById(id);

/** Makes an element: properties, `on` for listeners, `data` for data attributes, `aria-*` and others as attributes. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [type, listener] of Object.entries(value)) element.addEventListener(type, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const icon = (name) => svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));

/** A round button with an icon, whose label is read out and shown as a tooltip. */
export const iconButton = (name, label, action, props = {}) =>
  h("button", { type: "button", className: "round", "aria-label": label, title: label, on: { click: action }, ...props },
    icon(name));

export const button = (text, action, props = {}) =>
  h("button", { type: "button", on: { click: action }, ...props }, text);

/** A text area that grows with its text. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** An editor in place of a text: Ctrl+Enter saves, Escape leaves. */
export function editor(text, label, saveLabel, cancelLabel, save, cancel) {
  const area = h("textarea", { className: "edit", value: text, "aria-label": label, on: { input: () => grow(area) } });
  const done = () => area.value.trim() && save(area.value);
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done();
    else if (event.key === "Escape") cancel();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  queueMicrotask(() => { grow(area); area.focus(); });
  return h("div", { className: "editor" }, area,
    h("div", { className: "choices" }, button(saveLabel, done, { className: "accent" }), button(cancelLabel, cancel)));
}

let timer = 0;
/** Shows a line for a while, perhaps with something to press. */
export function toast(text, action, run) {
  const box = $("toast");
  box.replaceChildren(h("span", {}, text));
  if (action) box.append(button(action, () => { box.hidden = true; run(); }, { className: "plain" }));
  box.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(() => { box.hidden = true; }, 8000);
}

/** Tells screen readers. */
export const announce = (text) => { $("status").textContent = text; };

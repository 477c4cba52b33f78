// The settings dialog.

import { $, button, h } from "./dom.js";
import { LANGUAGES, t } from "./i18n.js";
import { prefs, savePrefs } from "./prefs.js";

// name, least, most, step; those without a number may be empty
const SLIDERS = [
  ["temperature", 0, 2, 0.05], ["top_p", 0.05, 1, 0.01], ["top_k", 0, 200, 1], ["min_p", 0, 1, 0.01],
  ["repetition_penalty", 0.8, 2, 0.05],
];
const NUMBERS = [["max_tokens", 1], ["seed", 0]];

let number = 0;
function field(label, control, hint) {
  control.id ||= `field-${(number += 1)}`;
  const about = hint && h("small", { id: `${control.id}-hint` }, hint);
  if (about) control.setAttribute("aria-describedby", about.id);
  return h("div", { className: "field" }, h("label", { htmlFor: control.id }, label), control, about);
}

const select = (options, value, change) =>
  h("select", { on: { change: (event) => change(event.target.value) } },
    Object.entries(options).map(([key, text]) => h("option", { value: key, selected: key === value }, text)));

function slider(name, min, max, step) {
  const shown = h("output", {}, String(prefs.sampling[name]));
  const control = h("input", { type: "range", min, max, step, id: `set-${name}` });
  control.value = prefs.sampling[name];
  control.addEventListener("input", () => {
    prefs.sampling[name] = Number(control.value);
    shown.textContent = control.value;
    savePrefs();
  });
  const box = field(t(name), control, t(`${name}Hint`));
  box.firstChild.append(shown);
  return box;
}

function whole(name, least) {
  const control = h("input", { type: "number", min: least, max: 2 ** 31 - 1, step: 1, id: `set-${name}`, inputMode: "numeric" });
  control.value = prefs.sampling[name] ?? "";
  control.addEventListener("input", () => {
    const value = control.valueAsNumber;
    prefs.sampling[name] = Number.isInteger(value) && control.validity.valid ? value : null;
    savePrefs();
  });
  return field(t(name), control, t(`${name}Hint`));
}

/**
 * Opens the dialog.
 * @param chat its system prompt can be changed
 * @param changed called when something that shows has changed
 */
export function openSettings(chat, { hasReward, changed, systemChanged, deleteAll }) {
  const fill = () => {
    const system = h("textarea", { rows: 3, value: chat.system, id: "set-system" });
    system.addEventListener("input", () => {
      prefs.system = chat.system = system.value;
      savePrefs();
    });
    system.addEventListener("change", systemChanged);
    const language = select(LANGUAGES, prefs.language, (value) => { prefs.language = value; done(); $("set-language").focus(); });
    language.id = "set-language";
    const themes = { auto: t("auto"), light: t("light"), dark: t("dark") };
    const theme = select(themes, prefs.theme, (value) => { prefs.theme = value; done(); $("set-theme").focus(); });
    theme.id = "set-theme";
    const reward = h("input", { type: "checkbox", checked: prefs.showReward, id: "set-reward" });
    reward.addEventListener("change", () => { prefs.showReward = reward.checked; done(); $("set-reward").focus(); });
    const remove = button(t("deleteAll"), () => {
      if (remove.dataset.sure) deleteAll();
      remove.dataset.sure = "yes";
      remove.textContent = t("deleteAllSure");
    }, { className: "danger" });
    $("settings").querySelector(".fields").replaceChildren(
      field(t("system"), system, t("systemHint")),
      h("h3", {}, t("sampling")),
      ...SLIDERS.map((row) => slider(...row)),
      h("div", { className: "pair" }, ...NUMBERS.map((row) => whole(...row))),
      h("hr"),
      h("div", { className: "pair" }, field(t("language"), language), field(t("theme"), theme)),
      ...(hasReward ? [h("div", { className: "check" }, reward, h("label", { htmlFor: "set-reward" }, t("showReward")))] : []),
      h("div", { className: "choices" }, remove));
  };
  const done = () => { savePrefs(); changed(); fill(); };
  fill();
  $("settings").showModal();
}

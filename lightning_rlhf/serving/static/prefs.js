// Settings that outlive a chat.

const NAME = "lightning_rlhf.settings";
const DEFAULTS = {
  language: navigator.language.startsWith("zh") ? "zh" : "en",
  theme: "auto",
  system: "",
  sampling: { temperature: 0.7, top_p: 0.95, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: null, seed: null },
  models: [null, null],
  compare: false,
  blind: false,
  showReward: true,
};

function read() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

const stored = read();
export const prefs = { ...DEFAULTS, ...stored, sampling: { ...DEFAULTS.sampling, ...stored.sampling } };
export const savePrefs = () => localStorage.setItem(NAME, JSON.stringify(prefs));

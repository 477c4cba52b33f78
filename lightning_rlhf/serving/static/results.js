// The results dialog: win rates with intervals, and how often the reward model agrees.

import * as api from "./api.js";
import { $, h, svg } from "./dom.js";
import { t } from "./i18n.js";

const percent = (value) => `${Math.round(100 * value)} %`;

/** A bar with the rate and its interval, over 0 to 100 %. */
function bar({ rate, low, high }, label) {
  const x = (value) => (100 * value).toFixed(1);
  return svg("svg", { class: "bar", viewBox: "0 0 100 14", preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("rect", { class: "track", x: 0, y: 5, width: 100, height: 4, rx: 2 }),
    svg("line", { class: "middle", x1: 50, x2: 50, y1: 1, y2: 13 }),
    svg("line", { class: "interval", x1: x(low), x2: x(high), y1: 7, y2: 7 }),
    svg("line", { class: "mean", x1: x(rate), x2: x(rate), y1: 2, y2: 12 }),
    ...[low, high].map((end) => svg("line", { class: "interval", x1: x(end), x2: x(end), y1: 3, y2: 11 })));
}

function row(title, found, detail) {
  const numbers = `${percent(found.rate)} (${percent(found.low)} – ${percent(found.high)})`;
  return h("div", { className: "rate" },
    h("div", { className: "rate-head" }, h("strong", {}, title), h("span", {}, numbers)),
    bar(found, `${title}: ${numbers}`), h("small", {}, detail));
}

const section = (title, hint, rows) =>
  rows.length ? [h("h3", {}, title), hint && h("p", { className: "about" }, hint), ...rows] : [];

function content(found) {
  if (!found.votes) return [h("p", {}, t("noVotes"))];
  const votesOf = (scores) => t("votesOf", { n: scores.votes });
  const single = (key, scores) => (scores.votes ? [row(t(key), scores, `${t(`${key}Hint`)} · ${votesOf(scores)}`)] : []);
  const folder = found.folder;
  return [
    h("p", {}, t("votes", { n: found.votes, bad: found.both_bad })),
    ...section(t("winRates"), t("winRateHint"), found.pairs.map((pair) => row(t("pair", pair), pair, t("counts", pair)))),
    ...section(t("thumbs"), null, found.thumbs.map((one) => row(one.model, one, votesOf(one)))),
    h("hr"),
    ...single("agreement", found.reward), ...single("position", found.left),
    h("p", { className: "about" }, t("files", { folder })),
    h("pre", { tabIndex: 0 }, h("code", {}, `lightning-rlhf fit --config configs/reward/from_chat.yaml \\\n    --data.train ${folder}/preferences.jsonl`)),
  ];
}

export async function openResults() {
  const box = $("results").querySelector(".content");
  box.replaceChildren(h("p", {}, "…"));
  $("results").showModal();
  try {
    box.replaceChildren(...content(await api.votes()).filter(Boolean));
  } catch (error) {
    box.replaceChildren(h("p", { className: "note bad" }, error.message));
  }
}

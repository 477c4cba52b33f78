// The page: one chat is open, others may still be answered.

import * as api from "./api.js";
import { ballot, newChat, newVariant, shown, toMarkdown } from "./conversation.js";
import { $, announce, grow, h, iconButton, toast } from "./dom.js";
import { generate } from "./generate.js";
import * as history from "./history.js";
import { setLanguage, t } from "./i18n.js";
import { prefs, savePrefs } from "./prefs.js";
import { openResults } from "./results.js";
import { openSettings } from "./settings.js";
import { announceEnd, turnElement } from "./turns.js";

const OPEN = "lightning_rlhf.open"; // the chat of this tab
const SAVE_EVERY = 1000; // milliseconds, while an answer comes

let chat = newChat(prefs);
let served = [];
let hasReward = false;
let lastVote = null;
const running = new Map(); // id of a chat -> what stops its answers, and the chat

// ------------------------------------------------------------------------------------------------ what is shown

const view = () => ({ running: running.has(chat.id), showReward: prefs.showReward });
const elementOf = (turn) => document.querySelector(`[data-turn="${CSS.escape(turn.id)}"]`);

function drawChat() {
  $("empty").hidden = chat.turns.length > 0;
  $("turns").replaceChildren(...chat.turns.map((turn) => turnElement(turn, actions, view())));
  drawControls();
}

function redraw(turn) {
  elementOf(turn)?.replaceWith(turnElement(turn, actions, view()));
}

function drawControls() {
  const isRunning = running.has(chat.id);
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("send").disabled = !$("prompt").value.trim() || !served.length;
  const two = prefs.compare;
  $("compare").setAttribute("aria-pressed", String(two));
  $("blind").setAttribute("aria-pressed", String(prefs.blind));
  for (const id of ["blind", "versus", "model-1"]) $(id).hidden = !two;
  document.querySelector("main").classList.toggle("comparing", two);
  $("compare").title = t("compareHint");
  $("blind").title = t("blindHint");
}

async function drawHistory() {
  const chats = await history.all();
  $("history").replaceChildren(...chats.map((one) => {
    const title = one.title || t("untitled");
    const entry = h("button", { type: "button", className: "chat", on: { click: () => choose(one.id) } }, title);
    if (one.id === chat.id) entry.setAttribute("aria-current", "true");
    return h("li", {}, entry, iconButton("trash", t("deleteChat", { title }), () => remove(one)));
  }));
}

function drawModels() {
  for (const i of [0, 1]) {
    const names = served.map((model) => model.id);
    if (!names.includes(prefs.models[i])) prefs.models[i] = names[Math.min(i, names.length - 1)] ?? null;
    $(`model-${i}`).replaceChildren(
      ...names.map((name) => h("option", { value: name, selected: name === prefs.models[i] }, name)));
  }
}

function drawPage() {
  setLanguage(prefs.language);
  document.documentElement.dataset.theme = prefs.theme;
  $("starters").replaceChildren(...t("starters").map((text) =>
    h("button", { type: "button", on: { click: () => { $("prompt").value = text; send(); } } }, text)));
  $("help").querySelector("dl").replaceChildren(...t("keys").flatMap(([keys, what]) =>
    [h("dt", {}, ...keys.split(" + ").map((key) => h("kbd", {}, key))), h("dd", {}, what)]));
  drawChat();
  drawHistory();
}

// ------------------------------------------------------------------------------------------------ chats

const save = (one) => {
  one.updated = Date.now();
  return history.save(one).catch((error) => toast(error.message));
};

function open(one) {
  chat = running.get(one.id)?.chat ?? one;
  sessionStorage.setItem(OPEN, chat.id);
  lastVote = null;
  drawChat();
  drawHistory();
  showSidebar(false);
  toEnd(true);
}

async function choose(id) {
  const found = await history.load(id);
  if (found) open(found);
}

function startNew() {
  open(newChat(prefs));
  $("prompt").focus();
}

async function remove(one) {
  running.get(one.id)?.controller.abort();
  await history.remove(one.id);
  if (one.id === chat.id) startNew();
  await drawHistory();
  toast(t("chatDeleted"), t("undo"), async () => { await history.save(one); drawHistory(); });
}

async function deleteAll() {
  for (const one of await history.all()) await history.remove(one.id);
  $("settings").close();
  startNew();
  toast(t("allDeleted"));
}

history.onChange(async (id) => {
  if (id === chat.id && !running.has(id)) {
    const found = await history.load(id);
    if (found) { chat = found; drawChat(); }
  }
  drawHistory();
});

// ------------------------------------------------------------------------------------------------ answers

async function send() {
  const text = $("prompt").value.trim();
  if (!text || running.has(chat.id) || !served.length) return;
  $("prompt").value = "";
  grow($("prompt"));
  const turn = { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, user: text, variants: [], at: -1 };
  chat.turns.push(turn);
  chat.title ||= text.slice(0, 80);
  await answer(chat, turn);
}

/** Has a turn answered, once more if it was before. Earlier answers stay, unless they failed. */
async function answer(one, turn) {
  const variant = newVariant(one, turn, prefs);
  const failed = turn.variants.length && shown(turn).answers.every((x) => x.error || !x.finish) && !shown(turn).answers[0].content;
  if (failed) turn.variants.splice(turn.at, 1);
  turn.variants.push(variant);
  turn.at = turn.variants.length - 1;
  const controller = new AbortController();
  running.set(one.id, { controller, chat: one });
  await save(one);
  if (one === chat) { drawChat(); drawHistory(); toEnd(true); }
  announce(t("writing"));
  let saved = Date.now();
  const waiting = new Set();
  const changed = (i) => {
    if (Date.now() - saved > SAVE_EVERY) { saved = Date.now(); save(one); }
    if (!waiting.size) requestAnimationFrame(() => { drawAnswers(one, turn, waiting); waiting.clear(); });
    waiting.add(i);
  };
  await generate(variant, { reward: hasReward, signal: controller.signal, changed });
  running.delete(one.id);
  for (const x of variant.answers) if (x.error === "lost") x.error = t("lost");
  await save(one);
  if (one === chat) { drawChat(); drawHistory(); toEnd(); }
  announceEnd(variant);
  if (variant.answers.some((x) => x.needsKey)) askKey();
  if (variant.answers.some((x) => x.unreachable)) watchServer();
}

function drawAnswers(one, turn, sides) {
  if (one !== chat) return;
  for (const i of sides) elementOf(turn)?.querySelector(`[data-side="${i}"]`)?.update();
  toEnd();
}

const last = () => chat.turns.at(-1);

const actions = {
  redraw,
  async editPrompt(turn, text) {
    if (running.has(chat.id)) return;
    const one = chat;
    const before = structuredClone(one.turns);
    const place = one.turns.indexOf(turn);
    one.turns = [...one.turns.slice(0, place), { ...turn, id: `${turn.id}+`, user: text, variants: [], at: -1 }];
    toast(t("undoCut"), t("undo"), () => {
      running.get(one.id)?.controller.abort();
      one.turns = before;
      save(one);
      if (one === chat) drawChat();
    });
    await answer(one, one.turns[place]);
  },
  async again(turn) {
    if (!running.has(chat.id)) await answer(chat, turn);
  },
  show(turn, at) {
    turn.at = at;
    save(chat);
    redraw(turn);
  },
  vote: (turn, variant, choice) => ballots(turn, variant, () => { variant.vote = choice && { choice }; }),
  thumb: (turn, variant, choice) =>
    ballots(turn, variant, () => { variant.vote = variant.vote?.choice === choice ? null : { choice }; }),
  // a field that a redraw removes says that it has changed, too
  comment: (turn, variant) =>
    variant.vote && variant.comment !== variant.saved && ballots(turn, variant, () => {}, "commentSaved"),
  editAnswer: (turn, variant, i, content) =>
    ballots(turn, variant, () => { variant.edited = content === variant.answers[i].content ? null : { answer: i, content }; }),
  async copy(text) {
    await navigator.clipboard?.writeText(text);
    toast(t("copied"));
  },
};

let voting = Promise.resolve();
/** Votes, one after the other, however fast somebody presses. */
const ballots = (...what) => (voting = voting.then(() => revise(...what)));

/** Changes what a person thinks of a variant: the new vote is written first, and then the old one is taken back. */
async function revise(turn, variant, change, says) {
  const one = chat;
  const before = structuredClone({ vote: variant.vote, edited: variant.edited });
  const old = variant.ballot;
  change();
  const isVote = variant.vote || variant.edited;
  let made = null;
  try {
    if (isVote) {
      made = await api.vote(ballot(variant));
      const stale = [...(variant.stale ?? []), old].filter(Boolean);
      Object.assign(variant, { ballot: made.id, saved: variant.comment, stale });
    }
    while (variant.stale?.length) { await takeBack(variant.stale[0]); variant.stale.shift(); }
    if (!isVote && old) { await takeBack(old); variant.ballot = null; }
    if (isVote) {
      lastVote = { turn, variant, before };
      toast(t(says ?? (made.preferences || made.unpaired ? "voteSaved" : "voteKept")), t("undo"), undoLast);
    } else {
      toast(t("undone"));
    }
  } catch (error) {
    if (!made) Object.assign(variant, before);
    toast(error instanceof api.Unreachable ? t("unreachable") : error.message);
    if (error.status === 401) askKey();
    if (error instanceof api.Unreachable) watchServer();
  }
  await save(one);
  if (one === chat) {
    const focused = document.activeElement?.dataset?.vote;
    redraw(turn);
    if (focused) elementOf(turn)?.querySelector("[data-vote]")?.focus();
  }
}

/** Takes a vote back, unless that was done before, such as by another tab. */
const takeBack = (id) => api.undo(id).catch((error) => { if (error.status !== 404) throw error; });

/** Goes back to what was thought before. */
async function undoLast() {
  if (!lastVote) return;
  const { turn, variant, before } = lastVote;
  lastVote = null;
  await ballots(turn, variant, () => Object.assign(variant, before));
}

function voteByKey(choice) {
  const variant = last()?.variants[last().at];
  const isReady = variant?.answers.length === 2 && variant.answers.every((x) => x.finish && !x.error);
  if (isReady && !variant.vote && !running.has(chat.id)) actions.vote(last(), variant, choice);
}

// ------------------------------------------------------------------------------------------------ scrolling, dialogs

let follows = true;
function toEnd(force = false) {
  const box = $("scroller");
  if (force) follows = true;
  if (follows) box.scrollTop = box.scrollHeight;
}

$("scroller").addEventListener("scroll", () => {
  const box = $("scroller");
  follows = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  $("latest").hidden = follows;
});

function showSidebar(on) {
  document.body.classList.toggle("with-sidebar", on);
  $("shade").hidden = !on;
  $("menu").setAttribute("aria-expanded", String(on));
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
  $("exports").close();
}

const named = (end) => `${(chat.title || t("title")).replace(/[\\/:*?"<>|\s]+/g, " ").trim().slice(0, 40)}.${end}`;

function askKey() {
  if (!$("key").open) $("key").showModal();
}

// ------------------------------------------------------------------------------------------------ the server

async function connect() {
  const [found, health] = [await api.models(), await api.health()];
  served = found;
  hasReward = health.reward !== null;
  drawModels();
  drawControls();
}

let watching = false;
/** Says that the server does not answer, until it does. */
async function watchServer() {
  if (watching) return;
  watching = true;
  for (let waits = 1000; ; waits = Math.min(10_000, waits * 1.5)) {
    try {
      await connect();
      if (!$("banner").hidden) announce(t("back"));
      $("banner").hidden = true;
      break;
    } catch (error) {
      if (error.status === 401) { askKey(); break; }
      $("banner").textContent = error instanceof api.Unreachable ? t("unreachable") : error.message;
      $("banner").hidden = false;
    }
    await new Promise((resolve) => setTimeout(resolve, waits));
  }
  watching = false;
}

// ------------------------------------------------------------------------------------------------ listeners

const click = (id, action) => $(id).addEventListener("click", action);
click("new", startNew);
click("send", send);
click("stop", () => running.get(chat.id)?.controller.abort());
click("menu", () => showSidebar(!document.body.classList.contains("with-sidebar")));
click("shade", () => showSidebar(false));
click("latest", () => toEnd(true));
for (const id of ["open-results", "open-help", "open-settings"]) click(id, () => showSidebar(false));
click("open-results", openResults);
click("open-help", () => $("help").showModal());
click("open-settings", () => openSettings(chat, {
  hasReward, changed: drawPage, deleteAll, systemChanged: () => chat.turns.length && save(chat),
}));
click("export", () => $("exports").showModal());
click("export-markdown", () => download(named("md"), "text/markdown", toMarkdown(chat, { title: t("title"), you: t("you"), edited: t("edited") })));
click("export-json", () => download(named("json"), "application/json", JSON.stringify(chat, null, 2)));
click("export-all", async () => download("chats.json", "application/json", JSON.stringify(await history.all(), null, 2)));
click("key-save", () => { api.setKey($("key-input").value.trim()); $("key").close(); watchServer(); });
$("key-input").addEventListener("keydown", (event) => { if (event.key === "Enter") $("key-save").click(); });
for (const [id, name] of [["compare", "compare"], ["blind", "blind"]]) {
  click(id, () => { prefs[name] = !prefs[name]; savePrefs(); drawControls(); });
}
for (const i of [0, 1]) {
  $(`model-${i}`).addEventListener("change", (event) => { prefs.models[i] = event.target.value; savePrefs(); });
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector(".close")?.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog && dialog.id !== "key") dialog.close(); });
}

$("prompt").addEventListener("input", () => { grow($("prompt")); drawControls(); });
$("prompt").addEventListener("keydown", (event) => {
  // Enter that ends the input of Chinese characters sends nothing
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
});

const ALT = {
  Digit1: () => voteByKey("left"), Digit2: () => voteByKey("right"), Digit3: () => voteByKey("tie"),
  Digit4: () => voteByKey("both_bad"), KeyN: startNew,
  KeyR: () => last()?.variants.length && actions.again(last()),
  KeyZ: undoLast,
};
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.altKey && !event.ctrlKey && !event.metaKey && ALT[event.code]) ALT[event.code]();
  else if (event.key === "Escape") { running.get(chat.id)?.controller.abort(); showSidebar(false); return; }
  else if (event.key === "/" && !isTyping) $("prompt").focus();
  else if (event.key === "?" && !isTyping) $("help").showModal();
  else return;
  event.preventDefault();
});

// ------------------------------------------------------------------------------------------------ start

const before = sessionStorage.getItem(OPEN);
if (before) chat = (await history.load(before)) ?? chat;
sessionStorage.setItem(OPEN, chat.id);
drawPage();
toEnd(true);
await watchServer();
if (matchMedia("(pointer: fine)").matches) $("prompt").focus();

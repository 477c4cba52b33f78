// How turns look: the user's text, answers, what can be done with them, votes.

import { accepted, shown } from "./conversation.js";
import { announce, button, editor, grow, h, icon, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { render } from "./markdown.js";

const NOTES = { stopped: "stoppedNote", length: "lengthNote" };
const VOTED = { left: "votedLeft", right: "votedRight", tie: "votedTie", both_bad: "votedBothBad" };
const CHOICES = [["left", "left"], ["right", "right"], ["tie", "tie"], ["both_bad", "bothBad"]];

/** Whether a variant may show names and rewards: they would sway a blind vote. */
const open = (variant) => !variant.blind || variant.vote !== null;
const complete = (variant) => variant.answers.every((answer) => answer.finish && !answer.error);

/**
 * Makes the element of a turn.
 * @param actions what its buttons call: editPrompt, again, show, vote, undo, comment, thumb, editAnswer, copy
 * @param view { running, showReward }
 */
export function turnElement(turn, actions, view) {
  const box = h("div", { className: "turn", data: { turn: turn.id } });
  box.append(questionElement(turn, actions, view));
  if (turn.variants.length) box.append(answersElement(turn, actions, view));
  return box;
}

function questionElement(turn, actions, view) {
  const text = h("div", { className: "bubble" }, turn.user);
  const box = h("article", { className: "question", "aria-label": t("you") }, text);
  const edit = () => {
    const back = () => box.replaceWith(questionElement(turn, actions, view));
    box.replaceChildren(
      editor(turn.user, t("editPrompt"), t("saveSend"), t("cancel"), (value) => actions.editPrompt(turn, value), back));
  };
  if (!view.running) box.append(h("div", { className: "actions" }, iconButton("edit", t("editPrompt"), edit)));
  return box;
}

function answersElement(turn, actions, view) {
  const variant = shown(turn);
  const two = variant.answers.length === 2;
  const box = h("div", { className: two ? "answers two" : "answers" });
  box.append(...variant.answers.map((_, i) => answerElement(turn, variant, i, actions, view)));
  const rows = [box];
  if (two && !view.running) {
    const buttons = turnButtons(turn, variant, actions);
    rows.push(complete(variant) ? voteElement(turn, variant, actions, buttons)
      : h("div", { className: "actions turn-actions" }, ...buttons));
  }
  return h("div", { className: two ? "wide-turn" : "" }, ...rows);
}

function answerElement(turn, variant, i, actions, view) {
  const answer = variant.answers[i];
  const two = variant.answers.length === 2;
  const name = open(variant) ? answer.model : t("hidden");
  const won = variant.vote?.choice === ["left", "right"][i];
  const label = two ? `${t("answerSide", { side: t("side")[i] })}, ${name}` : t("answerBy", { name });
  const box = h("article", { className: `answer${won ? " won" : ""}`, "aria-label": label, data: { side: i } });
  const head = h("div", { className: "by" });
  if (two) head.append(h("span", { className: "side" }, t("side")[i]));
  head.append(h("span", { className: open(variant) ? "name" : "name hidden-name" }, name));
  const text = h("div", { className: "text" });
  const foot = h("div", { className: "foot" });
  box.append(head, text, foot);
  box.update = () => updateAnswer(box, turn, variant, i, actions, view);
  box.update();
  return box;
}

/** Brings an answer's text, notes and score up to date, also while it is written. */
function updateAnswer(box, turn, variant, i, actions, view) {
  const answer = variant.answers[i];
  const [, text, foot] = box.children;
  const isWriting = !answer.finish && !answer.error && view.running;
  const edited = variant.edited?.answer === i;
  box.classList.toggle("writing", isWriting);
  box.setAttribute("aria-busy", String(isWriting));
  render(text, edited ? variant.edited.content : answer.content, (pre) => addCopy(pre, actions));
  const notes = [];
  if (answer.dropped) notes.push(t("dropped", { n: answer.dropped }));
  if (answer.error) notes.push(t("failed", { reason: answer.error }));
  else if (NOTES[answer.finish]) notes.push(t(NOTES[answer.finish]));
  else if (answer.finish && !answer.content.trim()) notes.push(t("emptyAnswer"));
  else if (!answer.finish && !view.running) notes.push(t("interrupted"));
  if (edited) notes.push(t("editedNote"));
  foot.replaceChildren(...notes.map((note) => h("p", { className: answer.error ? "note bad" : "note" }, note)));
  if (edited) foot.append(originalElement(answer));
  const row = h("div", { className: "actions" });
  if (view.showReward && answer.reward !== null && open(variant)) {
    row.append(h("span", { className: "reward", title: t("rewardHint") }, t("reward", { x: answer.reward.toFixed(2) })));
  }
  if (isWriting) {
    if (!answer.content) row.append(h("span", { className: "dots", "aria-hidden": "true" }, h("i"), h("i"), h("i")));
  } else if (answer.content && !answer.error) {
    row.append(iconButton("copy", t("copy"), () => actions.copy(edited ? variant.edited.content : answer.content)));
    if (answer.finish) row.append(iconButton("edit", t("editAnswer"), () => editAnswer(box, turn, variant, i, actions)));
    if (answer.finish && variant.answers.length === 1) row.append(...thumbs(turn, variant, actions));
  }
  if (variant.answers.length === 1 && !view.running) row.append(...turnButtons(turn, variant, actions));
  if (row.children.length) foot.append(row);
}

function thumbs(turn, variant, actions) {
  return [["up", "good"], ["down", "bad"]].map(([name, choice]) => {
    const pressed = variant.vote?.choice === choice;
    return iconButton(name, t(choice), () => actions.thumb(turn, variant, choice),
      { "aria-pressed": String(pressed), data: { vote: choice } });
  });
}

function originalElement(answer) {
  const text = h("div", { className: "text" });
  render(text, answer.content, () => {});
  return h("details", { className: "original" }, h("summary", {}, t("original")), text);
}

function editAnswer(box, turn, variant, i, actions) {
  const [, text, foot] = box.children;
  const now = variant.edited?.answer === i ? variant.edited.content : variant.answers[i].content;
  text.replaceChildren(editor(now, t("editAnswer"), t("save"), t("cancel"),
    (value) => actions.editAnswer(turn, variant, i, value), () => actions.redraw(turn)));
  text.raws = [];
  foot.replaceChildren();
}

function voteElement(turn, variant, actions, buttons) {
  const box = h("div", { className: "vote", role: "group", "aria-label": t("voteTitle") });
  const row = h("div", { className: "choices" });
  if (variant.vote) {
    const side = variant.vote.choice === "right" ? 1 : 0;
    box.append(h("p", {}, t(VOTED[variant.vote.choice]), variant.edited ? null : t("goesOn", { side: t("side")[side] })));
    row.append(button(t("undo"), () => actions.vote(turn, variant, null), { data: { vote: "undo" } }));
  } else {
    box.append(h("p", {}, t("voteTitle")));
    CHOICES.forEach(([choice, key], i) => row.append(button(t(key), () => actions.vote(turn, variant, choice),
      { data: { vote: choice }, title: `Alt + ${i + 1}`, "aria-keyshortcuts": `Alt+${i + 1}` })));
  }
  row.append(...buttons);
  const area = h("textarea", {
    className: "comment", rows: 1, value: variant.comment, placeholder: t("commentHint"), "aria-label": t("comment"),
    maxLength: 10000,
    on: { input: () => { variant.comment = area.value; grow(area); }, change: () => actions.comment(turn, variant) },
  });
  box.append(row, area);
  return box;
}

/** What can be done with a turn as a whole: step through its variants, have it answered again. */
function turnButtons(turn, variant, actions) {
  const buttons = [];
  if (turn.variants.length > 1) {
    const step = (by) => () => actions.show(turn, turn.at + by);
    buttons.push(
      iconButton("left", t("earlier"), step(-1), { disabled: turn.at === 0 }),
      h("span", { className: "place" }, t("of", { i: turn.at + 1, n: turn.variants.length })),
      iconButton("right", t("later"), step(1), { disabled: turn.at === turn.variants.length - 1 }));
  }
  const failed = variant.answers.some((answer) => answer.error || !answer.finish);
  buttons.push(failed
    ? button(t("retry"), () => actions.again(turn), { className: "accent small", data: { again: "" } })
    : iconButton("again", t("again"), () => actions.again(turn), { data: { again: "" } }));
  return buttons;
}

function addCopy(pre, actions) {
  const code = pre.querySelector("code");
  const language = code.className.match(/language-(\S+)/)?.[1] ?? "";
  const copy = h("button", { type: "button", className: "round", title: t("copy"), "aria-label": t("copy"),
    on: { click: () => actions.copy(code.textContent) } }, icon("copy"));
  pre.tabIndex = 0; // to scroll it by the keyboard
  pre.before(h("div", { className: "code-head" }, h("span", {}, language === "text" ? "" : language), copy));
}

/** Tells screen readers how answers ended. */
export function announceEnd(variant) {
  const failed = variant.answers.find((answer) => answer.error);
  announce(failed ? t("failed", { reason: failed.error }) : `${t("finished")} ${accepted(variant).slice(0, 300)}`);
}

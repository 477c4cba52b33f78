// What a chat is, without any display.
//
// A chat has turns. A turn has the user's text and variants: one per time that it was answered. A variant has one answer,
// or two to compare, in the order in which they are shown; perhaps a vote, a comment and an edited answer.

export const newChat = (prefs) => ({
  id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // randomUUID is there on secure origins only
  title: "",
  created: Date.now(),
  updated: Date.now(),
  system: prefs.system,
  turns: [],
});

export const newAnswer = (model, seed) => ({
  model, seed, content: "", finish: null, reward: null, dropped: 0, tokens: null, error: null,
});

export const shown = (turn) => turn.variants[turn.at];

/** The text with which the chat goes on: the edited answer, the one that won, or else the left one. */
export function accepted(variant) {
  if (variant.edited) return variant.edited.content;
  return variant.answers[variant.vote?.choice === "right" ? 1 : 0].content;
}

/** The messages before the answer to a turn. */
export function messagesBefore(chat, turn) {
  const messages = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  for (const one of chat.turns) {
    messages.push({ role: "user", content: one.user });
    if (one === turn) break;
    const text = one.variants.length ? accepted(shown(one)) : "";
    if (text) messages.push({ role: "assistant", content: text });
    else messages.pop(); // a turn without an answer, such as one that failed
  }
  return messages;
}

/** Makes a variant for a turn: which models answer, on which side, by which seeds. */
export function newVariant(chat, turn, prefs) {
  const { seed, ...sampling } = prefs.sampling;
  const first = seed === null ? Math.floor(Math.random() * 2 ** 31) : seed + turn.variants.length;
  const names = prefs.compare ? [...prefs.models] : [prefs.models[0]];
  const blind = prefs.compare && prefs.blind;
  if (blind && Math.random() < 0.5) names.reverse();
  // both sides get one seed; a model beside itself gets another, or it would say the same twice
  const answers = names.map((name, i) => newAnswer(name, i && name === names[0] ? first + 1 : first));
  return { messages: messagesBefore(chat, turn), answers, blind, sampling, vote: null, comment: "", edited: null };
}

/** The messages that the models read: the server may have left out the oldest, but never the system prompt. */
function messagesRead({ messages, answers }) {
  const first = messages[0].role === "system" ? 1 : 0;
  const dropped = Math.max(...answers.map((answer) => answer.dropped));
  return [...messages.slice(0, first), ...messages.slice(first + dropped)];
}

/** The vote in the form that the server takes. */
export function ballot(variant) {
  const sampling = Object.fromEntries(Object.entries(variant.sampling).filter(([, value]) => value !== null));
  return {
    messages: messagesRead(variant),
    answers: variant.answers.map(({ model, content, reward, finish, seed }) => ({
      model, content, reward, finish_reason: finish, seed,
    })),
    vote: variant.vote?.choice ?? null,
    edited: variant.edited,
    comment: variant.comment.trim() || null,
    blind: variant.blind,
    sampling,
  };
}

export function toMarkdown(chat, words) {
  const lines = [`# ${chat.title || words.title}`, ""];
  if (chat.system.trim()) lines.push(`> ${chat.system.trim().replaceAll("\n", "\n> ")}`, "");
  for (const turn of chat.turns) {
    lines.push(`## ${words.you}`, "", turn.user, "");
    if (!turn.variants.length) continue;
    const variant = shown(turn);
    for (const answer of variant.answers) lines.push(`## ${answer.model}`, "", answer.content, "");
    if (variant.edited) lines.push(`## ${words.edited}`, "", variant.edited.content, "");
  }
  return lines.join("\n");
}

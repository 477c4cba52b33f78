// Gets the answers of a variant from the server, both at once, so that the server makes them in one batch.

import * as api from "./api.js";

/**
 * Fills a variant's answers while they come.
 * @param changed called with the number of the answer that has changed
 * @param signal stops them; what has come until then stays
 */
export async function generate(variant, { reward, signal, changed }) {
  await Promise.all(variant.answers.map((answer, i) => one(variant, answer, reward, signal, () => changed(i))));
}

async function one(variant, answer, reward, signal, changed) {
  const { max_tokens: limit, ...sampling } = variant.sampling;
  const body = {
    model: answer.model, messages: variant.messages, seed: answer.seed, truncation: "auto", ...sampling,
    ...(limit && { max_completion_tokens: limit }), ...(reward && { reward: true }),
  };
  try {
    for await (const chunk of api.chat(body, signal)) {
      answer.dropped = chunk.dropped_messages ?? answer.dropped;
      for (const choice of chunk.choices) {
        answer.content += choice.delta.content ?? "";
        answer.finish = choice.finish_reason ?? answer.finish;
        answer.reward = choice.reward ?? answer.reward;
      }
      changed();
    }
    answer.finish ??= "stop";
  } catch (error) {
    if (error.name === "AbortError") answer.finish ??= "stopped";
    else fail(answer, error);
  }
  changed();
}

function fail(answer, error) {
  answer.error = error instanceof api.Unreachable ? "lost" : error.message;
  answer.unreachable = error instanceof api.Unreachable;
  answer.needsKey = error.status === 401;
}

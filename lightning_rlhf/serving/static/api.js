// Requests to the server.

const KEY = "lightning_rlhf.key"; // for this tab only

export class ServerError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The server did not answer, or stopped on the way. */
export class Unreachable extends Error {}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function request(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
    response = await fetch(path, { ...options, body: body && JSON.stringify(body) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable(error.message);
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new ServerError(error?.message ?? `${response.status} ${response.statusText}`, response.status, error?.code);
}

const json = async (path, body) => (await request(path, body)).json();

export const models = async () => (await json("/v1/models")).data;
export const health = () => json("/health");
export const votes = () => json("/v1/votes");
export const vote = (body) => json("/v1/votes", body);
export const undo = (id) => json("/v1/votes/undo", { id });

/** Streams an answer: yields the server's chunks until it says that it is done. */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let found;
    try {
      found = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Unreachable(error.message);
    }
    if (found.done) throw new Unreachable("the stream ended early");
    const events = (held + found.value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, 0, chunk.error.code);
      yield chunk;
    }
  }
}

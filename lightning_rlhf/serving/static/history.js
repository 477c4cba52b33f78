// Chats, kept in this browser: IndexedDB holds more than localStorage does. Tabs tell each other what has changed.

const channel = new BroadcastChannel("lightning_rlhf.chats");
let opened;

const promised = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

function open() {
  if (!opened) {
    const request = indexedDB.open("lightning_rlhf", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
    opened = promised(request);
  }
  return opened;
}

const store = async (mode) => (await open()).transaction("chats", mode).objectStore("chats");

export async function all() {
  const chats = await promised((await store("readonly")).getAll());
  return chats.sort((a, b) => b.updated - a.updated);
}

export const load = async (id) => promised((await store("readonly")).get(id));

export async function save(chat) {
  await promised((await store("readwrite")).put(structuredClone(chat)));
  channel.postMessage(chat.id);
}

export async function remove(id) {
  await promised((await store("readwrite")).delete(id));
  channel.postMessage(id);
}

/** Calls back with the id of a chat that another tab has saved or removed. */
export const onChange = (listener) => channel.addEventListener("message", (event) => listener(event.data));

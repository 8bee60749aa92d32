// What this browser keeps: settings, the key, and conversations, each under a key of its own so that two tabs
// writing different ones do not undo each other.  Knows nothing of the page.

const CHAT = "jaxserve.chat.";
const SETTINGS = "jaxserve.settings";
const KEY = "jaxserve.key";
const THEME = "jaxserve.theme";

// Where storage is off (private windows, blocked site data) everything lasts as long as the tab.
function usable(name) {
  try {
    const storage = window[name];
    storage.setItem("jaxserve.probe", "1");
    storage.removeItem("jaxserve.probe");
    return storage;
  } catch {
    const map = new Map();
    return {
      getItem: (key) => map.get(key) ?? null,
      setItem: (key, value) => map.set(key, value),
      removeItem: (key) => map.delete(key),
      key: (index) => [...map.keys()][index] ?? null,
      get length() {
        return map.size;
      },
    };
  }
}

const local = usable("localStorage");
const session = usable("sessionStorage");

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null; // written by something else
  }
}

/** All conversations, the one written to last first. */
export function conversations() {
  const found = [];
  for (let index = 0; index < local.length; index++) {
    const key = local.key(index);
    if (!key?.startsWith(CHAT)) continue;
    const chat = read(local, key);
    if (chat && Array.isArray(chat.messages)) found.push(chat);
  }
  return found.sort((a, b) => b.updated - a.updated);
}

export function newConversation(system) {
  const id = [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join("");
  const now = Date.now();
  return { id, title: "", created: now, updated: now, system, messages: [] };
}

/** Keeps a conversation.  Returns false where the browser has no room left. */
export function save(chat) {
  try {
    local.setItem(CHAT + chat.id, JSON.stringify(chat));
    return true;
  } catch {
    return false;
  }
}

export function forget(chat) {
  local.removeItem(CHAT + chat.id);
}

/** The id of the conversation that a change of storage in another tab is about, or null. */
export function changed(event) {
  return event.key?.startsWith(CHAT) ? event.key.slice(CHAT.length) : null;
}

export const settings = { system: "", stop: "", parameters: {}, sidebar: true, panel: false, ...read(local, SETTINGS) };

export function saveSettings() {
  try {
    local.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // no room: they last as long as the tab
  }
}

export const key = {
  get: () => session.getItem(KEY) ?? local.getItem(KEY) ?? "",
  kept: () => local.getItem(KEY) !== null,
  set(value, keep) {
    session.removeItem(KEY);
    local.removeItem(KEY);
    if (value) (keep ? local : session).setItem(KEY, value);
  },
};

export const theme = {
  get: () => local.getItem(THEME) ?? "auto",
  set(value) {
    if (value === "auto") {
      local.removeItem(THEME);
      delete document.documentElement.dataset.theme;
    } else {
      local.setItem(THEME, value);
      document.documentElement.dataset.theme = value;
    }
  },
};

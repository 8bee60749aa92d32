// The chat page: which conversation is open, what runs, and what the buttons do.

import { ServerError, chat, models } from "./api.js";
import { askForKey, chosen, setLimit, setUp } from "./panels.js";
import * as store from "./store.js";
import { $, button, copyWith, element, fit, isSend, messageNode, update } from "./view.js";

const IDEAS = [
  "Explain how a rainbow forms, in three sentences.",
  "Write a Python function that tells whether a word is a palindrome.",
  "Compare tea and coffee in a small table.",
  "Give me five names for a grey cat.",
];

let current = null; // the conversation that is shown
let limit = 0; // tokens that the model holds
const runs = new Map(); // conversation id -> {stop, chat, message, ended}
const removed = new Set(); // ids of conversations that a run must not bring back
const nodes = new Map(); // message -> its node, of the current conversation

// Conversations.

function open(conversation) {
  current = conversation;
  $("system").value = conversation.system;
  nodes.clear();
  $("log").replaceChildren(...conversation.messages.map(node));
  $("welcome").hidden = conversation.messages.length > 0;
  document.title = conversation.title ? `${conversation.title} · jaxserve` : "jaxserve";
  if (!matchMedia("(min-width: 900px)").matches && $("sidebar").open) $("sidebar").close();
  listConversations();
  showState();
  toEnd(true);
}

/** Rows stay in their place as long as they can: one that is taken out while it is pressed is not clicked. */
function listConversations() {
  const kept = store.conversations();
  const list = $("conversations");
  for (const row of [...list.children]) if (!kept.some(({ id }) => id === row.conversation.id)) row.remove();
  kept.forEach((conversation, index) => {
    const row = [...list.children].find((other) => other.conversation.id === conversation.id) ?? rowOf(conversation);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
    row.conversation = conversation;
    row.classList.toggle("live", runs.has(conversation.id));
    row.firstChild.textContent = conversation.title || "New conversation";
    if (conversation.id === current.id) row.firstChild.setAttribute("aria-current", "page");
    else row.firstChild.removeAttribute("aria-current");
  });
}

function rowOf(conversation) {
  const choose = element("button");
  const row = element("li", "", choose, button("Delete", "trash", () => remove(row.conversation)));
  choose.type = "button";
  choose.addEventListener("click", () => {
    open(runs.get(row.conversation.id)?.chat ?? row.conversation);
    $("input").focus();
  });
  row.conversation = conversation;
  return row;
}

function keep(conversation) {
  if (removed.has(conversation.id)) return;
  if (!store.save(conversation)) say("This browser has no room left: delete old conversations to keep this one.");
}

function remove(conversation) {
  removed.add(conversation.id);
  runs.get(conversation.id)?.stop.abort();
  store.forget(conversation);
  if (conversation.id === current.id) open(store.newConversation(store.settings.system));
  else listConversations();
  say("Deleted.", "Undo", () => {
    removed.delete(conversation.id);
    store.save(conversation);
    listConversations();
  });
}

function say(text, action, act) {
  const [words, undo] = $("toast").children;
  words.textContent = text;
  undo.hidden = !action;
  undo.textContent = action ?? "";
  undo.onclick = () => {
    $("toast").hidden = true;
    act();
  };
  $("toast").hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => ($("toast").hidden = true), 6000);
}

// Messages.

function node(message) {
  const conversation = current;
  const at = () => conversation.messages.indexOf(message);
  const actions = {
    isLast: () => conversation.messages.at(-1) === message,
    isLive: () => runs.get(conversation.id)?.message === message,
    again: () => answer(conversation, at()),
    edit: async (text) => {
      const run = runs.get(conversation.id);
      run?.stop.abort();
      await run?.ended;
      conversation.messages.splice(at());
      send(conversation, text);
    },
  };
  const made = messageNode(message, actions);
  if (message.role === "assistant") made.update = () => update(made, message, actions);
  nodes.set(message, made);
  return made;
}

function send(conversation, text) {
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= text.replace(/\s+/g, " ").slice(0, 60);
  answer(conversation, conversation.messages.length);
}

/** Streams an answer into the place `at`, in place of whatever is there and after. */
function answer(conversation, at) {
  if (runs.has(conversation.id)) return;
  const message = { role: "assistant", content: "", reasoning: "", figures: {}, finish: null, error: null };
  conversation.messages.splice(at, Infinity, message);
  conversation.updated = Date.now();
  const run = { stop: new AbortController(), chat: conversation, message };
  runs.set(conversation.id, run);
  keep(conversation);
  open(conversation);
  $("spoken").textContent = "The model is answering.";
  run.ended = follow(run);
}

/** A run to its end, whatever ends it. */
async function follow({ stop, chat: conversation, message }) {
  try {
    await stream(conversation, message, stop.signal);
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else fail(message, error);
  }
  runs.delete(conversation.id);
  conversation.updated = Date.now();
  keep(conversation);
  if (conversation === current) {
    const end = atEnd();
    nodes.get(message)?.update();
    showState();
    toEnd(end);
  }
  listConversations();
  $("spoken").textContent = message.error ?? (message.finish === "stopped" ? "Stopped." : "The answer is complete.");
}

async function stream(conversation, message, signal) {
  const messages = conversation.messages.slice(0, conversation.messages.indexOf(message));
  // A question that got no answer is not asked again: two in a row are more than many chat templates take.
  const answered = (index) => messages[index].content && (messages[index + 1]?.content ?? true);
  const sent = messages.filter((_, index) => answered(index)).map(({ role, content }) => ({ role, content }));
  if (conversation.system.trim()) sent.unshift({ role: "system", content: conversation.system });
  const body = { model: await modelName(), messages: sent, ...chosen() };
  const pace = { began: performance.now() };
  let pieces = 0;
  for await (const chunk of chat(body, store.key.get(), signal)) {
    const [choice] = chunk.choices;
    const { content = "", reasoning_content: reasoning = "" } = choice?.delta ?? {};
    if (content || reasoning) {
      pieces++;
      message.content += content ?? "";
      message.reasoning += reasoning ?? "";
    }
    message.finish = choice?.finish_reason ?? message.finish;
    count(message.figures, chunk.usage, pieces, pace);
    if (conversation === current) paint(message);
  }
}

/** Figures of an answer: the server's where it tells them, else a chunk is taken for a token. */
function count(figures, usage, pieces, pace) {
  figures.tokens = usage?.completion_tokens ?? Math.max(pieces, figures.tokens ?? 0);
  if (usage) {
    figures.prompt = usage.prompt_tokens;
    figures.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
  if (!pieces) return;
  const now = performance.now();
  pace.first ??= { at: now, tokens: figures.tokens }; // a busy server puts several tokens into a chunk
  figures.first = (pace.first.at - pace.began) / 1000;
  const seconds = (now - pace.first.at) / 1000;
  const more = figures.tokens - pace.first.tokens;
  if (more > 0 && seconds > 0.05) figures.rate = more / seconds;
}

function fail(message, error) {
  message.finish = "error";
  message.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
  if (error.wait) message.error += ` Try again in ${error.wait} s.`;
  if (error.status === 401) refused();
}

// What is on the screen.

let painting = 0;
function paint(message) {
  painting ||= requestAnimationFrame(() => {
    painting = 0;
    const end = atEnd();
    nodes.get(message)?.update();
    if (end) toEnd(true);
    else $("latest").hidden = false;
  });
}

const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 48;

function toEnd(anyway = false) {
  if (anyway || atEnd()) $("scroll").scrollTop = $("scroll").scrollHeight;
}

function showState() {
  const live = runs.has(current.id);
  $("log").ariaBusy = String(live);
  $("go").replaceChildren(...button("", live ? "stop" : "send", () => {}).childNodes);
  $("go").ariaLabel = live ? "Stop" : "Send";
  $("go").classList.toggle("stop", live);
  $("go").disabled = !live && !$("input").value.trim();
}

// The server.

/** The list is empty until the server has answered, which may take longer than a first question. */
const modelName = async () => $("model").value || (await models(store.key.get()))[0].id;

async function connect() {
  try {
    const served = await models(store.key.get());
    $("light-state").dataset.state = "ready";
    $("model-name").textContent = served[0].id;
    $("model-name").hidden = served.length > 1;
    $("model").hidden = served.length < 2;
    $("model").replaceChildren(...served.map(({ id }) => new Option(id)));
    limit = served[0].max_model_len ?? 0;
    if (limit) setLimit(limit);
    $("welcome-note").textContent = `Ask ${served[0].id.split("/").at(-1)}. Conversations stay in this browser.`;
  } catch (error) {
    $("light-state").dataset.state = "gone";
    $("model-name").textContent = error.status === 401 ? "needs a key" : "not reachable";
    if (error.status === 401) refused();
    else setTimeout(connect, 3000);
  }
}

function refused() {
  askForKey(store.key.get() ? "The server refused this key." : "This server asks for a key.");
}

function exported(kind) {
  if (kind === "json") return JSON.stringify(current, null, 2);
  const parts = [`# ${current.title || "Conversation"}`];
  if (current.system) parts.push(`> ${current.system.replaceAll("\n", "\n> ")}`);
  for (const { role, content } of current.messages) parts.push(`## ${role === "user" ? "You" : "Model"}`, content);
  return parts.join("\n\n") + "\n";
}

function download(kind) {
  const type = kind === "json" ? "application/json" : "text/markdown";
  const url = URL.createObjectURL(new Blob([exported(kind)], { type }));
  const anchor = element("a");
  anchor.href = url;
  anchor.download = `${(current.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.${kind}`;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  $("exports").open = false;
}

// Buttons and keys.

for (const id of ["new", "new-too"]) {
  $(id).addEventListener("click", () => {
    open(store.newConversation(store.settings.system));
    $("input").focus();
  });
}
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const run = runs.get(current.id);
  const text = $("input").value.trim();
  if (run) run.stop.abort();
  else if (text) {
    $("input").value = "";
    fit($("input"));
    send(current, text);
  }
});
$("input").addEventListener("input", () => {
  fit($("input"));
  showState();
});
$("input").addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  if (!runs.has(current.id)) $("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog:modal")) runs.get(current.id)?.stop.abort();
});
document.addEventListener("click", (event) => {
  if (event.target.copies) copyWith(event.target, event.target.copies());
  if (!$("exports").contains(event.target)) $("exports").open = false;
});
for (const kind of $("exports").querySelectorAll("[data-export]")) {
  kind.addEventListener("click", () => download(kind.dataset.export));
}
$("scroll").addEventListener("scroll", () => ($("latest").hidden = atEnd()), { passive: true });
$("latest").addEventListener("click", () => toEnd(true));
window.addEventListener("storage", (event) => {
  const id = store.changed(event);
  if (!id) return;
  const other = store.conversations().find((conversation) => conversation.id === id);
  if (id === current.id && other && !runs.has(id)) open(other);
  else listConversations();
});
window.addEventListener("pagehide", () => {
  for (const { chat: conversation } of runs.values()) store.save(conversation);
});

setUp({
  changedSystem(text) {
    current.system = store.settings.system = text;
    store.saveSettings();
    if (current.messages.length) keep(current);
  },
  changedKey: connect,
});
$("ideas").append(
  ...IDEAS.map((idea) => {
    const choose = element("button", "", idea);
    choose.type = "button";
    choose.addEventListener("click", () => send(current, idea));
    return element("li", "", choose);
  }),
);
open(store.conversations()[0] ?? store.newConversation(store.settings.system));
connect();
if (!matchMedia("(pointer: coarse)").matches) $("input").focus();

// How messages look.  Knows no server and keeps nothing: it is given a message and what may be done with it.

import { render } from "./markdown.js";

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** An element: its class, then its children. */
export function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export function button(label, name, action) {
  const made = element("button", "icon small", icon(name));
  made.type = "button";
  made.title = made.ariaLabel = label;
  made.addEventListener("click", () => action(made));
  return made;
}

/** Puts text into the clipboard, in pages without HTTPS too.  Returns whether that worked. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", "unseen");
    area.value = text;
    document.body.append(area);
    area.select();
    const worked = document.execCommand("copy");
    area.remove();
    return worked;
  }
}

/** Copies and says so on the button for a moment. */
export async function copyWith(made, text) {
  const worked = await copy(text);
  const before = [...made.childNodes];
  made.replaceChildren(made.classList.contains("icon") ? icon(worked ? "done" : "close") : worked ? "Copied" : "Failed");
  setTimeout(() => made.replaceChildren(...before), 1500);
}

/** The node of a message; actions: {again, edit, isLast, isLive} as functions. */
export function messageNode(message, actions) {
  const node = element("article", `message ${message.role}`);
  node.ariaLabel = message.role === "user" ? "You" : "Model";
  if (message.role === "user") {
    const text = element("div", "bubble");
    text.textContent = message.content;
    const tools = element("div", "tools");
    tools.append(button("Edit", "edit", () => editNode(node, message, actions)));
    tools.append(button("Copy", "copy", (made) => copyWith(made, message.content)));
    node.append(text, tools);
  } else {
    const tools = element("footer", "tools", element("span", "figures"));
    node.append(element("div", "thought"), element("div", "text"), element("div", "failure"), tools);
    update(node, message, actions);
  }
  return node;
}

/** Makes an answer's node show what the answer is by now. */
export function update(node, message, actions) {
  const [thought, text, failure, tools] = node.children;
  const live = actions.isLive();
  showThought(thought, message, live);
  render(text, message.content);
  text.classList.toggle("live", live);
  node.classList.toggle("waiting", live && !message.content && !message.reasoning);
  failure.hidden = !message.error;
  failure.textContent = message.error ?? "";
  showTools(tools, message, actions, live);
}

/** Buttons that are still wanted stay the elements that they are: one that is replaced while it is pressed is not clicked. */
function showTools(tools, message, actions, live) {
  const figures = tools.lastChild;
  figures.textContent = figuresOf(message, live);
  const copies = !live && Boolean(message.content);
  const again = !live && actions.isLast();
  if (tools.dataset.shown === `${copies} ${again}`) return;
  tools.dataset.shown = `${copies} ${again}`;
  tools.replaceChildren(figures);
  if (copies) figures.before(button("Copy", "copy", (made) => copyWith(made, message.content)));
  if (again) figures.before(button("Regenerate", "again", actions.again));
}

function showThought(parent, message, live) {
  if (!message.reasoning) {
    parent.replaceChildren();
    return;
  }
  const thinking = live && !message.content;
  if (!parent.firstChild) {
    parent.append(element("details", "", element("summary"), element("div", "text")));
  }
  const [summary, text] = parent.firstChild.children;
  summary.textContent = thinking ? "Thinking…" : "Thought";
  if (parent.firstChild.dataset.was !== String(thinking)) parent.firstChild.open = thinking;
  parent.firstChild.dataset.was = String(thinking);
  render(text, message.reasoning);
}

/** One line: tokens, speed, wait, length of the prompt. */
function figuresOf(message, live) {
  const figures = message.figures;
  if (!figures?.tokens) return live ? "" : message.finish === "stopped" ? "stopped" : "";
  const parts = [`${figures.tokens.toLocaleString("en")} token${figures.tokens === 1 ? "" : "s"}`];
  if (figures.rate) parts.push(`${figures.rate.toFixed(1)} tokens/s`);
  if (figures.first !== undefined) parts.push(`first after ${figures.first.toFixed(2)} s`);
  if (figures.prompt) {
    const cached = figures.cached ? ` (${figures.cached.toLocaleString("en")} cached)` : "";
    parts.push(`prompt ${figures.prompt.toLocaleString("en")}${cached}`);
  }
  if (message.finish === "length") parts.push("cut at the most tokens");
  if (message.finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function editNode(node, message, actions) {
  const area = element("textarea", "");
  area.value = message.content;
  area.ariaLabel = "Edit the message";
  const [cancel, send] = ["Cancel", "Send"].map((name) => element("button", name === "Send" ? "filled" : "outlined", name));
  cancel.type = "button";
  const form = element("form", "edit", area, element("div", "buttons", cancel, send));
  const back = () => form.replaceWith(...before);
  const before = [...node.childNodes];
  node.replaceChildren(form);
  fit(area);
  area.focus();
  area.addEventListener("input", () => fit(area));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      back();
    } else if (isSend(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  cancel.addEventListener("click", back);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value.trim()) actions.edit(area.value.trim());
  });
}

/** As high as its text. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Whether a key sends: Enter alone; not while a character is being composed, nor on a phone, whose Enter is a new line. */
export function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches;
}

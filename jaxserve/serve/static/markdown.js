// A model's text as nodes of the page.  Blocks that did not change keep their nodes, so that a selection in an answer, or
// the scroll of a wide table, outlives the next token.

import { blocks } from "./blocks.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

/** Makes `container` show `text`; called again as the text grows. */
export function render(container, text) {
  const wanted = blocks(text);
  const old = [...container.children];
  wanted.forEach((block, index) => {
    const same = old[index];
    if (same && same.source === block.source && same.kind === block.type) return;
    const node = build(block);
    node.source = block.source;
    node.kind = block.type;
    if (same) same.replaceWith(node);
    else container.append(node);
  });
  for (const node of old.slice(wanted.length)) node.remove();
}

const make = (name, className = "") => {
  const element = document.createElement(name);
  if (className) element.className = className;
  return element;
};

const worded = (name, text) => {
  const element = make(name);
  inline(element, text);
  return element;
};

function build(block) {
  switch (block.type) {
    case "code":
      return code(block);
    case "heading":
      return worded(`h${Math.min(block.level + 2, 6)}`, block.text); // below the page's own
    case "rule":
      return make("hr");
    case "quote":
      return filled(make("blockquote"), block.blocks);
    case "list":
      return list(block);
    case "table":
      return table(block);
    default:
      return worded("p", block.text);
  }
}

function filled(parent, inside) {
  parent.append(...inside.map(build));
  return parent;
}

function list(block) {
  const element = make(block.ordered ? "ol" : "ul");
  if (block.ordered && block.start !== 1) element.start = block.start;
  for (const item of block.items) {
    const row = make("li");
    if (item.done !== null) {
      const box = make("input");
      box.type = "checkbox";
      box.disabled = true;
      box.checked = item.done;
      row.className = "task";
      row.append(box);
    }
    for (const inner of item.blocks) {
      if (inner.type === "paragraph" && !block.loose) inline(row, inner.text);
      else row.append(build(inner));
    }
    element.append(row);
  }
  return element;
}

function table(block) {
  const row = (name, texts) => {
    const line = make("tr");
    texts.forEach((text, column) => {
      const cell = worded(name, text);
      if (block.align[column]) cell.className = block.align[column];
      line.append(cell);
    });
    return line;
  };
  const [frame, element, head, body] = ["div", "table", "thead", "tbody"].map((name) => make(name));
  frame.className = "table";
  frame.tabIndex = 0; // it may scroll sideways
  frame.role = "region";
  frame.ariaLabel = "Table";
  head.append(row("th", block.head));
  body.append(...block.rows.map((texts) => row("td", texts)));
  element.append(head, body);
  frame.append(element);
  return frame;
}

function code(block) {
  const [frame, bar, name, button] = ["figure", "figcaption", "span", "button"].map((tag) => make(tag));
  const [pre, text] = [make("pre"), make("code")];
  frame.className = "code";
  name.textContent = block.language.split(/\s/, 1)[0] || "text";
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.copies = () => block.text;
  bar.append(name, button);
  pre.tabIndex = 0;
  text.append(highlight(block.text, name.textContent.toLowerCase()));
  pre.append(text);
  frame.append(bar, pre);
  return frame;
}

// Markdown's blocks: lines of text to a tree of plain objects.  Every line is looked at once a level, and levels are few,
// so that no text of a model takes long.  HTML is no syntax here: it stays the text that it is.

const DEEPEST = 8; // quotes and lists in one another; further in, they are text

/** Text to [{type, source, ...}]; source is the block's own lines, equal where nothing changed. */
export function blocks(text) {
  return parse(text.replaceAll("\r\n", "\n").split("\n"), 0);
}

function parse(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at++;
      continue;
    }
    const start = at;
    const block =
      code(lines, at) ??
      heading(lines, at) ??
      rule(lines, at) ??
      (depth < DEEPEST ? (quote(lines, at, depth) ?? list(lines, at, depth)) : null) ??
      table(lines, at) ??
      paragraph(lines, at, depth);
    at = block.end;
    block.source = lines.slice(start, at).join("\n");
    found.push(block);
  }
  return found;
}

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;

function fence(line) {
  const text = line.trimStart();
  const mark = text[0];
  if (mark !== "`" && mark !== "~") return null;
  let length = 0;
  while (text[length] === mark) length++;
  const info = text.slice(length).trim();
  return length >= 3 && !(mark === "`" && info.includes("`")) ? { mark, length, info, indent: indent(line) } : null;
}

function code(lines, at) {
  const open = fence(lines[at]);
  if (!open) return null;
  const text = [];
  for (let line = at + 1; line < lines.length; line++) {
    const close = fence(lines[line]);
    if (close && close.mark === open.mark && close.length >= open.length && !close.info)
      return { type: "code", language: open.info, text: text.join("\n"), end: line + 1 };
    text.push(lines[line].slice(Math.min(open.indent, indent(lines[line]))));
  }
  return { type: "code", language: open.info, text: text.join("\n"), end: lines.length }; // still being written
}

function heading(lines, at) {
  const text = lines[at].trim();
  let level = 0;
  while (text[level] === "#") level++;
  if (!level || level > 6 || (text[level] !== " " && text[level] !== undefined)) return null;
  let end = text.length;
  while (end > level && text[end - 1] === "#") end--;
  if (end < text.length && text[end - 1] !== " ") end = text.length; // "C#" keeps its mark
  return { type: "heading", level, text: text.slice(level, end).trim(), end: at + 1 };
}

function rule(lines, at) {
  const text = lines[at].replaceAll(" ", "");
  if (text.length < 3 || !"-*_".includes(text[0]) || [...text].some((mark) => mark !== text[0])) return null;
  return { type: "rule", end: at + 1 };
}

function quote(lines, at, depth) {
  const inside = [];
  let end = at;
  for (; end < lines.length; end++) {
    const text = lines[end].trimStart();
    if (text[0] !== ">") break;
    inside.push(text.slice(text[1] === " " ? 2 : 1));
  }
  return end > at ? { type: "quote", blocks: parse(inside, depth + 1), end } : null;
}

/** Where a line begins an item: {ordered, number, at: of the mark, content: of the text}. */
function marker(line) {
  const at = indent(line);
  let end = at;
  let ordered = false;
  if ("-*+".includes(line[at] || "x")) {
    end++;
  } else {
    while (line[end] >= "0" && line[end] <= "9" && end - at < 9) end++;
    if (end === at || (line[end] !== "." && line[end] !== ")")) return null;
    ordered = true;
    end++;
  }
  if (end < line.length && line[end] !== " " && line[end] !== "\t") return null;
  const text = line.slice(end);
  const gap = blank(text) ? 1 : Math.min(indent(text), 4);
  return { ordered, number: ordered ? Number(line.slice(at, end - 1)) : 0, at, content: end + gap };
}

function list(lines, at, depth) {
  const first = marker(lines[at]);
  if (!first) return null;
  const items = [];
  let item = null;
  let mark = first;
  let loose = false;
  let end = at;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (blank(line)) {
      let next = end + 1;
      while (next < lines.length && blank(lines[next])) next++;
      if (next === lines.length) break;
      const other = marker(lines[next]);
      const inner = indent(lines[next]) >= mark.at + 2;
      if (!inner && !(other && other.ordered === first.ordered && !rule(lines, next))) break;
      item.push("");
      loose ||= !inner;
      end = next - 1;
      continue;
    }
    const here = marker(line);
    const inner = indent(line) >= mark.at + 2;
    if (item && inner) {
      item.push(line.slice(Math.min(indent(line), mark.content)));
    } else if (here && here.ordered === first.ordered && !rule(lines, end)) {
      mark = here;
      item = [line.slice(here.content)];
      items.push(item);
    } else if (!item.at(-1) || begins(lines, end)) {
      break;
    } else {
      item.push(line.trimStart()); // the paragraph goes on
    }
  }
  return {
    type: "list",
    ordered: first.ordered,
    start: first.number,
    loose,
    items: items.map((text) => {
      const task = /^\[([ xX])\] /.exec(text[0]);
      if (task) text[0] = text[0].slice(4);
      return { done: task ? task[1] !== " " : null, blocks: parse(text, depth + 1) };
    }),
    end,
  };
}

/** Whether a line ends the paragraph before it. */
function begins(lines, at) {
  return fence(lines[at]) || heading(lines, at) || rule(lines, at) || lines[at].trimStart()[0] === ">" || marker(lines[at]);
}

/** The cells of a row: parts between bars that no backslash stands before. */
function cells(line) {
  const found = [];
  let cell = "";
  const text = line.trim();
  for (let at = text[0] === "|" ? 1 : 0; at < text.length; at++) {
    if (text[at] === "\\" && text[at + 1] === "|") {
      cell += "|";
      at++;
    } else if (text[at] === "|") {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += text[at];
    }
  }
  if (cell.trim() || text.at(-1) !== "|") found.push(cell.trim());
  return found;
}

function table(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return null;
  const marks = cells(lines[at + 1]);
  const head = cells(lines[at]);
  if (marks.length !== head.length || !marks.every((mark) => /^:?-+:?$/.test(mark))) return null;
  const align = marks.map((mark) => (mark.endsWith(":") ? (mark[0] === ":" ? "center" : "right") : ""));
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end++) {
    const row = cells(lines[end]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return { type: "table", head, align, rows, end };
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !table(lines, end)) {
    if (depth < DEEPEST ? begins(lines, end) : fence(lines[end])) break;
    end++;
  }
  return { type: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n"), end };
}

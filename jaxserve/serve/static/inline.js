// Markdown within a line: emphasis, code, links.  Builds nodes and never parses HTML, so whatever a model writes stays text;
// a link is made for http and https alone.  Emphasis is CommonMark's delimiter stack, bounded, so that time stays linear.

const SPECIAL = /[\\`*_~[\]!<\nh]/g;
const ESCAPED = "\\`*_~[]#|<>!{}+-.$&";
const LONGEST_ADDRESS = 2048;
const DEEPEST = 16;

const make = (name, ...children) => {
  const element = document.createElement(name);
  element.append(...children);
  return element;
};

/** A link that opens elsewhere and tells nobody where from; null for what is no address of the web. */
export function link(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return null;
  const element = make("a");
  element.href = url.href;
  element.target = "_blank";
  element.rel = "noopener noreferrer nofollow";
  return element;
}

/** Appends the nodes of `text` to `parent`. */
export function inline(parent, text) {
  const stack = []; // runs of * _ ~ that may open emphasis
  const brackets = [];
  const unclosed = new Set(); // lengths of runs of ` that nothing closes
  let at = 0;

  const add = (node) => parent.append(node);
  const run = (from) => {
    let end = from;
    while (text[end] === text[from]) end++;
    return end - from;
  };

  const code = () => {
    const length = run(at);
    if (!unclosed.has(length)) {
      for (let end = text.indexOf("`", at + length); end >= 0; end = text.indexOf("`", end)) {
        const other = run(end);
        if (other === length) {
          let inside = text.slice(at + length, end).replaceAll("\n", " ");
          if (inside.startsWith(" ") && inside.endsWith(" ") && inside.trim()) inside = inside.slice(1, -1);
          add(make("code", inside));
          return end + length;
        }
        end += other;
      }
      unclosed.add(length);
    }
    add(text.slice(at, at + length));
    return at + length;
  };

  const bare = () => {
    const before = text[at - 1];
    if ((before && /[\p{L}\p{N}_]/u.test(before)) || !/^https?:\/\/[^\s]/.test(text.slice(at, at + 9))) return 0;
    let end = at;
    let open = 0;
    while (end < text.length && end - at < LONGEST_ADDRESS && !/[\s<>"`|*]|[\u3000-\u303f\uff00-\uffef]/.test(text[end])) {
      if (text[end] === "(") open++;
      if (text[end] === ")" && --open < 0) break;
      end++;
    }
    while (/[.,;:!?'\]_~]/.test(text[end - 1])) end--;
    const element = link(text.slice(at, end));
    if (!element) return 0;
    element.append(text.slice(at, end));
    add(element);
    return end;
  };

  /** The end and the address of "(address "title")" at `from`, or null. */
  const destination = (from) => {
    if (text[from] !== "(") return null;
    let end = from + 1;
    let open = 1;
    for (; end < text.length && end - from < LONGEST_ADDRESS; end++) {
      if (text[end] === "\n") return null;
      if (text[end] === "(") open++;
      if (text[end] === ")" && --open === 0) break;
    }
    if (open) return null;
    const [address] = text.slice(from + 1, end).trim().split(/\s/, 1);
    return { end: end + 1, address: address.replace(/^<|>$/g, "") };
  };

  const close = () => {
    const bracket = brackets.pop();
    const target = bracket && destination(at + 1);
    const element = target && link(target.address);
    if (!element) {
      add("]");
      return at + 1;
    }
    emphasis(stack, bracket.depth);
    while (bracket.node.nextSibling) element.append(bracket.node.nextSibling);
    for (const inner of element.querySelectorAll("a")) inner.replaceWith(...inner.childNodes); // links hold no links
    if (!element.textContent) element.append(target.address);
    bracket.node.replaceWith(element);
    if (!bracket.image) brackets.length = 0;
    return target.end;
  };

  const delimiters = () => {
    const mark = text[at];
    const length = run(at);
    const node = document.createTextNode(text.slice(at, at + length));
    add(node);
    const before = text[at - 1] ?? " ";
    const after = text[at + length] ?? " ";
    const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
    const [signBefore, signAfter] = [/[\p{P}\p{S}]/u.test(before), /[\p{P}\p{S}]/u.test(after)];
    const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
    const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
    const word = mark === "_";
    if (length <= 3)
      stack.push({
        ...{ mark, node, length },
        opens: left && (!word || !right || signBefore),
        closes: right && (!word || !left || signAfter),
      });
    return at + length;
  };

  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    if (next > at) add(text.slice(at, next));
    at = next;
    const mark = text[at];
    if (mark === undefined) break;
    if (mark === "`") at = code();
    else if (mark === "*" || mark === "_" || mark === "~") at = delimiters();
    else if (mark === "]") at = close();
    else if (mark === "[" || (mark === "!" && text[at + 1] === "[")) {
      const node = document.createTextNode(mark === "[" ? "[" : "![");
      add(node);
      brackets.push({ node, depth: stack.length, image: mark === "!" });
      at += node.length;
    } else if (mark === "\n" || /^<br ?\/?>/i.test(text.slice(at, at + 6))) {
      add(make("br"));
      at = mark === "\n" ? at + 1 : text.indexOf(">", at) + 1;
    } else if (mark === "\\" && text[at + 1] === "\n") {
      at++;
    } else if (mark === "\\" && ESCAPED.includes(text[at + 1] || " ")) {
      add(text[at + 1]);
      at += 2;
    } else {
      const end = mark === "h" ? bare() : 0;
      if (!end) add(mark);
      at = end || at + 1;
    }
  }
  emphasis(stack, 0);
  parent.normalize();
}

/** Pairs the runs from `bottom` up, innermost first, and takes them off the stack. */
function emphasis(stack, bottom) {
  const openers = [];
  for (const closer of stack.slice(bottom)) {
    for (let depth = openers.length - 1; closer.closes && closer.length && depth >= 0; depth--) {
      const opener = openers[depth];
      if (opener.mark !== closer.mark) continue;
      if (closer.mark === "~" ? opener.length !== closer.length || closer.length > 2 : uneven(opener, closer)) continue;
      const taken = closer.mark === "~" ? closer.length : Math.min(2, opener.length, closer.length);
      const element = make(closer.mark === "~" ? "del" : taken === 2 ? "strong" : "em");
      while (opener.node.nextSibling !== closer.node) element.append(opener.node.nextSibling);
      opener.node.after(element);
      for (const end of [opener, closer]) {
        end.length -= taken;
        end.node.data = end.mark.repeat(end.length);
      }
      openers.length = opener.length ? depth + 1 : depth;
      if (opener.length) depth++;
    }
    if (closer.opens && closer.length && openers.length < DEEPEST) openers.push(closer);
  }
  stack.length = bottom;
}

/** CommonMark's rule of three. */
function uneven(opener, closer) {
  const both = opener.closes || closer.opens;
  return both && (opener.length + closer.length) % 3 === 0 && (opener.length % 3 || closer.length % 3);
}

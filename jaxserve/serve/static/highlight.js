// Colours in code: comments, texts, numbers and the words that most languages share.  One pass, no grammar: right enough to
// read by, and the same for every language that has one of these three kinds of comment.

const HASH = "python py sh bash shell console zsh yaml yml toml ini ruby rb r perl dockerfile makefile elixir julia";
const DASH = "sql lua haskell hs ada elm";
const MARKUP = "html xml svg markdown md text txt plaintext diff csv";
const LONGEST = 20000;

const WORDS = new Set(
  (
    "abstract and as assert async await bool boolean break case catch char class const continue def default defer del do done " +
    "double elif else elsif end enum except export extends extern False false fi final finally float fn for from func function " +
    "global go if impl implements import in include inline instanceof int interface is lambda let local long loop match mod " +
    "module mut namespace new nil None nonlocal not null or package pass private protected pub public raise require return " +
    "self short signed sizeof static str string struct super switch synchronized template then this throw throws trait True " +
    "true try type typedef typeof undefined union unless unsigned until use using var virtual void volatile where while with " +
    "yield select insert update delete into values create table alter drop join left right inner outer on group by order " +
    "having limit distinct as"
  ).split(" "),
);

const REST =
  "|\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|`(?:\\\\[^]|[^`\\\\])*`?" +
  "|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'?|\\b\\d[\\w.]*|[\\p{L}_$][\\p{L}\\p{N}_$]*";
const PATTERNS = {
  hash: new RegExp("#[^\\n]*" + REST, "gu"),
  dash: new RegExp("--[^\\n]*" + REST, "gu"),
  slash: new RegExp("//[^\\n]*|/\\*[^]*?(?:\\*/|$)" + REST, "gu"),
};
const STYLES = new Map([
  ...HASH.split(" ").map((name) => [name, "hash"]),
  ...DASH.split(" ").map((name) => [name, "dash"]),
  ...MARKUP.split(" ").map((name) => [name, null]),
]);

/** The nodes of a text in `language`. */
export function highlight(text, language) {
  const fragment = document.createDocumentFragment();
  const style = STYLES.has(language) ? STYLES.get(language) : "slash";
  if (!style || text.length > LONGEST) {
    fragment.append(text);
    return fragment;
  }
  let end = 0;
  for (const found of text.matchAll(PATTERNS[style])) {
    const kind = kindOf(found[0], text[found.index + found[0].length], language);
    if (!kind) continue;
    fragment.append(text.slice(end, found.index));
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = found[0];
    fragment.append(span);
    end = found.index + found[0].length;
  }
  fragment.append(text.slice(end));
  return fragment;
}

function kindOf(word, next, language) {
  const first = word[0];
  if (first === '"' || first === "'" || first === "`") return "s";
  if (first >= "0" && first <= "9") return "n";
  if (first === "#" || first === "/" || word.startsWith("--")) return "c";
  if (WORDS.has(language === "sql" ? word.toLowerCase() : word)) return "k";
  return next === "(" ? "f" : "";
}

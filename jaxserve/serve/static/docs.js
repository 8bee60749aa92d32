// The API's documentation: Swagger UI over openapi.json, with the chat's key.

import { key } from "./store.js";

const $ = (id) => document.getElementById(id);
const base = new URL("v1", document.baseURI).href;

$("base").textContent = base;
$("example").textContent = `from openai import OpenAI

client = OpenAI(base_url="${base}", api_key="none")  # your key, where the server asks for one
model = client.models.list().data[0].id
answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello!"}])
print(answer.choices[0].message.content)`;

const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = () => {
  const theme = document.documentElement.dataset.theme;
  document.documentElement.classList.toggle("dark-mode", theme ? theme === "dark" : dark.matches);
};
dark.addEventListener("change", colour);
colour();

// What is typed into Swagger UI's own field goes before the page's.
const authorized = (headers = {}) => (key.get() ? { Authorization: `Bearer ${key.get()}`, ...headers } : headers);

async function show() {
  let spec;
  try {
    spec = await (await fetch("openapi.json", { cache: "no-store" })).json();
  } catch {
    $("problem").textContent = "openapi.json cannot be had: the server does not answer.";
    $("problem").hidden = false;
    return;
  }
  $("key-form").hidden = !spec.components?.securitySchemes;
  if (key.get()) checkKey();
  window.SwaggerUIBundle({
    spec,
    domNode: $("swagger"),
    deepLinking: true,
    tagsSorter: (a, b) => (a === "server") - (b === "server"), // last; the others as they come
    displayRequestDuration: true,
    defaultModelsExpandDepth: 0,
    validatorUrl: null, // or it would send the document to swagger.io
    requestInterceptor: (request) => ({ ...request, headers: authorized(request.headers) }),
  });
}

/** Says whether the server takes the key. */
async function checkKey() {
  const { status } = await fetch("v1/models", { headers: authorized(), cache: "no-store" });
  $("key-state").textContent = status === 401 ? "The server refused it." : "Requests from this page carry it.";
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = $("key-input").value.trim();
  if (/[^\x21-\x7e]/.test(value)) $("key-state").textContent = "A key has no spaces and no letters beyond ASCII.";
  else {
    key.set(value, key.kept());
    checkKey();
  }
});
show();

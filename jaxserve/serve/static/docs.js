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

const authorized = (headers = {}) => (key.get() ? { ...headers, Authorization: `Bearer ${key.get()}` } : headers);

async function show() {
  $("problem").hidden = true;
  let response;
  try {
    response = await fetch("openapi.json", { headers: authorized(), cache: "no-store" });
  } catch {
    return problem("The server does not answer.");
  }
  $("key-form").hidden = response.status !== 401;
  if (response.status === 401) {
    $("key-reason").textContent = key.get() ? "The server refused this key." : "This server asks for a key.";
    $("key-input").focus();
    return undefined;
  }
  if (!response.ok) return problem(`openapi.json cannot be had: the server answered ${response.status}.`);
  return window.SwaggerUIBundle({
    spec: await response.json(),
    domNode: $("swagger"),
    deepLinking: true,
    displayRequestDuration: true,
    defaultModelsExpandDepth: 0,
    validatorUrl: null, // or it would send the document to swagger.io
    requestInterceptor: (request) => ({ ...request, headers: authorized(request.headers) }),
  });
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = $("key-input").value.trim();
  if (/[^\x21-\x7e]/.test(value)) return problem("A key has no spaces and no letters beyond ASCII.");
  key.set(value, key.kept());
  return show();
});
show();

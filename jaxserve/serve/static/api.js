// Talks to the server that this page came from: its models, and an answer piece by piece.  Knows nothing of the page.
// Addresses are relative, so that the page works under a path of a reverse proxy, too.

/** What went wrong, in words for a person.  status: of HTTP; 0 where there was no answer. */
export class ServerError extends Error {
  constructor(status, message, wait = 0) {
    super(message);
    this.status = status;
    this.wait = wait; // seconds after which another try makes sense
  }
}

async function ask(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  const wait = Number(response.headers.get("Retry-After")) || 0;
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // no answer of ours: a proxy's page, perhaps
  }
  throw new ServerError(response.status, message || `The server answered ${response.status}.`, wait);
}

/** The models served: [{id, max_model_len?}]. */
export async function models(key) {
  return (await (await ask("v1/models", key)).json()).data;
}

/** The chunks of a chat completion as they come. */
export async function* chat(body, key, signal) {
  const response = await ask("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(500, chunk.error.message || "The server failed.");
    yield chunk;
  }
  throw new ServerError(0, "The connection broke off before the answer was complete.");
}

/** The data of server-sent events; comments and other fields are passed over. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError(0, "The connection broke off before the answer was complete.");
      }
      if (part.done) return;
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

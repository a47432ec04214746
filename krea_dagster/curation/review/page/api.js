// Requests to the server. The page's address holds the token, so every address is relative to it.

/** The server refused a request: `status` is the HTTP status, the text is shown to the reviewer. */
export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** The server or its journal is not available; a retry may help. */
export class Away extends Error {}

const WAIT_MS = 20000;

async function answered(path, options, wait_ms = WAIT_MS) {
  let answer;
  let said;
  try {
    const signal = AbortSignal.any([
      AbortSignal.timeout(wait_ms),
      ...(options.signal ? [options.signal] : []),
    ]);
    answer = await fetch(path, { cache: "no-store", ...options, signal });
    said = await answer.text();
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Away("The server does not respond.");
  }
  let value = {};
  try {
    value = JSON.parse(said);
  } catch {
    value = { error: said };
  }
  if (answer.status >= 500) throw new Away(value.error || `The server responded with ${answer.status}.`);
  if (!answer.ok) throw new Refused(answer.status, value.error || `The server responded with ${answer.status}.`);
  return value;
}

export function ask(name, parameters = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(parameters)) query.set(key, value);
  return answered(`api/${name}?${query}`, { signal });
}

export function post(name, value, wait_ms = WAIT_MS) {
  const headers = { "Content-Type": "application/json" };
  return answered(`api/${name}`, { method: "POST", headers, body: JSON.stringify(value) }, wait_ms);
}

export const small = (sha256) => `small/${sha256}`;
export const full = (sha256) => `full/${sha256}`;

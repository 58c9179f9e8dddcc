// Everything the page asks of the dispatcher: requests, and the stream of events with its own way back.

export class ApiError extends Error {
  constructor(status, failure, message) {
    super(message);
    this.status = status;
    this.failure = failure;
  }
}

// GET, or POST where a body is given. Throws ApiError with the dispatcher's own message.
export async function ask(path, body) {
  let answer;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch {
    throw new ApiError(0, "unreachable", "the dispatcher does not answer");
  }
  const text = await answer.text();
  let value = null;
  try {
    value = text ? JSON.parse(text) : null;
  } catch {
    // An answer of something between us and the dispatcher: its status is all we can tell.
  }
  if (!answer.ok) {
    throw new ApiError(answer.status, value?.error?.class ?? "failed", value?.error?.message ?? `HTTP ${answer.status}`);
  }
  return value;
}

const WAITS_MS = [300, 1000, 2000, 4000];

// An event stream that comes back by itself, refused answers and silent connections included. `handlers` maps event
// names to functions of the parsed data; `told(state)` hears "open", "lost" and "refused". `silence_ms`: a stream that
// always has something to say is opened again when it says nothing for so long.
export class Stream {
  constructor(url, handlers, { told = () => {}, silence_ms = Infinity } = {}) {
    this.url = url;
    this.handlers = handlers;
    this.told = told;
    this.tries = 0;
    this.heard_at = performance.now();
    this.watch = setInterval(() => {
      if (this.source && performance.now() - this.heard_at > silence_ms) this.#again("lost");
    }, 2000);
    this.#connect();
  }

  #connect() {
    this.heard_at = performance.now();
    const source = new EventSource(this.url);
    this.source = source;
    source.onopen = () => {
      this.heard_at = performance.now();
      this.told("open");
    };
    source.onerror = () => {
      if (this.source !== source) return;
      this.#again(source.readyState === EventSource.CLOSED ? "refused" : "lost");
    };
    for (const [name, handle] of Object.entries(this.handlers)) {
      source.addEventListener(name, (message) => {
        if (this.source !== source) return;
        this.heard_at = performance.now();
        this.tries = 0;
        let value;
        try {
          value = JSON.parse(message.data);
        } catch {
          return; // cut off in the middle; the next one is whole
        }
        handle(value);
      });
    }
  }

  #again(why) {
    this.source?.close();
    this.source = null;
    this.told(why);
    const wait_ms = WAITS_MS[Math.min(this.tries++, WAITS_MS.length - 1)];
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#connect(), wait_ms);
  }

  // Another question on the same stream: what is shown stays until the answer comes.
  move(url) {
    if (url === this.url) return;
    this.url = url;
    this.now();
  }

  now() {
    clearTimeout(this.timer);
    this.source?.close();
    this.tries = 0;
    this.#connect();
  }

  close() {
    clearTimeout(this.timer);
    clearInterval(this.watch);
    this.source?.close();
    this.source = null;
  }
}

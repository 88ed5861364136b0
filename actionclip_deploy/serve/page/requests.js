// Calls of the server. Whatever goes wrong becomes a Refusal, which says what to do now.

const ADVICE = {
  no_key: "Enter a key of this server above.",
  video_unreadable: "Check that the file plays elsewhere, or convert it to MP4 with H.264.",
  video_too_large: "Choose a shorter or smaller video, or cut a part out of this one.",
  body_too_large: "Choose a smaller file, or cut a part out of this one.",
  too_many: "Ask for less at a time.",
  bad_value: "Change what was entered, then try again.",
  unknown_video: "Search by words, and look for similar moments from there.",
  unknown_bank: "Choose another label bank; the list has been read again.",
  bank_building: "Wait until the bank is built, or choose another one.",
  slow_body: "Try again when the connection is better, or choose a smaller file.",
  queue_full: "Nothing is wrong with your video: the server has as much work as it takes.",
  not_ready: "The server is still starting.",
  shutting_down: "The server is ending. Whoever runs it knows when it is back.",
  deadline: "Choose fewer clips or a shorter video, or try again when the server has less to do.",
  failed: "Give the request’s id to whoever runs the server: the reason is in its log.",
  unreachable: "Check that the server runs and that the network is there, then try again.",
};
const TITLES = {
  no_key: "A key is needed",
  video_unreadable: "The video cannot be read",
  video_too_large: "The video is too large",
  body_too_large: "The file is too large",
  bad_value: "The server cannot use what was entered",
  unknown_video: "The archive has no such video",
  unknown_words: "The model does not know these words",
  queue_full: "The server is busy",
  not_ready: "The server is not ready",
  shutting_down: "The server is ending",
  deadline: "It took too long",
  failed: "The server failed",
  unreachable: "The server does not answer",
};
const AGAIN = new Set([0, 408, 429, 500, 502, 503, 504]);
// Any other refusal would meet the next video as well.
const ABOUT_ONE_VIDEO = new Set([
  ...["video_unreadable", "video_too_large", "body_too_large", "slow_body"],
  ...["deadline", "queue_full", "failed"],
]);

// Held here and nowhere else: not in storage, not in an address.
let key = "";
let skewMs = 0;

export function setKey(given) {
  key = given;
}

// By how much the server's clock is ahead of this one, to a second.
export function clockSkewMs() {
  return skewMs;
}

export class Refusal extends Error {
  constructor({ status, code, message, requestId = "", retrySeconds = 0 }) {
    super(message);
    this.name = "Refusal";
    this.status = status;
    this.code = code;
    this.requestId = requestId;
    this.retrySeconds = retrySeconds;
  }

  get title() {
    return TITLES[this.code] ?? "The server did not do it";
  }

  get advice() {
    return ADVICE[this.code] ?? "";
  }

  get isAboutOneVideo() {
    return ABOUT_ONE_VIDEO.has(this.code);
  }

  get mayBeTriedAgain() {
    return AGAIN.has(this.status);
  }
}

// The JSON that an address gives. Throws a Refusal, or an AbortError for what was cancelled.
export function call(address, options = {}) {
  return ask(address, options, (response) => response.json());
}

// The bytes that an address of the API gives, as a blob.
export function picture(address) {
  return ask(address, {}, (response) => response.blob());
}

// Why an address gives nothing; null where it gives something.
export async function refusalAt(address) {
  try {
    await ask(address, { range: "bytes=0-0" }, (response) => response.blob());
    return null;
  } catch (error) {
    return error;
  }
}

// Server-sent events, until the server ends them. By fetch, since an EventSource sends no key.
export function listen(address, { lastId, onMessage }) {
  return ask(address, { lastId }, async (response) => {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const fields = new Map(part.split("\n").map((line) => splitAt(line, ": ")));
        if (fields.has("data")) onMessage(fields.get("id"), fields.get("data"));
      }
    }
  });
}

function splitAt(line, mark) {
  const place = line.indexOf(mark);
  return place < 0 ? [line, ""] : [line.slice(0, place), line.slice(place + mark.length)];
}

async function ask(address, { signal, body, lastId, range }, read) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (lastId) headers["last-event-id"] = lastId;
  if (range) headers.range = range;
  if (typeof body === "string") headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  try {
    const response = await fetch(address, { method, headers, body, signal, cache: "no-store" });
    const date = Date.parse(response.headers.get("date"));
    if (date) skewMs = Math.abs(date - Date.now()) > 2000 ? date - Date.now() : 0;
    if (!response.ok) throw await refusalOf(response);
    return await read(response);
  } catch (error) {
    if (error instanceof Refusal || error.name === "AbortError") throw error;
    throw unreachable(error);
  }
}

export async function download(address) {
  try {
    const response = await fetch(address);
    if (!response.ok) throw await refusalOf(response);
    return await response.blob();
  } catch (error) {
    throw error instanceof Refusal ? error : unreachable(error);
  }
}

function unreachable(error) {
  return new Refusal({
    status: 0,
    code: "unreachable",
    message: `No answer came that this page understands (${error.message}).`,
  });
}

async function refusalOf(response) {
  // Something in front of the server may refuse too, in another form.
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  return new Refusal({
    status: response.status,
    code: told.code ?? "",
    message: told.message ?? `The answer was ${response.status} ${response.statusText}`.trim() + ".",
    requestId: told.request_id ?? response.headers.get("x-request-id") ?? "",
    retrySeconds: secondsOf(response.headers.get("retry-after")),
  });
}

// Retry-After is a number of seconds or a date.
function secondsOf(text) {
  if (!text) return 0;
  const seconds = /^\d+$/.test(text) ? Number(text) : (Date.parse(text) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : 0;
}

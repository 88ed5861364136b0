// The page of cameras: their newest pictures, what they show, and events as they come.

import { count, element, milliseconds, percent, seconds, showKeyForm, showPages, takeKey } from "./answer.js";
import { call, clockSkewMs, listen, picture } from "./requests.js";

const STATES_MS = 1000; // between two looks at all states
const PICTURES_MS = 1000;
const RETRY_MS = 2000;
const LONGEST_RETRY_MS = 30_000;
const SPAN_SECONDS = 300; // of a timeline
const GAP_SECONDS = 5; // between two windows, from which on a timeline shows that there was nothing
const NUM_KEYS = 4; // labels that are named below a timeline, in colours of their own
const NUM_KEYS_LARGE = 7;
const OTHERS = 7; // the colour of all other labels
const NUM_EVENTS = 100;
const WIDTH_STEP = 160; // pixels: the server makes a picture for several of a size once
const STATES = { opening: "Opening", running: "Live", lost: "Lost", ended: "Ended", failed: "Failed" };

const $ = (id) => document.getElementById(id);
const isDark = matchMedia("(prefers-color-scheme: dark)");
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const now = () => (Date.now() + clockSkewMs()) / 1000;

const tiles = new Map(); // by the camera's name
const events = new Map(); // by the event's id
let isPaused = false;
let begun = false;

// A camera

class Tile {
  constructor(name) {
    this.name = name;
    this.points = []; // { time, label, score }
    this.colours = new Map();
    this.state = null;
    this.picture = element("canvas", { role: "img", "aria-label": `Newest frame of ${name}`, hidden: "" });
    this.why = element("p", { class: "why", hidden: "" });
    this.button = element("button", { type: "button", class: "name", "aria-expanded": "false", text: name });
    this.chip = element("span", { class: "state" });
    this.label = element("span", { class: "label" });
    this.score = element("span", { class: "number" });
    this.now = element("p", { class: "now" }, this.label, this.score);
    this.level = element("span");
    this.timeline = element("canvas", { class: "timeline", role: "img" });
    this.keys = element("ul", { class: "keys" });
    this.facts = element("dl", { class: "origin" });
    this.root = element(
      "li",
      { class: "card tile", "data-name": name },
      element("div", { class: "screen" }, this.picture, this.why),
      element(
        "div",
        { class: "facts-of-tile" },
        element("div", { class: "row between" }, this.button, this.chip),
        this.now,
        element("div", { class: "level", "aria-hidden": "true" }, this.level),
        this.timeline,
        element(
          "div",
          { class: "axis", "aria-hidden": "true" },
          element("span", { text: `${SPAN_SECONDS / 60} min ago` }),
          element("span", { text: "now" }),
        ),
        this.keys,
        this.facts,
      ),
    );
    this.button.addEventListener("click", () => this.toggle());
  }

  toggle() {
    const isLarge = this.root.classList.toggle("large");
    this.button.setAttribute("aria-expanded", String(isLarge));
    this.drawTimeline();
    this.root.scrollIntoView({ block: "nearest" });
    if (!isPaused) this.showPicture();
  }

  update(state) {
    const isNew = state.windows !== this.state?.windows;
    this.state = state;
    const isAway = state.state !== "running";
    this.root.classList.toggle("away", isAway);
    this.chip.className = `state ${state.state}`;
    this.chip.textContent = STATES[state.state];
    this.why.hidden = !isAway && !this.picture.hidden;
    this.why.textContent = whyOf(state);
    const best = isAway ? null : state.best;
    const isOpen = Boolean(best) && (state.open_labels ?? []).includes(best.label);
    this.now.classList.toggle("open", isOpen);
    this.label.textContent = best?.label ?? "–";
    this.score.textContent = best ? percent(best.score) : "";
    this.level.style.width = best ? `${100 * best.score}%` : "0";
    if (isNew && best) this.points.push({ time: now(), ...best });
    this.drawTimeline();
    this.facts.replaceChildren(...factsOf(state));
  }

  drawTimeline() {
    const end = now();
    this.points = this.points.filter(({ time }) => time > end - SPAN_SECONDS - GAP_SECONDS);
    const ratio = devicePixelRatio || 1;
    const [width, height] = [this.timeline.clientWidth * ratio, this.timeline.clientHeight * ratio];
    if (!width) return;
    this.timeline.width = width;
    this.timeline.height = height;
    const pen = this.timeline.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const spans = this.spans(end);
    const times = new Map();
    for (const { label, lasts } of spans) times.set(label, (times.get(label) ?? 0) + lasts);
    const number = this.root.classList.contains("large") ? NUM_KEYS_LARGE : NUM_KEYS;
    const most = [...times].sort(([, a], [, b]) => b - a).slice(0, number);
    this.chooseColours(most.map(([label]) => label));
    for (const { time, label, score, lasts } of spans) {
      const x = width * (1 - (end - time) / SPAN_SECONDS);
      pen.fillStyle = style.getPropertyValue(`--stage-${this.colours.get(label) ?? OTHERS}`);
      pen.fillRect(x, height * (1 - score), Math.max(1, (width * lasts) / SPAN_SECONDS + 0.5), height * score);
    }
    const rows = most.map(([label]) => [label, this.colours.get(label)]);
    if (times.size > number) rows.push(["others", OTHERS]);
    this.keys.replaceChildren(
      ...rows.map(([label, colour]) =>
        element("li", {}, element("span", { class: `key stage-${colour}` }), element("span", { text: label })),
      ),
    );
    const shown = most.map(([label, time]) => `${label} for ${seconds(time, 0)}`).join(", ");
    this.timeline.setAttribute("aria-label", `Best labels of the last ${SPAN_SECONDS / 60} minutes: ${shown || "none"}`);
  }

  // Each point until the next one, or until nothing was known any more.
  spans(end) {
    return this.points.map((point, place) => {
      const next = this.points[place + 1]?.time ?? end;
      return { ...point, lasts: Math.max(0, Math.min(next - point.time, GAP_SECONDS)) };
    });
  }

  // A label keeps its colour as long as it is among those that are named.
  chooseColours(labels) {
    for (const label of this.colours.keys()) if (!labels.includes(label)) this.colours.delete(label);
    const taken = new Set(this.colours.values());
    const free = [...Array(OTHERS).keys()].filter((colour) => !taken.has(colour));
    for (const label of labels) if (!this.colours.has(label)) this.colours.set(label, free.shift());
  }

  async loadHistory() {
    const { points } = await call(`${this.address}/history?seconds=${SPAN_SECONDS}`);
    this.points = points.map(({ time, label, score }) => ({ time: Date.parse(time) / 1000, label, score }));
    this.drawTimeline();
  }

  get address() {
    return `v1/streams/${encodeURIComponent(this.name)}`;
  }

  get isSeen() {
    const { top, bottom } = this.picture.parentElement.getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
  }

  // Never throws: a picture that does not come leaves the one before.
  async showPicture() {
    const wanted = this.picture.parentElement.clientWidth * (devicePixelRatio || 1);
    const width = WIDTH_STEP * Math.max(1, Math.ceil(wanted / WIDTH_STEP));
    try {
      const shown = await createImageBitmap(await picture(`${this.address}/snapshot?width=${width}`));
      this.picture.width = shown.width;
      this.picture.height = shown.height;
      this.picture.getContext("2d").drawImage(shown, 0, 0);
      this.picture.hidden = false;
      shown.close();
    } catch {
      return;
    }
    this.why.hidden = this.state?.state === "running";
  }
}

function whyOf({ state, last_error: error }) {
  if (state === "lost") return `${error ?? "The source was lost."} It is tried again.`;
  if (state === "failed") return error ?? "It cannot be read.";
  return { ended: "It is at its end.", opening: "Waiting for the first frame …" }[state] ?? "…";
}

function factsOf(state) {
  const dropped = Object.values(state.windows_dropped).reduce((sum, each) => sum + each, 0);
  const age = state.age_ms ? `${milliseconds(state.age_ms.p50)}, p95 ${milliseconds(state.age_ms.p95)}` : "–";
  const facts = {
    Source: state.source,
    "Label bank": `${state.bank.name}${state.bank.version ? `, version ${state.bank.version}` : ""}`,
    Windows: `${seconds(state.window_seconds, 1)}, one every ${seconds(state.stride_seconds)}`,
    "Frame to answer": age,
    "Frames decoded": state.frames.toLocaleString("en"),
    "Frames encoded": state.frames_encoded.toLocaleString("en"),
    "Windows scored": state.windows.toLocaleString("en"),
    "Windows dropped": dropped.toLocaleString("en"),
    "Times lost and back": state.reconnects.toLocaleString("en"),
    "Since": new Date(state.since).toLocaleString("en-GB"),
  };
  return Object.entries(facts).map(([name, text]) =>
    element("div", {}, element("dt", { text: name }), element("dd", { text })),
  );
}

// Events

function showEvent(event) {
  let line = events.get(event.id);
  if (!line) {
    line = element("li", { class: "lasts" });
    events.set(event.id, line);
    $("events").prepend(line);
    if (events.size > NUM_EVENTS) {
      const [oldest] = events.keys();
      events.get(oldest).remove();
      events.delete(oldest);
    }
  }
  const hasEnded = event.kind === "end";
  line.classList.toggle("lasts", !hasEnded);
  const length = hasEnded ? seconds(event.end_seconds - event.start_seconds, 1) : "now";
  const time = new Date(event.start_time);
  line.replaceChildren(
    element("time", { class: "number", datetime: event.start_time, text: time.toLocaleTimeString("en-GB") }),
    element("span", { class: "what", text: event.label }),
    element("span", { class: "number", text: percent(event.mean) }),
    element("span", { class: "where", text: `${event.source}, ${length}` }),
  );
  $("log").hidden = false;
  $("no-events").hidden = true;
}

async function followEvents() {
  let lastId = "first"; // is not known, so that all is told that the server has kept
  let pause = RETRY_MS;
  for (;;) {
    while (!tiles.size) await wait(pause); // a server without cameras has no events
    try {
      await listen("v1/events", {
        lastId,
        onMessage(id, data) {
          lastId = id;
          pause = RETRY_MS;
          showEvent(JSON.parse(data));
        },
      });
    } catch (refusal) {
      pause = Math.max(pause, 1000 * refusal.retrySeconds);
    }
    await wait(pause);
    pause = Math.min(2 * pause, LONGEST_RETRY_MS);
  }
}

// All cameras

function complain(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

// Gives the refusal, if there is one.
async function lookAtStates() {
  let streams;
  try {
    ({ streams } = await call("v1/streams"));
  } catch (refusal) {
    if (refusal.status === 401) askForKey();
    else complain(`${refusal.title}. ${refusal.advice}`);
    return refusal;
  }
  complain("");
  $("none").hidden = streams.length > 0;
  $("live").hidden = $("pause").hidden = !streams.length;
  for (const state of streams) {
    if (!tiles.has(state.name)) {
      const tile = new Tile(state.name);
      tiles.set(state.name, tile);
      $("tiles").append(tile.root);
      tile.loadHistory().catch(() => {});
    }
    if (!isPaused) tiles.get(state.name).update(state);
  }
  const running = streams.filter(({ state }) => state === "running").length;
  $("summary").textContent = streams.length ? `${running} of ${count(streams.length, "camera")} live` : "";
  return null;
}

async function followStates() {
  for (;;) {
    await wait(STATES_MS);
    if (!document.hidden) await lookAtStates();
  }
}

async function followPictures() {
  for (;;) {
    const started = performance.now();
    for (const tile of tiles.values()) {
      if (isPaused || document.hidden) break;
      if (tile.isSeen && tile.state?.frames) await tile.showPicture();
    }
    await wait(Math.max(100, PICTURES_MS - (performance.now() - started)));
  }
}

function pause() {
  isPaused = !isPaused;
  $("pause").setAttribute("aria-pressed", String(isPaused));
  $("pause").textContent = isPaused ? "Go on" : "Pause";
}

function askForKey() {
  showKeyForm($("live"));
}

async function useKey(event) {
  event.preventDefault();
  if (await takeKey(lookAtStates)) follow();
}

function follow() {
  if (begun) return;
  begun = true;
  call("v1/info").then(showPages, () => {});
  followStates();
  followPictures();
  followEvents();
}

async function start() {
  $("pause").addEventListener("click", pause);
  $("key-form").addEventListener("submit", useKey);
  const redraw = () => tiles.forEach((tile) => tile.drawTimeline());
  isDark.addEventListener("change", redraw);
  addEventListener("resize", redraw);
  const refusal = await lookAtStates();
  if (refusal?.status !== 401) follow();
}

start();

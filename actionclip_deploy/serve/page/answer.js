// An answer of /v1/classify as elements, and what several pages show. Text goes in as text, never
// as markup.

import { setKey } from "./requests.js";

const STAGES = {
  read: "upload",
  labels: "embed the labels",
  decode_queue: "wait for a decoder",
  decode: "decode",
  queue: "wait for the runtime",
  visual: "visual",
  temporal: "temporal",
  score: "score",
};
const METHODS = {
  "template-softmax": "softmax over labels, averaged over templates",
  "mean-embedding": "softmax over labels, of averaged templates",
  independent: "each label by itself",
};
const PROVIDERS = { CPUExecutionProvider: "CPU", CUDAExecutionProvider: "CUDA" };
const PIXELATED_BELOW = 100; // pixels: what is smaller than on the screen is shown as it is
const NUM_WORDS = 8; // that are not known and named
const LOWEST_SHARE = 0.002; // of the whole: shorter stages have no place in the bar

export function element(tag, { text, ...properties } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value);
  }
  if (text !== undefined) made.textContent = text;
  made.append(...children.filter(Boolean));
  return made;
}

export function percent(score) {
  if (score > 0 && score < 0.0005) return "< 0.1 %";
  if (score < 1 && score >= 0.9995) return "> 99.9 %";
  return `${(100 * score).toFixed(1)} %`;
}

export function seconds(value, digits = 2) {
  return `${value.toFixed(digits)} s`;
}

export function milliseconds(value) {
  if (value >= 1000) return seconds(value / 1000);
  return value >= 10 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
}

export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

// Asks for the server's key in the place of what it would show.
export function showKeyForm(inItsPlace) {
  document.getElementById("summary").textContent = "This server asks for a key.";
  inItsPlace.hidden = true;
  const part = document.getElementById("key-part");
  if (!part.hidden) return;
  part.hidden = false;
  document.getElementById("key").focus();
}

// Begins with the key that was entered; gives whether the server takes it.
export async function takeKey(begin) {
  const field = document.getElementById("key");
  const hint = document.getElementById("key-hint");
  const given = field.value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) {
    hint.textContent = "A key consists of ASCII characters without spaces; look at it again.";
    return false;
  }
  setKey(given);
  const refusal = await begin();
  if (refusal?.status === 401) {
    hint.textContent = "The server does not take this key; look at it again.";
    field.select();
    return false;
  }
  document.getElementById("key-part").hidden = true;
  field.value = "";
  return true;
}

// Links to the pages for which this server has something to show.
export function showPages({ num_streams: numStreams, archive }) {
  const has = { live: numStreams > 0, search: Boolean(archive) };
  for (const link of document.querySelectorAll(".pages a")) {
    const isThere = has[link.getAttribute("href")] ?? true;
    link.hidden = !isThere && !link.hasAttribute("aria-current");
  }
  document.querySelector(".pages").hidden = !document.querySelector(".pages a:not([hidden], [aria-current])");
}

// What a screen reader is told.
export function summaryOf(result) {
  const [best, ...others] = result.predictions;
  const next = others.length ? ` Next: ${others[0].label}, ${percent(others[0].score)}.` : "";
  const unknown = result.answer?.is_unknown ? "Unknown: no label fits well enough. Closest: " : "";
  return `${unknown}${best.label}, ${percent(best.score)}.${next}`;
}

export function drawAnswer(answer) {
  const [result] = answer.results;
  return [
    best(result),
    warnings(result),
    ranking(result),
    frames(result),
    templates(result),
    timings(result.timings_ms, answer),
    origin(answer, result),
  ].filter(Boolean);
}

function best({ predictions: [first], answer: decision }) {
  const score = element("span", { class: "best-score number", text: percent(first.score) });
  if (!decision?.is_unknown) {
    const label = element("span", { class: "best-label", text: first.label });
    return element("p", { class: "best" }, label, " ", score);
  }
  const badge = element("span", { class: "badge", text: "unknown" });
  const why =
    `No label fits well enough: the best calibrated score is ${percent(decision.score)}, ` +
    `below the label bank’s threshold of ${percent(decision.threshold)}. The closest label is `;
  const label = element("b", { text: first.label });
  return element(
    "div",
    { class: "best" },
    element("p", { class: "best-label" }, badge),
    element("p", { class: "hint" }, why, label, "."),
  );
}

function warnings({ warnings: damage = [], bank }) {
  const given = [...damage];
  const words = bank?.unknown_words ?? [];
  if (words.length) {
    const named = words.slice(0, NUM_WORDS).map((word) => `“${word}”`).join(", ");
    const more = words.length > NUM_WORDS ? ` and ${words.length - NUM_WORDS} more words` : "";
    given.unshift(
      `The model does not know ${named}${more} of the labels; scores rest on their other words alone.`,
    );
  }
  if (!given.length) return null;
  const lines = given.map((text) => element("li", { text }));
  return element("ul", { class: "warnings", "aria-label": "Warnings" }, ...lines);
}

// Why there is no answer, with buttons of what can be done now.
export function drawRefusal(refusal, buttons = []) {
  const facts = [
    refusal.status ? `Status ${refusal.status}` : "No status",
    refusal.code,
    refusal.requestId && `request ${refusal.requestId}`,
  ];
  return element(
    "div",
    { class: "error" },
    element("p", { class: "error-title", text: refusal.title }),
    element("p", { class: "error-message", text: refusal.message }),
    refusal.advice && element("p", { class: "error-advice", text: refusal.advice }),
    element("p", { class: "hint facts", text: facts.filter(Boolean).join(" · ") }),
    buttons.length && element("div", { class: "row" }, ...buttons),
  );
}

function ranking(result) {
  const lines = result.predictions.map(({ label, score }) => {
    const bar = element("span", { class: "fill" });
    bar.style.width = `${Math.max(0, Math.min(1, score)) * 100}%`;
    return element(
      "li",
      {},
      element("span", { class: "label", text: label }),
      element("span", { class: "number", text: percent(score) }),
      element("span", { class: "track", "aria-hidden": "true" }, bar),
    );
  });
  return part("Scores", element("ol", { class: "ranking" }, ...lines));
}

function frames({ frames: used, pixels }) {
  if (!used || !pixels) return null;
  const [, height, width] = pixels.shape;
  const bytes = Uint8Array.from(atob(pixels.data), (letter) => letter.charCodeAt(0));
  const draw = (number, label) => {
    const canvas = element("canvas", { width, height, role: "img", "aria-label": label });
    if (width < PIXELATED_BELOW) canvas.className = "pixelated";
    canvas.getContext("2d").putImageData(picture(bytes, number, width, height), 0, 0);
    return canvas;
  };
  // The page asks for one crop, so a view is a clip.
  const clips = pixels.views.map((view, clip) => {
    const figures = view.map((number, place) => {
      const index = used.indices[clip][place];
      const time = used.pts_seconds ? seconds(used.pts_seconds[clip][place]) : `no. ${index}`;
      const canvas = draw(number, `Frame ${index}, at ${time}`);
      return element("li", { title: `Frame ${index}` }, canvas, element("span", { text: time }));
    });
    const name = pixels.views.length > 1 ? `Clip ${clip + 1}` : "Frames, in order";
    const list = element("ol", { class: "frames", "aria-label": name }, ...figures);
    return pixels.views.length > 1
      ? element("div", { class: "clip" }, element("p", { class: "hint", text: name }), list)
      : list;
  });
  const hint = `${count(pixels.shape[0], "frame")}, as the model saw them (${width} × ${height}).`;
  return part("Frames", element("p", { class: "hint", text: hint }), ...clips);
}

function picture(bytes, number, width, height) {
  const image = new ImageData(width, height);
  const start = number * width * height * 3;
  for (let place = 0; place < width * height; place += 1) {
    image.data.set(bytes.subarray(start + 3 * place, start + 3 * place + 3), 4 * place);
    image.data[4 * place + 3] = 255;
  }
  return image;
}

function templates({ templates: votes }) {
  if (!votes?.length) return null;
  const agreeing = votes.filter((vote) => vote.agrees).length;
  const dots = votes.map((vote) => element("span", { class: vote.agrees ? "dot yes" : "dot" }));
  const title =
    votes.length === 1
      ? "One template"
      : `${agreeing} of ${votes.length} templates agree with the first label`;
  const lines = votes.map((vote) => {
    const sign = vote.agrees ? "✓" : "✗";
    const said = vote.agrees ? "agrees" : "chooses another label";
    return element(
      "li",
      { class: vote.agrees ? "" : "differs" },
      element("span", { class: "sign", "aria-hidden": "true", text: sign }),
      element("span", { class: "unseen", text: `${said}: ` }),
      element("span", { class: "template", text: vote.template }),
      element("span", { class: "vote" }, vote.agrees ? "" : `${vote.label}, `, percent(vote.score)),
    );
  });
  const summary = element(
    "summary",
    {},
    title,
    element("span", { class: "dots", "aria-hidden": "true" }, ...dots),
  );
  return part(
    "Templates",
    element("details", {}, summary, element("ul", { class: "votes" }, ...lines)),
  );
}

function timings(stages, { timings_ms: { total } }) {
  const known = Object.entries(stages ?? {});
  if (!known.length) return null;
  const rest = total - known.reduce((sum, [, value]) => sum + value, 0);
  const all = known.map(([name, value]) => [STAGES[name] ?? name, value]);
  if (rest > 0) all.push(["the rest", rest]);
  const shares = all.map(([, value], place) => {
    if (value / total < LOWEST_SHARE) return null;
    const share = element("span", { class: `stage stage-${place % 8}` });
    share.style.flexGrow = value;
    return share;
  });
  const legend = all.map(([name, value], place) =>
    element(
      "li",
      {},
      element("span", { class: `key stage-${place % 8}`, "aria-hidden": "true" }),
      element("span", { text: name }),
      element("span", { class: "number", text: milliseconds(value) }),
    ),
  );
  return part(
    `Time: ${milliseconds(total)}`,
    element("div", { class: "stages", "aria-hidden": "true" }, ...shares.filter(Boolean)),
    element("ul", { class: "legend" }, ...legend),
  );
}

function origin(answer, result) {
  const { runtime, bank } = answer;
  const library = Object.entries(runtime.versions ?? {}).map((each) => each.join(" "));
  const sizes = `${count(bank.num_labels, "label")} × ${count(bank.num_templates, "template")}`;
  const facts = [
    ["Runtime", runtime.name],
    ["Execution provider", providerOf(runtime)],
    ["Precision", runtime.precision],
    ["Engine", runtime.engine ?? "none"],
    ["Threads", runtime.num_threads ?? "chosen by the runtime"],
    ["Versions", library.join(", ")],
    ["Label bank", bank.name === null ? "labels of this request" : bank.name],
    ["Bank version", bank.version === null ? null : String(bank.version)],
    ["Bank SHA-256", `${bank.sha256.slice(0, 12)} …`],
    ["Bank holds", sizes],
    ["Calibrated", decisionOf(result)],
    ["Scores", METHODS[answer.method] ?? answer.method],
    ["Clips in its call", result.batch_size],
    ["Request", answer.request_id],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  const lines = facts.map(([name, value]) =>
    element("div", {}, element("dt", { text: name }), element("dd", { text: String(value) })),
  );
  return part("What answered", element("dl", { class: "origin" }, ...lines));
}

function decisionOf({ answer: decision }) {
  if (!decision) return "no, so never unknown";
  return `${percent(decision.score)}, threshold ${percent(decision.threshold)}`;
}

export function providerOf(runtime) {
  return PROVIDERS[runtime.execution_provider] ?? runtime.execution_provider;
}

function part(title, ...children) {
  return element("section", { class: "part" }, element("h3", { text: title }), ...children);
}

// Videos that are asked about together, one request each: the list of what came of them, in which
// an error stands in the place of its answer, and the files in which all of it can be kept.

import { drawAnswer, drawRefusal, element, percent } from "./answer.js";

const SCHEMA_VERSION = 1; // of records, as the server writes them
const COLUMNS = ["video", "rank", "label", "score", "answer", "error"];
const STATES = {
  waiting: "waits",
  busy: "is recognised …",
  cancelled: "cancelled",
  skipped: "not asked",
};

// One video: its file, how far it is, and its answer or refusal.
export class Outcome {
  constructor(file) {
    this.file = file;
    this.state = "waiting";
    this.answer = null;
    this.refusal = null;
  }

  get result() {
    return this.answer?.results[0] ?? null;
  }

  // What there is of it as a record, without the frames, of which a file would have megabytes.
  get record() {
    const { name } = this.file; // a form cannot send each name as it is: a browser writes " as %22
    if (this.result) {
      const { pixels, ...kept } = this.result;
      return { ...kept, video: name, name };
    }
    const error = this.refusal
      ? { status: this.refusal.status || null, code: this.refusal.code, message: this.refusal.message }
      : { status: null, code: this.state, message: `This video was ${this.state}.` };
    return { video: name, schema_version: SCHEMA_VERSION, name, error };
  }
}

// The list, with `update` for an outcome that has changed; `buttonsOf` gives those of a refusal.
export function drawList(outcomes, buttonsOf) {
  const places = new Map(outcomes.map((each) => [each, place()]));
  const list = element(
    "ol",
    { class: "outcomes", "aria-label": "Videos" },
    ...outcomes.map((each) => element("li", {}, places.get(each).details)),
  );
  const update = (outcome) => {
    const { details, says, body } = places.get(outcome);
    const { result, refusal, state } = outcome;
    body.replaceChildren();
    details.className = `outcome ${state}`;
    if (result) says.replaceChildren(...resultOf(result));
    else says.replaceChildren(refusal ? refusal.title : STATES[state]);
    if (refusal) body.replaceChildren(drawRefusal(refusal, buttonsOf(outcome)));
    const isFirst = outcomes.find((each) => each.result) === outcome;
    details.open = Boolean(refusal) || isFirst;
    if (details.open && result) body.replaceChildren(...drawAnswer(outcome.answer));
  };
  for (const outcome of outcomes) {
    const { details, name, body } = places.get(outcome);
    name.textContent = outcome.file.name;
    // Frames are drawn once somebody looks at them.
    details.addEventListener("toggle", () => {
      if (!details.open || body.childElementCount || !outcome.result) return;
      body.replaceChildren(...drawAnswer(outcome.answer));
    });
    update(outcome);
  }
  return { list, update };
}

function place() {
  const name = element("span", { class: "outcome-name" });
  const says = element("span", { class: "outcome-says" });
  const body = element("div", { class: "outcome-body" });
  const details = element("details", {}, element("summary", {}, name, " ", says), body);
  return { details, name, says, body };
}

function resultOf({ predictions: [first], answer: decision }) {
  if (decision?.is_unknown) return [element("span", { class: "badge", text: "unknown" })];
  return [
    element("b", { text: first.label }),
    " ",
    element("span", { class: "number", text: percent(first.score) }),
  ];
}

// Buttons that save everything as JSON, as `predict --json` has it, and as CSV.
export function drawDownloads(outcomes) {
  const records = () => outcomes.map((each) => each.record);
  const button = (text, type, contentOf) => {
    const made = element("button", { type: "button", class: "second small", text });
    made.addEventListener("click", () => save(`actionclip.${type}`, contentOf(records()), type));
    return made;
  };
  return element(
    "div",
    { class: "row downloads", role: "group", "aria-label": "Keep the answers" },
    button("Download JSON", "json", (all) => `${JSON.stringify(all, null, 2)}\n`),
    button("Download CSV", "csv", csvOf),
  );
}

export function csvOf(records) {
  const rows = records.flatMap(({ name, predictions, answer, error }) => {
    if (error) return [[name, "", "", "", "", error.message]];
    const said = answer ? (answer.label ?? "unknown") : "";
    return predictions.map(({ label, score }, place) => [name, place + 1, label, score, said, ""]);
  });
  return [COLUMNS, ...rows].map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

function quoted(value) {
  const text = String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type: type === "csv" ? "text/csv" : "application/json" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

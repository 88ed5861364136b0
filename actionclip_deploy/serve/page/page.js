// The form: videos, labels, one button; and which of its states the answer is in.

import { count, drawAnswer, drawRefusal, element, providerOf, seconds, showPages, summaryOf } from "./answer.js";
import { drawDownloads, drawList, Outcome } from "./queue.js";
import { call, download, Refusal, setKey } from "./requests.js";

const NUM_SHOWN = 8; // labels of an answer
const TICK_MS = 100;
const MOST_WITH_FRAMES = 16; // videos at a time whose frames are kept; of each they take megabytes
const NUM_EXAMPLES = 3; // labels of a bank that are shown as what labels look like
const BUILD_MS = 2000; // between two looks at a label bank that is being built
const MIB = 1024 * 1024;

const $ = (id) => document.getElementById(id);
const wantsMotion = matchMedia("(prefers-reduced-motion: no-preference)");

let files = []; // the chosen videos
let previewUrl = null;
let suggested = []; // labels that go with the samples
let filled = ""; // what this page wrote into the labels, as long as nobody changed it
let limits = {};
let sending = null; // the AbortController of the request under way
let retryTimers = [];
let bankTimer = null;
let numChoices = 0; // so that a sample that comes late replaces nothing
let arriving = null; // a sample that was chosen, until it is here

// States of the answer: exactly one is seen.

function show(state) {
  for (const each of ["empty", "busy", "error", "result"]) $(each).hidden = each !== state;
  $("answer").setAttribute("aria-busy", String(state === "busy"));
  if (state === "busy" || state === "empty") stopRetries();
}

function stopRetries() {
  retryTimers.forEach(clearInterval);
  retryTimers = [];
}

function say(text) {
  $("status").textContent = text;
}

function bringIntoView() {
  const { top } = $("answer").getBoundingClientRect();
  if (top >= 0 && top < innerHeight / 2) return;
  $("answer").scrollIntoView({ behavior: wantsMotion.matches ? "smooth" : "auto", block: "start" });
}

function showRefusal(refusal, buttons = []) {
  $("error").replaceChildren(drawRefusal(refusal, buttons));
  show("error");
  const wait = refusal.retrySeconds ? ` Try again in ${refusal.retrySeconds} s.` : "";
  say(`${refusal.title}. ${refusal.message} ${refusal.advice}${wait}`);
  if (refusal.status === 401) askForKey();
  else bringIntoView();
}

// What can be done after a refusal; `again` asks once more, and may allow unknown words.
function buttonsOf(refusal, again) {
  if (refusal.code === "unknown_words") {
    return [button("Recognise all the same", () => again({ allow_unknown_words: "true" }))];
  }
  return refusal.mayBeTriedAgain ? [retryButton(refusal.retrySeconds, again)] : [];
}

function button(text, act) {
  const made = element("button", { type: "button", class: "second", text });
  made.addEventListener("click", act);
  return made;
}

function retryButton(waitSeconds, again) {
  const made = button("", () => again({}));
  made.classList.add("retry");
  const until = Date.now() + 1000 * waitSeconds;
  const timer = setInterval(() => tick(), TICK_MS);
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    made.disabled = left > 0;
    made.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(timer);
  };
  retryTimers.push(timer);
  tick();
  return made;
}

// The videos

function choose(chosen) {
  files = chosen;
  numChoices += 1;
  $("chosen").hidden = !files.length;
  $("drop").classList.toggle("small", Boolean(files.length));
  $("drop-text").textContent = files.length ? "Choose others" : "Choose videos";
  if (!files.length) $("file").value = "";
  $("files").replaceChildren(...files.map(fileRow));
  preview(files[0] ?? null);
  markSample(null);
  complain("");
}

function fileRow(file) {
  const name = element("button", { type: "button", class: "name", text: file.name });
  name.addEventListener("click", () => preview(file));
  const remove = element("button", { type: "button", class: "link", text: "Remove" });
  remove.setAttribute("aria-label", `Remove ${file.name}`);
  remove.addEventListener("click", () => {
    choose(files.filter((each) => each !== file));
    $("drop").focus();
  });
  const size = element("span", { class: "hint", text: sizeOf(file.size) });
  return element("li", { class: "row between" }, element("p", { class: "file" }, name, " ", size), remove);
}

function preview(file) {
  if (previewUrl) URL.revokeObjectURL(previewUrl);
  previewUrl = file ? URL.createObjectURL(file) : null;
  const player = $("preview");
  player.hidden = false;
  $("no-preview").hidden = true;
  files.forEach((each, place) => {
    const name = $("files").children[place].querySelector(".name");
    name.setAttribute("aria-pressed", String(files.length > 1 && each === file));
  });
  if (file) {
    player.src = previewUrl;
    player.autoplay = wantsMotion.matches;
  } else {
    player.removeAttribute("src");
    player.load();
  }
}

function sizeOf(bytes) {
  if (bytes < MIB) return `${Math.max(1, Math.round(bytes / 1024))} KiB`;
  return `${Number((bytes / MIB).toFixed(1))} MiB`;
}

function markSample(name) {
  for (const button of $("samples").children) {
    button.setAttribute("aria-pressed", String(button.dataset.name === name));
  }
}

function prepareDrop() {
  const zone = $("drop");
  const picker = $("file");
  zone.addEventListener("click", () => picker.click());
  picker.addEventListener("change", () => picker.files.length && choose([...picker.files]));
  $("preview").addEventListener("error", () => {
    if (!previewUrl) return;
    $("preview").hidden = true;
    $("no-preview").hidden = false;
  });
  // Anywhere on the page, as a video dropped beside the zone would leave the page otherwise.
  let depth = 0;
  const mark = (change) => {
    depth = Math.max(0, depth + change);
    zone.classList.toggle("over", depth > 0);
  };
  addEventListener("dragenter", () => mark(1));
  addEventListener("dragleave", () => mark(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-depth);
    if (event.dataTransfer.files.length) choose([...event.dataTransfer.files]);
  });
}

async function loadSamples() {
  let listed;
  try {
    listed = await call("samples");
  } catch {
    return; // the page works without them
  }
  showExamples(listed.examples);
  if (listed.note) {
    // What is between backticks is a command.
    const parts = listed.note.split("`");
    $("note").replaceChildren(...parts.map((text, place) => (place % 2 ? element("code", { text }) : text)));
    $("note").hidden = false;
  }
  if (!listed.samples.length) {
    showBankExamples(); // which are closer to what this model is for
    return;
  }
  suggested = listed.labels;
  $("suggest").hidden = false;
  for (const sample of listed.samples) $("samples").append(sampleButton(sample));
  $("samples-part").hidden = false;
}

function showExamples(labels) {
  $("labels").placeholder = labels.join("\n");
}

async function showBankExamples() {
  if (suggested.length) return;
  try {
    const { banks } = await call("v1/labels");
    const first = banks.find(({ active }) => active);
    if (!first) return;
    const { labels } = await call(`v1/labels/${encodeURIComponent(first.name)}`);
    showExamples(labels.slice(0, NUM_EXAMPLES));
  } catch {
    // Without them it has others; of a key asks what needs one.
  }
}

function sampleButton({ name, label }) {
  const picture = element("video", { playsinline: "", loop: "", preload: "auto", "aria-hidden": "true", tabindex: "-1" });
  picture.muted = true;
  const button = element(
    "button",
    { type: "button", class: "sample", "aria-pressed": "false", "data-name": name },
    picture,
    element("span", { text: label }),
  );
  const address = `samples/${name}.mp4`;
  const getting = download(address);
  getting.then((blob) => (picture.src = URL.createObjectURL(blob))).catch(() => {});
  const play = () => wantsMotion.matches && picture.play().catch(() => {});
  const stop = () => picture.pause();
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, play);
  for (const event of ["pointerleave", "blur"]) button.addEventListener(event, stop);
  const take = async () => {
    const choice = (numChoices += 1);
    try {
      const blob = await getting.catch(() => download(address));
      if (choice !== numChoices) return;
      choose([new File([blob], `${name}.mp4`, { type: "video/mp4" })]);
    } catch (error) {
      showRefusal(error);
      return;
    }
    markSample(name);
    if ($("labels").value.trim() === filled.trim()) suggest();
  };
  button.addEventListener("click", () => (arriving = take()));
  return button;
}

// Labels

function suggest() {
  filled = suggested.join("\n");
  $("labels").value = filled;
  countLabels();
}

function ownLabels() {
  const lines = $("labels").value.split("\n").map((line) => line.trim());
  return [...new Set(lines.filter(Boolean))];
}

function countLabels() {
  const number = ownLabels().length;
  const most = limits.labels ? ` (at most ${limits.labels.toLocaleString("en")})` : "";
  $("labels-count").textContent = number ? count(number, "label") : `No labels yet${most}`;
}

function usesBank() {
  return $("source-bank").checked;
}

function showSource() {
  $("own-part").hidden = usesBank();
  $("bank-part").hidden = !usesBank();
  complain("");
  if (usesBank()) loadBanks();
}

async function loadBanks() {
  clearTimeout(bankTimer);
  let banks;
  try {
    ({ banks } = await call("v1/labels"));
  } catch (error) {
    $("bank-hint").textContent = error.message;
    if (error.status === 401) askForKey();
    return;
  }
  const before = $("bank").value;
  $("bank").replaceChildren(...banks.map(bankOption));
  if (banks.some(({ name, active }) => name === before && active)) $("bank").value = before;
  $("bank").disabled = !banks.length;
  const isBuilding = banks.some(({ build }) => ["waiting", "building"].includes(build?.state));
  if (isBuilding && usesBank()) bankTimer = setTimeout(loadBanks, BUILD_MS);
  $("bank-hint").textContent = banks.length
    ? "Label banks are embedded already, so they answer at once however many labels they hold."
    : "This server has no label bank yet. Build one with PUT v1/labels/NAME, or use your own labels.";
}

function bankOption({ name, active, build }) {
  if (active) {
    const text = `${name} – ${count(active.num_labels, "label")}, version ${active.version}`;
    return element("option", { value: name, text });
  }
  const done = build?.total ? `, ${Math.floor((100 * build.done) / build.total)} %` : "";
  return element("option", { value: name, disabled: "", text: `${name} – ${build?.state}${done}` });
}

// The request

// Says what is missing; gives whether something is.
function complain(text, field = null) {
  $("missing").textContent = text;
  $("missing").hidden = !text;
  for (const id of ["labels", "bank"]) $(id).removeAttribute("aria-invalid");
  if (field) {
    if (field !== "drop") $(field).setAttribute("aria-invalid", "true");
    $(field).focus();
  }
  return Boolean(text);
}

function isMissingSomething() {
  if (!files.length) return complain("Choose a video first.", "drop");
  const large = files.find(({ size }) => limits.body_bytes && size > limits.body_bytes);
  if (large) {
    const most = sizeOf(limits.body_bytes);
    return complain(`${large.name} has ${sizeOf(large.size)} and this server takes ${most}.`, "drop");
  }
  if (usesBank()) {
    if ($("bank").value) return complain("");
    return complain("Choose a label bank, or use your own labels.", "bank");
  }
  const number = ownLabels().length;
  if (!number) return complain("Enter at least one label.", "labels");
  if (limits.labels && number > limits.labels) {
    return complain(`Enter at most ${limits.labels} labels, or build a label bank.`, "labels");
  }
  return complain("");
}

// What is asked about each video.
function fieldsOf() {
  return {
    labels: usesBank() ? $("bank").value : JSON.stringify(ownLabels()),
    top_k: String(NUM_SHOWN),
    views: `${$("clips").value}x1`,
    multi_label: String($("multi").checked),
    per_template: "true",
    return_frames: String(files.length <= MOST_WITH_FRAMES),
  };
}

async function ask(file, fields, signal) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  body.append("video", file, file.name);
  const answer = await call("v1/classify", { signal, body });
  const [{ error }] = answer.results;
  if (error) throw new Refusal({ ...error, requestId: answer.request_id });
  return answer;
}

async function send(more = {}) {
  await arriving;
  if (sending || isMissingSomething()) return;
  const outcomes = files.map((file) => new Outcome(file));
  if (outcomes.length === 1) await sendOne(outcomes[0], { ...fieldsOf(), ...more });
  else await sendAll(outcomes, { ...fieldsOf(), ...more });
}

async function sendOne(outcome, fields) {
  show("busy");
  bringIntoView();
  await work([outcome], fields, () => {});
  const { answer, result, refusal } = outcome;
  if (result) {
    $("result").replaceChildren(...drawAnswer(answer), drawDownloads([outcome]));
    show("result");
    say(summaryOf(result));
    bringIntoView();
  } else if (refusal) {
    showRefusal(refusal, buttonsOf(refusal, send));
  } else {
    show("empty");
  }
}

// One after the other; what is known of each is seen at once.
async function sendAll(outcomes, fields) {
  const again = (more) => workOn(outcomes.filter((each) => !each.result), { ...fields, ...more });
  const { list, update } = drawList(outcomes, ({ refusal }) => buttonsOf(refusal, again));
  const told = element("p", { class: "hint told" });
  $("result").replaceChildren(told, list);
  stopRetries();
  show("result");
  bringIntoView();

  async function workOn(todo, asked) {
    if (sending) return;
    stopRetries();
    for (const each of todo) {
      each.state = "waiting";
      each.refusal = null;
      update(each);
    }
    $("result").querySelector(".downloads")?.remove();
    $("answer").setAttribute("aria-busy", "true");
    const tell = () => {
      const done = outcomes.filter((each) => each.result).length;
      told.textContent = `${done} of ${count(outcomes.length, "video")} recognised`;
    };
    tell();
    await work(todo, asked, (each) => {
      update(each);
      tell();
    });
    $("answer").setAttribute("aria-busy", "false");
    told.after(drawDownloads(outcomes));
    const failed = outcomes.filter((each) => each.refusal).length;
    say(`${told.textContent}${failed ? `, ${failed} failed` : ""}.`);
  }

  await workOn(outcomes, fields);
}

// Ask about videos; each outcome is told of whenever it changes. Never throws.
async function work(outcomes, fields, tell) {
  sending = new AbortController();
  const { signal } = sending;
  const stopClock = showClock();
  const change = (outcome, state) => {
    outcome.state = state;
    tell(outcome);
  };
  try {
    for (const outcome of outcomes) {
      change(outcome, "busy");
      try {
        outcome.answer = await ask(outcome.file, fields, signal);
        change(outcome, "done");
      } catch (error) {
        if (error.name === "AbortError") break;
        outcome.refusal = error;
        change(outcome, "failed");
        if (error.code === "unknown_bank") loadBanks();
        if (error.status === 401) askForKey();
        if (!error.isAboutOneVideo) break; // it would meet the next one as well
      }
    }
  } finally {
    stopClock();
    sending = null;
  }
  const rest = outcomes.filter(({ state }) => state === "waiting" || state === "busy");
  for (const outcome of rest) change(outcome, signal.aborted ? "cancelled" : "skipped");
  if (signal.aborted) {
    say("Cancelled.");
    $("send").focus();
  }
}

function showClock() {
  say("Sending and recognising.");
  $("send").setAttribute("aria-disabled", "true");
  $("cancel").hidden = false;
  const started = performance.now();
  const tick = () => ($("busy-time").textContent = seconds((performance.now() - started) / 1000, 1));
  const timer = setInterval(tick, TICK_MS);
  tick();
  return () => {
    clearInterval(timer);
    if (document.activeElement === $("cancel")) $("send").focus();
    $("send").removeAttribute("aria-disabled");
    $("cancel").hidden = true;
  };
}

// The key, and what the server is

function askForKey() {
  $("key-part").hidden = false;
  $("key").focus();
}

async function useKey() {
  const given = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) {
    $("key-hint").textContent = "A key consists of ASCII characters without spaces; look at it again.";
    $("key").focus();
    return;
  }
  setKey(given);
  const refusal = await loadInfo();
  if (refusal) {
    $("key-hint").textContent =
      refusal.status === 401
        ? "The server does not take this key; look at it again."
        : `${refusal.title}. ${refusal.advice}`;
    $("key").select();
    return;
  }
  $("key-part").hidden = true;
  $("key").value = "";
  if (!$("error").hidden) show("empty");
  say("The server takes the key.");
  $("drop").focus();
  if (usesBank()) loadBanks();
  showBankExamples();
}

function badgeOf(verification, { name, precision }) {
  if (!verification?.passed) {
    return `not verified: ${name} in ${precision} was not compared with PyTorch’s golden outputs here`;
  }
  const { num_comparisons: number, verified_seconds: time } = verification;
  const options = { dateStyle: "medium", timeStyle: "short" };
  const when = time ? ` on ${new Date(1000 * time).toLocaleString("en-GB", options)}` : "";
  const agree = `${count(number, "comparison")} with PyTorch’s golden outputs agree`;
  return `verified${when}: ${name} in ${precision}, ${agree}`;
}

// Gives the refusal, if there is one.
async function loadInfo() {
  let info;
  try {
    info = await call("v1/info");
  } catch (error) {
    $("served").textContent =
      error.status === 401 ? "This server asks for a key." : `${error.title}. ${error.advice}`;
    if (error.status === 401) askForKey();
    // A server that is starting says when to ask again.
    else if (error.retrySeconds) setTimeout(loadInfo, 1000 * error.retrySeconds);
    return error;
  }
  limits = info.limits;
  showPages(info);
  const { runtime, bundle, verification } = info;
  $("served").replaceChildren(
    element("b", { text: bundle.name }),
    ` on ${runtime.name}, ${providerOf(runtime)}, ${runtime.precision}`,
  );
  $("badge").textContent = badgeOf(verification, runtime);
  $("badge").classList.toggle("verified", Boolean(verification?.passed));
  $("badge").classList.toggle("unverified", !verification?.passed);
  $("badge").hidden = false;
  const duration = limits.duration_seconds >= 120
    ? `${Math.round(limits.duration_seconds / 60)} min`
    : `${limits.duration_seconds} s`;
  $("drop-hint").textContent = `MP4, WebM, MKV, AVI, MOV …, up to ${sizeOf(limits.body_bytes)} and ${duration}`;
  $("version").textContent = `actionclip-deploy ${info.version}`;
  countLabels();
  return null;
}

function start() {
  prepareDrop();
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("cancel").addEventListener("click", () => sending?.abort());
  $("suggest").addEventListener("click", suggest);
  $("labels").addEventListener("input", () => {
    filled = "";
    complain("");
    countLabels();
  });
  for (const radio of document.getElementsByName("source")) radio.addEventListener("change", showSource);
  $("key-use").addEventListener("click", useKey);
  $("key").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    useKey();
  });
  countLabels();
  showSource(); // a browser that comes back may have kept the choice
  loadInfo();
  loadSamples();
}

start();

// The form: a video, labels, one button; and which of its states the answer is in.

import { count, drawAnswer, element, providerOf, seconds, summaryOf } from "./answer.js";
import { call, download, Refusal, setKey } from "./requests.js";

const NUM_SHOWN = 8; // labels of an answer
const TICK_MS = 100;
const BUILD_MS = 2000; // between two looks at a label bank that is being built
const MIB = 1024 * 1024;

const $ = (id) => document.getElementById(id);
const wantsMotion = matchMedia("(prefers-reduced-motion: no-preference)");

let file = null; // the chosen video
let previewUrl = null;
let suggested = []; // labels that go with the samples
let filled = ""; // what this page wrote into the labels, as long as nobody changed it
let limits = {};
let sending = null; // the AbortController of the request under way
let retryTimer = null;
let bankTimer = null;
let numChoices = 0; // so that a sample that comes late replaces nothing
let arriving = null; // a sample that was chosen, until it is here

// States of the answer: exactly one is seen.

function show(state) {
  for (const each of ["empty", "busy", "error", "result"]) $(each).hidden = each !== state;
  $("answer").setAttribute("aria-busy", String(state === "busy"));
  clearInterval(retryTimer);
}

function say(text) {
  $("status").textContent = text;
}

function bringIntoView() {
  const { top } = $("answer").getBoundingClientRect();
  if (top >= 0 && top < innerHeight / 2) return;
  $("answer").scrollIntoView({ behavior: wantsMotion.matches ? "smooth" : "auto", block: "start" });
}

function showRefusal(refusal) {
  $("error-title").textContent = refusal.title;
  $("error-message").textContent = refusal.message;
  $("error-advice").textContent = refusal.advice;
  const facts = [
    refusal.status ? `Status ${refusal.status}` : "No status",
    refusal.code,
    refusal.requestId && `request ${refusal.requestId}`,
  ];
  $("error-facts").textContent = facts.filter(Boolean).join(" · ");
  show("error");
  offerRetry(refusal);
  const wait = refusal.retrySeconds ? ` Try again in ${refusal.retrySeconds} s.` : "";
  say(`${refusal.title}. ${refusal.message} ${refusal.advice}${wait}`);
  if (refusal.status === 401) askForKey();
  else bringIntoView();
}

function offerRetry(refusal) {
  const button = $("retry");
  button.hidden = !refusal.mayBeTriedAgain;
  const until = Date.now() + 1000 * refusal.retrySeconds;
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(retryTimer);
  };
  retryTimer = setInterval(tick, TICK_MS);
  tick();
}

// The video

function choose(chosen) {
  file = chosen;
  numChoices += 1;
  if (previewUrl) URL.revokeObjectURL(previewUrl);
  previewUrl = file ? URL.createObjectURL(file) : null;
  const preview = $("preview");
  preview.hidden = false;
  $("no-preview").hidden = true;
  if (file) {
    preview.src = previewUrl;
    preview.autoplay = wantsMotion.matches;
    $("file-name").textContent = file.name;
    $("file-size").textContent = sizeOf(file.size);
  } else {
    preview.removeAttribute("src");
    preview.load();
    $("file").value = "";
  }
  $("chosen").hidden = !file;
  $("drop").classList.toggle("small", Boolean(file));
  $("drop-text").textContent = file ? "Choose another video" : "Choose a video";
  markSample(null);
  complain("");
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
  picker.addEventListener("change", () => picker.files.length && choose(picker.files[0]));
  $("remove").addEventListener("click", () => {
    choose(null);
    zone.focus();
  });
  $("preview").addEventListener("error", () => {
    if (!file) return;
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
    const [dropped] = event.dataTransfer.files;
    if (dropped) choose(dropped);
  });
}

async function loadSamples() {
  let listed;
  try {
    listed = await call("samples");
  } catch {
    return; // the page works without them
  }
  suggested = listed.labels;
  $("suggest").hidden = false;
  for (const sample of listed.samples) $("samples").append(sampleButton(sample));
  $("samples-part").hidden = false;
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
      choose(new File([blob], `${name}.mp4`, { type: "video/mp4" }));
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
  if (!file) return complain("Choose a video first.", "drop");
  if (limits.body_bytes && file.size > limits.body_bytes) {
    const most = sizeOf(limits.body_bytes);
    return complain(`The file has ${sizeOf(file.size)} and this server takes ${most}.`, "drop");
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

function bodyOf() {
  const body = new FormData();
  body.append("labels", usesBank() ? $("bank").value : JSON.stringify(ownLabels()));
  body.append("top_k", String(NUM_SHOWN));
  body.append("views", `${$("clips").value}x1`);
  body.append("multi_label", String($("multi").checked));
  body.append("per_template", "true");
  body.append("return_frames", "true");
  body.append("video", file, file.name);
  return body;
}

async function send() {
  await arriving;
  if (sending || isMissingSomething()) return;
  sending = new AbortController();
  const stopClock = showBusy();
  try {
    const answer = await call("v1/classify", { signal: sending.signal, body: bodyOf() });
    const [result] = answer.results;
    if (result.error) throw new Refusal({ ...result.error, requestId: answer.request_id });
    $("result").replaceChildren(...drawAnswer(answer));
    show("result");
    say(summaryOf(answer));
    bringIntoView();
  } catch (error) {
    if (error.name === "AbortError") {
      show("empty");
      say("Cancelled.");
      $("send").focus();
    } else {
      if (error.code === "unknown_bank") loadBanks();
      showRefusal(error);
    }
  } finally {
    stopClock();
    sending = null;
  }
}

function showBusy() {
  show("busy");
  say("Sending and recognising.");
  bringIntoView();
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
  const { runtime, bundle, verification } = info;
  $("served").replaceChildren(
    element("b", { text: bundle.name }),
    ` on ${runtime.name}, ${providerOf(runtime)}, ${runtime.precision}, `,
    element("span", {
      class: verification?.passed ? "verified" : "unverified",
      text: verification?.passed ? "verified" : "not verified",
    }),
  );
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
  $("retry").addEventListener("click", send);
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

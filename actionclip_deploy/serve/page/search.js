// The page of the archive: a query, moments as tiles, and a player that begins at the moment.

import { count, drawRefusal, element, milliseconds, seconds, showKeyForm, showPages, takeKey } from "./answer.js";
import { call, refusalAt } from "./requests.js";

const FIELDS = ["text", "without", "camera", "video", "from", "to", "top"];
const USUAL_TOP = "20";
const NUM_FRAMES_AT_ONCE = 2; // that are taken from videos for want of a picture
const FRAME_MS = 15_000; // after which one that does not come is given up

const $ = (id) => document.getElementById(id);

let like = null; // { video, seconds } of the moment that others are to be like
let searching = null; // the AbortController of the search under way
let played = null;
let framesToTake = [];
let numTaking = 0;

// The query, in the fields and in the address

function fill(query) {
  for (const name of FIELDS) $(name).value = query.get(name) ?? (name === "top" ? USUAL_TOP : "");
  // A name that is none of the list's leaves it empty, which would be all.
  if (!$("camera").value) $("camera").value = "";
  if (!$("top").value) $("top").value = USUAL_TOP;
  const [, video, time] = /^(.+)@([\d.]+)$/s.exec(query.get("like") ?? "") ?? [];
  setLike(video ? { video, seconds: Number(time) } : null);
  $("where").open = ["camera", "video", "from", "to"].some((name) => query.get(name));
}

function setLike(moment) {
  like = moment;
  $("text-part").hidden = Boolean(like);
  $("like-part").hidden = !like;
  if (like) $("like").textContent = `${nameOf(like.video)} at ${clock(like.seconds)}`;
}

function queryOf() {
  const query = new URLSearchParams();
  if (like) query.set("like", `${like.video}@${like.seconds}`);
  for (const name of FIELDS) {
    const value = $(name).value.trim();
    if (value && !(name === "text" && like) && !(name === "top" && value === USUAL_TOP)) query.set(name, value);
  }
  return query;
}

function bodyOf() {
  const time = (id) => ($(id).value ? new Date($(id).value).getTime() / 1000 : null);
  const list = (id) => ($(id).value.trim() ? [$(id).value.trim()] : []);
  return {
    // A number is an id, for a name that an address cannot hold.
    ...(like
      ? { like: { video: /^#\d+$/.test(like.video) ? Number(like.video.slice(1)) : like.video, seconds: like.seconds } }
      : { text: $("text").value.trim() }),
    without: list("without"),
    cameras: $("camera").value ? [$("camera").value] : [],
    videos: list("video"),
    from_seconds: time("from"),
    to_seconds: time("to"),
    top: Number($("top").value),
  };
}

function likeQuery(moment) {
  const query = queryOf();
  query.delete("text");
  query.delete("video");
  query.set("like", `${moment.video.isWellFormed?.() === false ? `#${moment.video_id}` : moment.video}@${moment.peak_seconds}`);
  return query;
}

// Searching

async function search({ isNew = true, ...more } = {}) {
  complain("");
  const query = queryOf();
  if (!query.get("text") && !like) {
    complain("Say what to look for.", "text");
    return;
  }
  if (query.get("from") && query.get("to") && query.get("from") > query.get("to")) {
    $("where").open = true;
    complain("“Recorded from” is later than “Recorded until”.", "from");
    return;
  }
  if (isNew && `?${query}` !== location.search) history.pushState(null, "", `?${query}`);
  searching?.abort();
  const mine = (searching = new AbortController());
  show({ isBusy: true });
  say("Searching …");
  try {
    const body = JSON.stringify({ ...bodyOf(), ...more });
    const answer = await call("v1/search", { body, signal: mine.signal });
    if (mine === searching) showAnswer(answer);
  } catch (refusal) {
    if (refusal.name !== "AbortError" && mine === searching) showRefusal(refusal);
  }
}

function show({ isBusy = false, state = "moments" } = {}) {
  $("answer").classList.toggle("busy-now", isBusy);
  $("answer").setAttribute("aria-busy", String(isBusy));
  if (isBusy) return;
  for (const each of ["error", "empty", "moments"]) $(each).hidden = each !== state;
}

function showRefusal(refusal) {
  if (refusal.status === 401) askForKey();
  const buttons = [];
  const button = (text, more) => {
    const made = element("button", { type: "button", class: "second", text });
    made.addEventListener("click", () => search(more));
    buttons.push(made);
  };
  if (refusal.code === "unknown_words") button("Search all the same", { allow_unknown_words: true });
  if (refusal.mayBeTriedAgain) button("Try again", {});
  // What the API says of its own field is what the button does.
  refusal.message = refusal.message.replace(/ To score such texts [^.]*\.$/, "");
  $("error").replaceChildren(drawRefusal(refusal, buttons));
  show({ state: "error" });
  say("");
  bringIntoView();
}

// On a phone the fields may fill the window.
function bringIntoView() {
  const { top } = $("answer").getBoundingClientRect();
  if (top > 0.6 * innerHeight) $("answer").scrollIntoView({ block: "start" });
}

function showAnswer(answer) {
  framesToTake = [];
  const { moments, num_windows: all, num_searched: searched } = answer;
  const among = searched === all ? count(all, "window") : `${searched.toLocaleString("en")} of ${count(all, "window")}`;
  const notes = [`${moments.length ? count(moments.length, "moment") : "Nothing found"} among ${among}, in ${milliseconds(answer.timings_ms.total)}`];
  if (moments.length) notes.push("z: standard deviations above the mean of all windows");
  if (answer.num_undated) notes.push(`${count(answer.num_undated, "video")} without a known time left out`);
  if (answer.is_approximate) notes.push("found by an index, which may miss some");
  const unknown = answer.unknown_words ?? [];
  if (unknown.length) notes.push(`the model does not know ${unknown.slice(0, 8).map((word) => `“${word}”`).join(", ")}`);
  say(`${notes.join(" · ")}.`);
  $("moments").replaceChildren(...moments.map(tileOf));
  show();
  bringIntoView();
  if (moments.length) return;
  const why = all
    ? "No window passes the filters, or all are nearer to what it must not be."
    : "The archive has no windows yet; actionclip index fills it, and this page sees them at once.";
  $("empty").replaceChildren(
    element("p", { class: "empty-main", text: "No moments" }),
    element("p", { class: "hint", text: why }),
  );
  show({ state: "empty" });
}

function tileOf(moment) {
  const span = `${clock(moment.start_seconds)} – ${clock(moment.end_seconds)}`;
  const name = nameOf(moment.video);
  const play = element("button", {
    type: "button",
    class: "screen play",
    "aria-label": `Play moment ${moment.rank}, ${span} of ${name}`,
  });
  play.addEventListener("click", () => openPlayer(moment));
  showPicture(play, moment);
  play.append(element("span", { class: "number", "aria-hidden": "true", text: span }));
  const similar = element("a", { class: "second small", href: `?${likeQuery(moment)}`, text: "Find similar" });
  follow(similar, moment);
  const when = moment.recorded_seconds === null ? null : new Date(1000 * moment.recorded_seconds);
  return element(
    "li",
    { class: "card tile" },
    play,
    element(
      "div",
      { class: "facts-of-tile" },
      element(
        "div",
        { class: "row between" },
        element("span", { class: "rank", text: `${moment.rank}. ${moment.folder}` }),
        element("span", { class: "number", title: `Cosine ${moment.cosine.toFixed(3)}`, text: `z ${moment.z.toFixed(1)}` }),
      ),
      when && element("time", { class: "number", datetime: when.toISOString(), text: when.toLocaleString("en-GB") }),
      element("p", { class: "file", title: moment.video, text: name }),
      element("div", { class: "row" }, similar),
    ),
  );
}

// A link that stays on the page, but can be opened in another tab as well.
function follow(link, moment) {
  link.onclick = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    $("player").close();
    fill(likeQuery(moment));
    search();
    scrollTo({ top: 0 });
  };
}

// Pictures. Where the archive kept none, a frame is taken from the video, a few at a time.

function showPicture(place, moment) {
  if (moment.thumbnail_url) {
    const picture = element("img", { src: addressOf(moment.thumbnail_url), alt: "", loading: "lazy" });
    picture.addEventListener("error", () => picture.replaceWith(noPicture()));
    place.append(picture);
    return;
  }
  const seen = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting) return;
    seen.disconnect();
    framesToTake.push({ place, moment });
    takeFrames();
  });
  seen.observe(place);
}

function noPicture() {
  return element("span", { class: "why", text: "No picture" });
}

function takeFrames() {
  while (numTaking < NUM_FRAMES_AT_ONCE && framesToTake.length) {
    const { place, moment } = framesToTake.shift();
    numTaking += 1;
    takeFrame(moment)
      .catch(noPicture)
      .then((shown) => {
        place.prepend(shown);
        numTaking -= 1;
        takeFrames();
      });
  }
}

async function takeFrame(moment) {
  const video = element("video", { muted: "", preload: "auto" });
  video.muted = true;
  try {
    await new Promise((resolve, reject) => {
      video.onseeked = resolve;
      video.onerror = reject;
      setTimeout(reject, FRAME_MS);
      video.onloadedmetadata = () => {
        video.currentTime = Math.min(moment.peak_seconds, video.duration || moment.peak_seconds);
      };
      video.src = addressOf(moment.video_url);
    });
    const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    return canvas;
  } finally {
    video.onerror = null;
    video.removeAttribute("src");
    video.load(); // lets its connection go
  }
}

// The player

function openPlayer(moment) {
  played = moment;
  $("player-title").textContent = `${moment.rank}. ${moment.folder} ${clock(moment.start_seconds)} – ${clock(moment.end_seconds)}`;
  $("player-facts").textContent = `${moment.video} · z ${moment.z.toFixed(1)}`;
  $("player-like").href = `?${likeQuery(moment)}`;
  follow($("player-like"), moment);
  $("film-trouble").hidden = true;
  $("film").hidden = $("again").hidden = false;
  $("download").hidden = true;
  $("download").href = addressOf(moment.video_url);
  $("download").download = nameOf(moment.video);
  $("film").src = `${addressOf(moment.video_url)}#t=${moment.start_seconds}`;
  $("player").showModal();
  playFromStart();
}

function playFromStart() {
  const film = $("film");
  if (film.readyState > 0) film.currentTime = played.start_seconds;
  film.play().catch(() => {}); // a browser may want a click first
}

async function tellWhyNot() {
  if (!$("player").open) return;
  const refusal = await refusalAt(addressOf(played.video_url));
  const span = `${clock(played.start_seconds)} – ${clock(played.end_seconds)}`;
  $("film-trouble").textContent = refusal
    ? refusal.message
    : `This browser cannot play the file. The moment is at ${span} in it.`;
  $("film-trouble").hidden = false;
  $("film").hidden = $("again").hidden = true;
  $("download").hidden = Boolean(refusal);
}

function closePlayer() {
  $("film").removeAttribute("src");
  $("film").load();
}

// Words

function say(text) {
  $("status").textContent = text;
}

// Says what is wrong with a field, and goes to it.
function complain(text, field = null) {
  $("missing").textContent = text;
  $("missing").hidden = !text;
  for (const name of FIELDS) $(name).setAttribute("aria-invalid", String(name === field));
  if (field) $(field).focus();
}

function nameOf(path) {
  return path.slice(path.lastIndexOf("/") + 1);
}

// Addresses are relative, as the server may have a folder of its own behind a proxy.
function addressOf(url) {
  return url.replace(/^\//, "");
}

function clock(time) {
  const tenths = Math.round(10 * time);
  const [hours, minutes, rest] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60, (tenths % 600) / 10];
  const end = rest.toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${end}` : `${minutes}:${end}`;
}

// The archive, and the key

// Gives the refusal, if there is one.
async function loadArchive() {
  try {
    const info = await call("v1/info");
    showPages(info);
    $("none").hidden = Boolean(info.archive);
    if (!info.archive) {
      $("summary").textContent = "";
      return null;
    }
    const archive = await call("v1/archive");
    const hours = archive.hours < 1 ? seconds(3600 * archive.hours, 0) : `${archive.hours.toFixed(1)} h`;
    $("summary").textContent = `${archive.name}: ${count(archive.num_videos, "video")}, ${hours}, ${count(archive.num_windows, "window")}`;
    const cameras = archive.cameras.map(({ name, num_videos: number }) =>
      element("option", { value: name, text: `${name || "(no name)"} (${count(number, "video")})` }),
    );
    $("camera").replaceChildren(element("option", { value: "", text: "All" }), ...cameras);
    await suggest();
    // Last, since what the address says is put into the fields at once: nobody has typed yet.
    $("search").hidden = false;
    return null;
  } catch (refusal) {
    if (refusal.status === 401) askForKey();
    else {
      $("summary").textContent = `${refusal.title}. ${refusal.advice}`;
      if (refusal.retrySeconds) setTimeout(begin, 1000 * refusal.retrySeconds);
    }
    return refusal;
  }
}

// Words that the model knows; of some nobody can say which they are.
async function suggest() {
  try {
    const [example] = (await call("samples")).examples;
    $("example").textContent = example ?? "";
    $("for-example").hidden = !example;
  } catch {
    $("for-example").hidden = true;
  }
}

function askForKey() {
  showKeyForm($("search"));
}

async function useKey(event) {
  event.preventDefault();
  await takeKey(begin);
}

// What the address says, in the fields and below them.
function showAddress() {
  const query = new URLSearchParams(location.search);
  fill(query);
  const camera = query.get("camera");
  if (camera && !$("camera").value) {
    show({ state: "empty" });
    complain(`The archive has no camera “${camera}”; choose one of the list.`, "camera");
  } else if (query.get("text") || like) search({ isNew: false });
  else show({ state: "empty" });
}

async function begin() {
  const refusal = await loadArchive();
  if (!refusal && !$("search").hidden) showAddress();
  return refusal;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
$("unlike").addEventListener("click", () => {
  setLike(null);
  $("text").focus();
});
$("key-form").addEventListener("submit", useKey);
$("close").addEventListener("click", () => $("player").close());
$("again").addEventListener("click", playFromStart);
$("player").addEventListener("close", closePlayer);
$("film").addEventListener("error", () => $("film").hasAttribute("src") && tellWhyNot());
addEventListener("popstate", showAddress);
begin();

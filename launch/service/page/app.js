// The page: a form, the videos so far, and the chosen one, whose id is in the address.

import * as api from "./api.js";
import { Form } from "./form.js";
import { words } from "./text.js";
import { Videos } from "./videos.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
// Where there is no room beside the list, the chosen video covers it. style.css has the same width.
const narrow = matchMedia("(max-width: 799px)");

const videos = new Videos($("history"));
const form = new Form($("form"), {
  onMade(video) {
    videos.put(video);
    location.hash = video.id;
  },
  askForKey,
});
const viewer = new Viewer($("stage"), {
  onChanged(video) {
    const before = videos.get(video.id)?.status;
    videos.put(video);
    if (before !== video.status) $("announce").textContent = `${video.prompt}: ${words(video)}`;
  },
  onRemoved(id) {
    videos.remove(id);
    forget($("prompt"));
  },
  onReuse(video) {
    form.fill(video);
    if (narrow.matches) close($("prompt"));
    else $("prompt").focus();
  },
});

// The chosen video

const idIn = (hash) => /^#(video_\w+)$/.exec(hash)?.[1] ?? null;
let shown = null;
let focusAfter = null;

async function route() {
  const id = idIn(location.hash);
  if (id === shown) return;
  const left = shown;
  shown = id;
  videos.choose(id);
  arrange();
  if (id === null) {
    viewer.blank();
    if (focusAfter || narrow.matches) (focusAfter ?? videos.link(left))?.focus({ preventScroll: focusAfter === null });
    focusAfter = null;
    return;
  }
  $("viewer").scrollTop = 0;
  if (narrow.matches) $("close").focus();
  try {
    const video = videos.get(id) ?? (await api.find(id));
    if (shown === id) await viewer.show(video);
  } catch (error) {
    if (shown !== id) return;
    if (askForKey(error)) shown = null;
    else viewer.blank(error.message);
  }
}

function arrange() {
  document.body.classList.toggle("viewing", shown !== null);
  const covered = narrow.matches && shown !== null;
  for (const part of [document.querySelector("header"), $("side")]) part.inert = covered;
}

// Back to the list: where it was opened from the list, as the browser's own button does.
function close(focus = null) {
  focusAfter = focus;
  if (history.state?.fromList) history.back();
  else forget(focus);
}

function forget(focus) {
  focusAfter = focus;
  history.replaceState(null, "", location.pathname + location.search);
  route();
}

// Neither column moves by itself, so there is nothing to restore.
history.scrollRestoration = "manual";
addEventListener("hashchange", (event) => {
  const opened = idIn(location.hash) && !idIn(new URL(event.oldURL).hash);
  if (opened && history.state === null) history.replaceState({ fromList: true }, "");
  route();
});
narrow.addEventListener("change", arrange);
$("close").addEventListener("click", () => close());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && narrow.matches && shown !== null && !$("key-dialog").open) close();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address keeps the chosen video
  $("prompt").focus();
});

// Keys

function askForKey(error) {
  if (error.status !== 401) return false;
  $("key-button").hidden = false;
  if (!$("key-dialog").open) $("key-dialog").showModal();
  return true;
}

$("key-button").addEventListener("click", () => $("key-dialog").showModal());
$("key-dialog").addEventListener("close", () => {
  api.setKey($("key").value);
  $("key").value = "";
  look().then(route);
});

// What changes without us: other tabs, other clients, the service itself.

let timer = 0;
let model = null;

async function look() {
  clearTimeout(timer);
  const { status, reason } = await api.health();
  $("health").dataset.state = { healthy: "good", unhealthy: "wait" }[status] ?? "bad";
  $("health").textContent = status === "healthy" ? "ready" : reason;
  let pause = 10000;
  try {
    if (!model) describe(await api.model(), await api.settings());
    await videos.load();
    if (videos.live.size) pause = 1500;
  } catch (error) {
    if (askForKey(error)) return;
    pause = 3000;
  }
  if (status !== "healthy") pause = Math.min(pause, 1500);
  timer = setTimeout(look, document.hidden ? 15000 : pause);
}

function describe(found, settings) {
  model = found;
  $("model").textContent = `${model.id} · ${model.family}`;
  document.title = `heterostep · ${model.id}`;
  form.describe(model, settings);
  // Pictures of the usual shape fill their cards; others are shown whole, with room beside them.
  const shape = model.defaults.width / model.defaults.height;
  if (shape) $("list").style.setProperty("--shape", Math.min(Math.max(shape, 0.75), 16 / 9));
}

document.addEventListener("visibilitychange", () => document.hidden || look());
look().then(route);

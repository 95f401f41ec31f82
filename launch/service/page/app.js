// The page: a form, the chosen video, and the videos so far.

import * as api from "./api.js";
import { ago, duration, el, percent, words } from "./text.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
let videos = new Map(); // by id, newest first
const thumbnails = new Map(); // object URL by id
let card = null;
let untouched = {}; // what the form held before anybody changed it, by name
let more = false;

const viewer = new Viewer($("viewer"), {
  onChanged(video) {
    const before = videos.get(video.id)?.status;
    remember(video);
    if (before !== video.status) $("announce").textContent = `${video.prompt}: ${words(video)}`;
  },
  onRemoved(id) {
    videos.delete(id);
    URL.revokeObjectURL(thumbnails.get(id));
    thumbnails.delete(id);
    renderList();
    $("prompt").focus();
  },
  onReuse: fill,
});

// Form

function describe(model) {
  card = model;
  $("model").textContent = `${model.id} · ${model.family}`;
  document.title = `heterostep · ${model.id}`;
  const { elements } = form;
  const [wide, high] = model.size_step;
  for (const [name, step] of [["width", wide], ["height", high]]) Object.assign(elements[name], { min: step, step });
  Object.assign(elements.num_frames, { min: 1, max: model.limits.frames, step: model.frame_step });
  elements.num_inference_steps.max = model.limits.steps;
  elements.prompt.maxLength = model.limits.prompt;
  $("image-field").hidden = !model.inputs.includes("image");
  for (const [name, value] of Object.entries(model.defaults)) {
    if (elements[name] && value != null) elements[name].value = name === "compute" ? Math.round(value * 100) : value;
  }
  elements.guidance_scale_2.closest("label").hidden = model.defaults.guidance_scale_2 == null;
  untouched = Object.fromEntries([...elements].map(({ name, value }) => [name, value]));
  describeCompute();
}

function describeCompute() {
  const value = Number(form.elements.compute.value);
  $("compute-text").textContent = `${value}%`;
  form.elements.compute.style.setProperty("--filled", `${((value - 10) / 90) * 100}%`);
  $("compute-hint").textContent = value === 100 ? "Every token at every step: the model's own result." : `${value}% of the dense denoising work, spent where it matters most.`;
}

function fill(video) {
  const { elements } = form;
  const [width, height] = video.size.split("x");
  const values = { ...video, width, height, compute: Math.round(video.compute * 100) };
  for (const name of ["prompt", "negative_prompt", "width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "guidance_scale_2", "seed", "compute"]) {
    elements[name].value = values[name] ?? "";
  }
  describeCompute();
  form.querySelector("details").open = true;
  elements.prompt.focus();
}

// Only what was changed: a default that is sent counts as the user's own choice, and one guidance as that of both experts.
function fields() {
  const { elements } = form;
  const changed = (...names) => names.some((name) => elements[name].value !== untouched[name]);
  const asked = { prompt: elements.prompt.value };
  if (changed("width", "height")) asked.size = `${elements.width.value}x${elements.height.value}`;
  if (changed("compute")) asked.compute = Number(elements.compute.value) / 100;
  for (const names of [["num_frames"], ["fps"], ["num_inference_steps"], ["guidance_scale", "guidance_scale_2"], ["seed"]]) {
    if (!changed(...names)) continue;
    for (const name of names) if (elements[name].value !== "") asked[name] = Number(elements[name].value);
  }
  if (elements.negative_prompt.value) asked.negative_prompt = elements.negative_prompt.value;
  return asked;
}

function complain(text) {
  $("form-error").textContent = text;
  $("form-error").hidden = !text;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  complain("");
  $("create").disabled = true;
  try {
    const video = await api.create(fields(), form.elements.image.files[0]);
    videos = new Map([[video.id, video], ...videos]);
    choose(video.id);
  } catch (error) {
    if (!askForKey(error)) complain(error.message);
  } finally {
    $("create").disabled = false;
  }
});
// An invalid field inside closed settings could not be shown.
form.addEventListener("invalid", (event) => event.target.closest("details")?.setAttribute("open", ""), true);
form.elements.compute.addEventListener("input", describeCompute);
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

// Videos

function remember(video) {
  const { preview, ...rest } = video;
  videos.set(video.id, rest);
  renderList();
}

function choose(id) {
  viewer.show(videos.get(id));
  renderList();
  if (matchMedia("(max-width: 820px)").matches) $("viewer").scrollIntoView({ block: "start" });
}

function renderList() {
  const list = $("list");
  const items = new Map([...list.children].map((item) => [item.dataset.id, item]));
  const wanted = [...videos.values()];
  wanted.forEach((video, index) => {
    const item = items.get(video.id) ?? newItem(video);
    items.delete(video.id);
    update(item, video);
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  for (const item of items.values()) item.remove();
  $("history-empty").hidden = wanted.length > 0;
  $("more").hidden = !more;
}

function newItem(video) {
  const button = el("button", { type: "button", onclick: () => choose(video.id) },
    el("div", { className: "picture" }),
    el("div", { className: "bar" }, el("div")),
    el("div", { className: "words" }, el("div", { className: "prompt" }, video.prompt), el("div", { className: "when" })),
  );
  const item = el("li", {}, button);
  item.dataset.id = video.id;
  return item;
}

const SHORT = { queued: "waiting", failed: "failed", cancelled: "cancelled", completed: "" };

function update(item, video) {
  const button = item.firstChild;
  button.setAttribute("aria-current", String(viewer.video?.id === video.id));
  const picture = button.querySelector(".picture");
  const bar = button.querySelector(".bar");
  bar.hidden = video.status !== "in_progress";
  bar.firstChild.style.width = `${video.progress}%`;
  const done = video.status === "completed";
  button.querySelector(".when").textContent = done ? `${ago(video.completed_at)} · ${duration(video.timing.total)} · ${percent(video.hsa.achieved)}` : words(video);
  if (!done) picture.textContent = video.status === "in_progress" ? `${video.progress}%` : SHORT[video.status];
  else if (picture.dataset.id !== video.id) {
    picture.dataset.id = video.id;
    picture.textContent = "";
    thumbnail(video, picture);
  }
}

async function thumbnail(video, picture) {
  try {
    if (!thumbnails.has(video.id)) thumbnails.set(video.id, await api.file(video.id, "thumbnail"));
    const small = parseInt(video.size, 10) < 256 ? "small" : "";
    picture.replaceChildren(el("img", { src: thumbnails.get(video.id), alt: "", className: small }));
  } catch {
    delete picture.dataset.id; // tried again at the next look
  }
}

$("more").addEventListener("click", async () => {
  try {
    const page = await api.list([...videos.keys()].at(-1));
    for (const video of page.data) videos.set(video.id, video);
    more = page.has_more;
    renderList();
  } catch (error) {
    complain(error.message);
  }
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
  look();
});

// What changes without us: other tabs, other clients, the service itself.

let timer = 0;

async function look() {
  clearTimeout(timer);
  const { status, reason } = await api.health();
  $("health").dataset.state = { healthy: "good", unhealthy: "wait" }[status] ?? "bad";
  $("health").textContent = status === "healthy" ? "ready" : reason;
  let pause = 10000;
  try {
    if (!card) describe(await api.model());
    const page = await api.list();
    if (videos.size <= page.data.length) more = page.has_more;
    // Of the newest page the server knows best; older ones were shown on request.
    const newest = new Map(page.data.map((video) => [video.id, video]));
    const last = page.data.at(-1);
    const ids = [...videos.keys()];
    const older = last && newest.size && ids.includes(last.id) ? ids.slice(ids.indexOf(last.id) + 1) : [];
    videos = new Map([...newest, ...older.map((id) => [id, videos.get(id)])]);
    if (page.data.some((video) => ["queued", "in_progress"].includes(video.status))) pause = 1500;
    renderList();
  } catch (error) {
    if (askForKey(error)) return;
    pause = 3000;
  }
  if (status !== "healthy") pause = Math.min(pause, 1500);
  timer = setTimeout(look, document.hidden ? 15000 : pause);
}

document.addEventListener("visibilitychange", () => document.hidden || look());
describeCompute();
look();

// The videos so far: the running ones, how many wait, and the finished ones, newest first.

import * as api from "./api.js";
import { ago, duration, el, isLive, percent, plural, words } from "./text.js";

const LIVE = { status: ["queued", "in_progress"], order: "asc", limit: 100 };
const FINISHED = { status: ["completed", "failed", "cancelled"], limit: 24 };

export class Videos {
  constructor(place) {
    this.place = place;
    this.live = new Map(); // by id, in the order in which they are made
    this.finished = new Map(); // by id, newest first
    this.uncounted = false; // whether more are live than were asked for
    this.older = false; // whether there are finished ones that were not asked for
    this.chosen = null;
    this.thumbnails = new Map(); // object URL by id
    place.querySelector("#more").addEventListener("click", () => this.showOlder());
  }

  get(id) {
    return this.live.get(id) ?? this.finished.get(id);
  }

  // The link of a video, if it is listed.
  link(id) {
    return this.place.querySelector(`[data-id="${id}"] > a`);
  }

  choose(id) {
    this.chosen = id;
    this.render();
  }

  // What changed without us. The live ones first: one that ends meanwhile is then in both answers, not in neither.
  async load() {
    const live = await api.list(LIVE);
    const newest = await api.list(FINISHED);
    const ids = [...this.finished.keys()];
    const last = ids.indexOf(newest.last_id);
    // Of the newest page the server knows best; older ones were shown on request.
    const older = last < 0 ? [] : ids.slice(last + 1).map((id) => this.finished.get(id));
    if (!older.length) this.older = newest.has_more;
    this.uncounted = live.has_more;
    this.finished = byId([...newest.data, ...older]);
    this.live = byId(live.data.filter((video) => !this.finished.has(video.id)));
    this.render();
  }

  async showOlder() {
    const page = await api.list({ ...FINISHED, after: [...this.finished.keys()].at(-1) });
    this.older = page.has_more;
    this.finished = byId([...this.finished.values(), ...page.data]);
    this.render();
  }

  put({ preview, ...video }) {
    if (isLive(video)) this.live.set(video.id, video);
    else {
      this.live.delete(video.id);
      this.finished = byId(this.finished.has(video.id) ? [...this.finished.values(), video] : [video, ...this.finished.values()]);
    }
    this.render();
  }

  remove(id) {
    this.live.delete(id);
    this.finished.delete(id);
    URL.revokeObjectURL(this.thumbnails.get(id));
    this.thumbnails.delete(id);
    this.render();
  }

  render() {
    const live = [...this.live.values()];
    const waiting = live.filter((video) => video.status === "queued");
    const focused = document.activeElement?.closest("#history li")?.dataset.id;
    this.show("#running", live.filter((video) => video.status !== "queued"), newRow, updateRow);
    this.show("#waiting ol", waiting, newRow, updateRow);
    this.show("#list", [...this.finished.values()], newCard, (link, video) => this.updateCard(link, video));
    // A video that goes from one list to the next takes the focus with it.
    if (focused && !this.place.contains(document.activeElement)) {
      this.place.querySelector(`li[data-id="${focused}"] a`)?.focus({ preventScroll: true });
    }
    this.place.querySelector("#waiting").hidden = waiting.length === 0;
    this.place.querySelector("summary").textContent = `${this.uncounted ? "More than " : ""}${plural(waiting.length, "video")} waiting`;
    this.place.querySelector("#history-empty").hidden = live.length + this.finished.size > 0;
    this.place.querySelector("#more").hidden = !this.older;
  }

  // Items are kept and changed, so that focus stays where it is.
  show(selector, videos, make, update) {
    const list = this.place.querySelector(selector);
    const items = new Map([...list.children].map((item) => [item.dataset.id, item]));
    videos.forEach((video, index) => {
      let item = items.get(video.id);
      if (!item) {
        item = el("li", {}, make(video));
        item.dataset.id = video.id;
      }
      items.delete(video.id);
      item.firstChild.setAttribute("aria-current", String(video.id === this.chosen));
      update(item.firstChild, video);
      if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
    });
    for (const item of items.values()) item.remove();
  }

  updateCard(link, video) {
    const picture = link.querySelector(".picture");
    const done = video.status === "completed";
    link.querySelector(".when").textContent = done ? `${ago(video.completed_at)} · ${duration(video.timing.total)} · ${percent(video.hsa.achieved)}` : words(video);
    if (!done) picture.textContent = video.status;
    else if (!picture.dataset.asked) {
      picture.dataset.asked = "true";
      this.showThumbnail(video, picture);
    }
  }

  async showThumbnail(video, picture) {
    try {
      if (!this.thumbnails.has(video.id)) this.thumbnails.set(video.id, await api.file(video.id, "thumbnail"));
      const small = parseInt(video.size, 10) < 256 ? "small" : "";
      picture.replaceChildren(el("img", { src: this.thumbnails.get(video.id), alt: "", className: small }));
    } catch {
      delete picture.dataset.asked; // tried again at the next look
    }
  }
}

const byId = (videos) => new Map(videos.map((video) => [video.id, video]));

function newRow(video) {
  return el("a", { href: `#${video.id}` },
    el("div", { className: "prompt" }, video.prompt), el("div", { className: "when" }), el("div", { className: "bar" }, el("div")),
  );
}

function updateRow(link, video) {
  link.querySelector(".when").textContent = words(video);
  const bar = link.querySelector(".bar");
  bar.hidden = video.status === "queued";
  bar.firstChild.style.width = `${video.progress}%`;
}

function newCard(video) {
  return el("a", { href: `#${video.id}` },
    el("div", { className: "picture" }),
    el("div", { className: "words" }, el("div", { className: "prompt" }, video.prompt), el("div", { className: "when" })),
  );
}

// The chosen video: waiting, being made, or made, beside the map of where the work went.

import * as api from "./api.js";
import { ago, duration, el, isLive, percent, plural, words } from "./text.js";

const SMALL = 256; // narrower videos are enlarged without smoothing

export class Viewer {
  // `actions`: onChanged(video), onRemoved(id), onReuse(video).
  constructor(place, actions) {
    this.place = place;
    this.actions = actions;
    this.video = null;
    this.preview = null;
    this.stop = new AbortController();
    this.urls = [];
    this.blank();
  }

  blank(text = "Say what the video should show, and it appears here as it is made. Or choose one from the list.") {
    this.leave();
    this.video = null;
    delete this.place.dataset.live;
    this.place.replaceChildren(el("p", { className: "blank" }, text));
  }

  leave() {
    this.stop.abort();
    this.stop = new AbortController();
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    this.preview = null;
  }

  async show(video) {
    this.leave();
    this.video = video;
    if (isLive(video)) {
      this.renderLive();
      await this.follow(video.id, this.stop.signal);
    } else {
      await this.renderDone(this.stop.signal);
    }
  }

  async follow(id, signal) {
    try {
      await api.follow(id, signal, (video) => {
        this.video = video;
        if (video.preview) this.preview = video.preview;
        this.actions.onChanged(video);
        if (isLive(video)) this.renderLive();
        else this.renderDone(signal);
      });
    } catch (error) {
      if (error.name !== "AbortError") this.note(error.message);
    }
    // The service was restarted, or the connection was lost: the job goes on, so does the page.
    if (!signal.aborted && this.video && isLive(this.video)) {
      setTimeout(() => !signal.aborted && this.follow(id, signal), 2000);
    }
  }

  note(text) {
    const state = this.place.querySelector(".state");
    if (state) state.textContent = text;
  }

  // Built once for each video, then only changed: focus stays where it is.
  renderLive() {
    const video = this.video;
    if (this.place.dataset.live !== video.id) {
      this.place.dataset.live = video.id;
      const cells = Array.from({ length: video.num_inference_steps }, () => el("i"));
      this.live = {
        state: el("p", { className: "state" }),
        picture: el("img", { alt: "A first look at the middle of the video", hidden: true }),
        wait: el("div", { className: "placeholder" }, "the first look comes after some steps"),
        bar: el("div"),
        cells,
        cancel: el("button", { type: "button", className: "danger", onclick: () => this.cancel() }, "Cancel"),
      };
      for (const element of [this.live.wait, this.live.picture]) shape(element, video);
      const bar = el("div", { className: "bar", role: "progressbar", ariaLabel: "Progress" }, this.live.bar);
      this.live.progress = bar;
      this.place.replaceChildren(
        el("div", {}, el("p", { className: "title" }, video.prompt), this.live.state),
        bar,
        el("div", { className: "live" }, el("figure", {}, this.live.wait, this.live.picture), facts(asked(video))),
        el("div", { className: "steps", ariaHidden: "true" }, ...cells),
        el("div", { className: "actions" }, this.live.cancel),
      );
    }
    const { state, picture, wait, bar, cells, cancel, progress } = this.live;
    state.textContent = words(video);
    progress.setAttribute("aria-valuenow", video.progress);
    bar.style.width = `${video.progress}%`;
    if (this.preview) {
      picture.src = this.preview;
      picture.hidden = false;
      wait.hidden = true;
    }
    const shares = video.hsa?.steps ?? [];
    cells.forEach((cell, step) => cell.style.setProperty("--share", percent(shares[step] ?? 0)));
    cancel.disabled = video.cancel_requested;
  }

  async cancel() {
    this.live.cancel.disabled = true;
    try {
      const video = await api.cancel(this.video.id);
      this.actions.onChanged(video);
      if (video.status === "cancelled") await this.show(video); // it was still waiting
    } catch (error) {
      this.note(error.message);
    }
  }

  // Everything but the pictures is there at once, and they have their places.
  async renderDone(signal) {
    const video = this.video;
    delete this.place.dataset.live;
    const done = video.status === "completed";
    const parts = [el("div", {}, el("p", { className: "title" }, video.prompt), el("p", { className: "state" }, words(video)))];
    const panes = done ? [pane(video, true), pane(video, false)] : [];
    if (done) parts.push(...outcome(video, panes));
    else parts.push(facts(asked(video)));
    if (video.faults.length) {
      const faults = video.faults.map((f) => el("li", {}, `Recovered at step ${f.step}: ${f.message}`));
      parts.push(el("ul", { className: "faults" }, ...faults));
    }
    const actions = el("div", { className: "actions" },
      el("button", { type: "button", onclick: () => this.actions.onReuse(video) }, "Use these settings"),
      el("button", { type: "button", className: "danger", onclick: () => this.remove() }, "Delete"),
    );
    this.place.replaceChildren(...parts, actions);
    if (done) await this.play(video, panes, actions, signal);
  }

  async play(video, panes, actions, signal) {
    let urls;
    try {
      urls = await Promise.all(["video", "heatmap"].map((variant) => api.file(video.id, variant)));
    } catch (error) {
      if (!signal.aborted) this.note(error.message);
      return;
    }
    if (signal.aborted) {
      urls.forEach((url) => URL.revokeObjectURL(url));
      return;
    }
    this.urls.push(...urls);
    keepTogether(...panes);
    panes.forEach((player, index) => {
      player.src = urls[index];
      player.play().catch(() => {});
    });
    const name = `${video.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "video"}.mp4`;
    actions.prepend(el("a", { className: "button primary", href: urls[0], download: name }, "Download"));
  }

  async remove() {
    const { id } = this.video;
    try {
      await api.remove(id);
      this.blank();
      this.actions.onRemoved(id);
    } catch (error) {
      this.note(error.message);
    }
  }
}

// An element that has a video's shape before it has the video.
function shape(element, video) {
  element.style.aspectRatio = video.size.replace("x", " / ");
  element.classList.toggle("small", parseInt(video.size, 10) < SMALL);
  return element;
}

function pane(video, controls) {
  const shared = { loop: true, muted: true, playsInline: true };
  if (controls) return shape(el("video", { ...shared, controls, ariaLabel: video.prompt }), video);
  const map = el("video", { ...shared, ariaLabel: "Map of evaluations per token", tabIndex: -1 });
  map.style.aspectRatio = video.size.replace("x", " / ");
  return map;
}

// A completed video, the map of where the work went, its steps and its figures.
function outcome(video, [player, map]) {
  const { min, max } = video.hsa.evaluations;
  const low = min < max ? min : 0;
  const legend = el("div", { className: "legend" }, el("span", {}, String(low)), el("span", { className: "scale" }), el("span", {}, String(max)));
  const steps = video.hsa.steps;
  const cells = steps.map((share) => {
    const cell = el("i");
    cell.style.setProperty("--share", percent(share));
    return cell;
  });
  const share = percent(video.hsa.achieved);
  const spent = {
    Denoising: duration(video.timing.denoise),
    Decoding: duration(video.timing.decode),
    Waited: duration(video.timing.queued),
    Made: ago(video.completed_at),
  };
  return [
    el("div", { className: "panes" },
      el("figure", {}, player, el("figcaption", {}, `The video, ${duration(Number(video.seconds))}`)),
      el("figure", {}, map, el("figcaption", {}, "How often each token was evaluated", legend)),
    ),
    el("figure", {},
      el("div", { className: "steps", role: "img", ariaLabel: `${plural(steps.length, "step")}, ${share} of the dense work` }, ...cells),
      el("figcaption", {}, `${plural(steps.length, "denoising step")}, first to last, by the share of tokens evaluated`),
    ),
    facts({ ...asked(video), ...spent }),
  ];
}

function asked(video) {
  return {
    Size: video.size.replace("x", " × "),
    Frames: `${video.num_frames} at ${video.fps} per s`,
    Steps: String(video.num_inference_steps),
    ...(video.compute == null ? { Quality: `${video.quality} dB` } : { Compute: percent(video.compute) }),
    Guidance: [video.guidance_scale, video.guidance_scale_2].filter((scale) => scale != null).join(" / "),
    Seed: String(video.seed),
  };
}

function facts(entries) {
  return el("dl", {}, ...Object.entries(entries).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

// The map follows the video: play, pause, speed and place.
function keepTogether(player, map) {
  const align = () => {
    if (Math.abs(map.currentTime - player.currentTime) > 0.12) map.currentTime = player.currentTime;
  };
  player.addEventListener("play", () => map.play().catch(() => {}));
  player.addEventListener("pause", () => map.pause());
  player.addEventListener("ratechange", () => (map.playbackRate = player.playbackRate));
  player.addEventListener("seeking", align);
  player.addEventListener("timeupdate", align);
}

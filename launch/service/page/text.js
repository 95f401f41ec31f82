// Words and elements.

export function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export const percent = (share, least = 0) => `${Math.max(Math.round(share * 100), share > 0 ? least : 0)}%`;

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}

export function ago(unix) {
  const seconds = Math.max(Date.now() / 1000 - unix, 0);
  if (seconds < 60) return "just now";
  if (seconds < 5400) return `${plural(Math.round(seconds / 60), "minute")} ago`;
  return new Date(unix * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

// Text with `code` in it, as a list of nodes.
export const rich = (text) => text.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));

export const isLive = (video) => ["queued", "in_progress"].includes(video.status);

// A video's state in one line.
export function words(video) {
  if (video.status === "queued") {
    return video.queue_position ? `Waiting; ${plural(video.queue_position, "video")} before it` : "Waiting; it is the next";
  }
  if (video.status === "completed") return `Made in ${duration(video.timing.total)} with ${percent(video.hsa.achieved)} of the dense work`;
  if (video.status !== "in_progress") return sentence(video.error?.message ?? video.status);
  if (video.cancel_requested) return "Ending after this step";
  if (video.stage === "decoding") return "Turning it into frames";
  if (video.stage !== "denoising") return "Reading the prompt";
  const left = video.eta_seconds == null ? "" : `, about ${duration(video.eta_seconds)} left`;
  return `Step ${video.step} of ${video.num_inference_steps}${left}`;
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

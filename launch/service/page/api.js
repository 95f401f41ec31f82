// The HTTP API as the page uses it. Every text from the server is shown as text, never as HTML.

const KEY = "heterostep-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key.trim());
}

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("authorization", `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The service cannot be reached.");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new ApiError(answer.status, body.error?.message ?? body.reason ?? `The service answered ${answer.status}.`);
}

const json = async (path, options) => (await call(path, options)).json();
const video = (id) => `v1/videos/${encodeURIComponent(id)}`;

export const model = async () => (await json("v1/models")).data[0];

// The settings of a video by name, as the API's description has them.
export async function settings() {
  const api = await json("openapi.json");
  const { schema } = api.paths["/v1/videos"].post.requestBody.content["application/json"];
  return Object.entries(schema.properties).filter(([, property]) => property["x-setting"]);
}

export const find = (id) => json(video(id));
export const cancel = (id) => json(`${video(id)}/cancel`, { method: "POST" });
export const remove = (id) => json(video(id), { method: "DELETE" });

// A page of videos; `query`: status (a list), order, limit, after.
export function list(query) {
  const words = Object.entries(query).flatMap(([name, value]) => [value].flat().map((word) => [name, word]));
  return json(`v1/videos?${new URLSearchParams(words)}`);
}

export async function health() {
  const answer = await fetch("health").catch(() => null);
  return answer ? answer.json() : { status: "unreachable", reason: "the service cannot be reached" };
}

export function create(fields, image) {
  // A repeated click, or a repeated request of the browser, makes one video.
  const headers = { "idempotency-key": crypto.randomUUID?.() ?? String(Math.random()) };
  if (!image) {
    headers["content-type"] = "application/json";
    return json("v1/videos", { method: "POST", headers, body: JSON.stringify(fields) });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append("input_reference", image);
  return json("v1/videos", { method: "POST", headers, body: form });
}

// A media element cannot send a key, so files are fetched, and shown from memory.
export async function file(id, variant) {
  const answer = await call(`${video(id)}/content?variant=${variant}`);
  return URL.createObjectURL(await answer.blob());
}

// Server-sent events by fetch, for the same reason. Calls `onVideo` until the video is finished or `signal` aborts.
export async function follow(id, signal, onVideo) {
  const answer = await call(`${video(id)}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "));
      if (data) onVideo(JSON.parse(data.slice(6)));
    }
  }
}

// The API's description, drawn from /openapi.json: what to send, and what comes back.

import { el, rich } from "./text.js";

const api = await (await fetch("openapi.json")).json();

const resolved = (schema) => (schema?.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema) ?? {};

function kind(schema) {
  if (schema.anyOf) return schema.anyOf.map(kind).filter((name) => name !== "null").join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.type === "array") return `list of ${kind(schema.items ?? {})}`;
  return schema.format ?? schema.type ?? "any";
}

// "1 to 255", "at least 1", "above 0, at most 1"; empty without bounds.
function range({ least, most, above, below }) {
  const words = [];
  if (least !== undefined && most !== undefined) words.push(`${least} to ${most}`);
  else if (least !== undefined) words.push(`at least ${least}`);
  if (above !== undefined) words.push(`above ${above}`);
  if (most !== undefined && least === undefined) words.push(`at most ${most}`);
  if (below !== undefined) words.push(`below ${power(below)}`);
  return words.join(", ");
}

// JavaScript would show rounded digits of a large power of two.
const power = (value) => (value > 2 ** 32 && Number.isInteger(Math.log2(value)) ? `2^${Math.log2(value)}` : value);

function rules(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  const bound = (name) => parts.find((part) => part[name] !== undefined)?.[name];
  const values = range({ least: bound("minimum"), most: bound("maximum"), above: bound("exclusiveMinimum"), below: bound("exclusiveMaximum") });
  const length = range({ least: bound("minLength"), most: bound("maxLength") });
  const unit = length === "at least 1" ? "character" : "characters";
  const found = [values, length && `${length} ${unit}`].filter(Boolean);
  return found.length ? `(${found.join(", ")})` : "";
}

function table(caption, rows) {
  const line = ([name, type, text]) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, name)), el("td", {}, type), el("td", {}, ...rich(text)));
  return el("table", {}, el("caption", {}, caption), el("tbody", {}, ...rows.map(line)));
}

function fields(schema, asked = false) {
  const { properties = {}, required = [] } = resolved(schema);
  return Object.entries(properties).map(([name, field]) => [asked && required.includes(name) ? `${name} *` : name, kind(field), explained(field, field)]);
}

const explained = ({ description }, schema) => [description, rules(schema)].filter(Boolean).join(" ");

function section(path, method, operation) {
  const parts = [el("h2", {}, el("span", { className: "method" }, method.toUpperCase()), el("code", {}, path)), el("p", {}, ...rich(operation.description ?? operation.summary))];
  const parameters = (operation.parameters ?? []).map((p) => [p.name, `${kind(p.schema)}, in ${p.in}`, explained(p, p.schema)]);
  if (parameters.length) parts.push(table("Parameters", parameters));
  const body = operation.requestBody?.content;
  if (body) parts.push(table(`Body: ${Object.keys(body).join(" or ")}`, fields(body["application/json"].schema, true)));
  for (const [status, answer] of Object.entries(operation.responses)) {
    if (status.endsWith("XX")) continue;
    const [type, content] = Object.entries(answer.content ?? {})[0] ?? [];
    if (content?.schema?.$ref) parts.push(table(`${status}: ${kind(content.schema)}`, fields(content.schema)));
    else if (type) parts.push(el("p", { className: "hint" }, `${status}: ${Object.keys(answer.content).join(", ")}`));
  }
  return el("section", { className: "card" }, ...parts);
}

document.getElementById("model").textContent = `version ${api.info.version}`;
document.getElementById("operations").replaceChildren(
  el("section", { className: "card" },
    el("p", {}, `${api.info.description} Where the service has keys, every request but the last three brings one: `, el("code", {}, "Authorization: Bearer KEY"), "."),
    el("p", {}, "An error is ", el("code", {}, '{"error": {"message", "type", "param", "code"}}'), ": 400 bad input, 401 no valid key, 404 unknown, 429 full queue (with Retry-After)."),
  ),
  ...Object.entries(api.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => section(path, method, operation))),
);

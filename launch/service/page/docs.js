// The API's description, drawn from /openapi.json: what to send, and what comes back.

import { el } from "./text.js";

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

function rules(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  const rule = (name, word) => parts.filter((part) => part[name] !== undefined).map((part) => `${word} ${part[name]}`);
  const found = [
    ...rule("minimum", "at least"), ...rule("exclusiveMinimum", "above"), ...rule("maximum", "at most"),
    ...rule("exclusiveMaximum", "below"), ...rule("minLength", "characters: at least"), ...rule("maxLength", "characters: at most"),
  ];
  return found.length ? `(${found.join(", ")})` : "";
}

function table(caption, rows) {
  const line = ([name, type, text]) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, name)), el("td", {}, type), el("td", {}, text));
  return el("table", {}, el("caption", {}, caption), el("tbody", {}, ...rows.map(line)));
}

function fields(schema, asked = false) {
  const { properties = {}, required = [] } = resolved(schema);
  return Object.entries(properties).map(([name, field]) => {
    const text = [field.description, rules(field)].filter(Boolean).join(" ");
    return [asked && required.includes(name) ? `${name} *` : name, kind(field), text];
  });
}

function section(path, method, operation) {
  const parts = [el("h2", {}, el("span", { className: "method" }, method.toUpperCase()), el("code", {}, path)), el("p", {}, operation.description ?? operation.summary)];
  const parameters = (operation.parameters ?? []).map((p) => [p.name, `${kind(p.schema)}, in ${p.in}`, [p.description, rules(p.schema)].filter(Boolean).join(" ")]);
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

// The form: what the model takes, what was asked, and what the service refuses.

import * as api from "./api.js";
import { el } from "./text.js";

// Settings that are asked for together: a guidance scale that is sent alone counts for both experts.
const TOGETHER = [["width", "height"], ["guidance_scale", "guidance_scale_2"]];

export class Form {
  // `actions`: onMade(video), askForKey(error): whether it did.
  constructor(place, actions) {
    this.place = place;
    this.actions = actions;
    this.untouched = {}; // what the form held before anybody changed it, by name
    this.error = place.querySelector("#form-error");
    const { compute, prompt } = place.elements;
    place.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    // An invalid field inside closed settings could not be shown.
    place.addEventListener("invalid", (event) => event.target.closest("details")?.setAttribute("open", ""), true);
    compute.addEventListener("input", () => this.describeCompute());
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) place.requestSubmit();
    });
    this.describeCompute();
  }

  // An input for each setting that the page has none for.
  build(settings) {
    const known = new Set([...this.place.elements].map(({ name }) => name));
    const inputs = settings.filter(([name]) => !known.has(name)).map(([name, property]) => {
      const input = entry(name, property);
      const wide = !["number", "select-one"].includes(input.type);
      return el("label", { title: property.description, className: wide ? "wide" : "" }, property.title, input);
    });
    this.place.querySelector(".fields").append(...inputs);
  }

  describe(model, settings) {
    this.build(settings);
    const { elements } = this.place;
    const [wide, high] = model.size_step;
    for (const [name, step] of [["width", wide], ["height", high]]) Object.assign(elements[name], { min: step, step });
    Object.assign(elements.num_frames, { min: 1, max: model.limits.frames, step: model.frame_step });
    elements.num_inference_steps.max = model.limits.steps;
    elements.prompt.maxLength = model.limits.prompt;
    this.place.querySelector("#image-field").hidden = !model.inputs.includes("image");
    elements.guidance_scale_2.closest("label").hidden = model.defaults.guidance_scale_2 == null;
    elements.lora.closest("label").hidden = !model.loras.length;
    elements.lora.placeholder = `${model.loras.join(", ")}; NAME:STRENGTH`;
    // Any other setting that is emptied is left out, and so the model's own.
    elements.width.required = elements.height.required = true;
    this.set(model.defaults);
    this.untouched = Object.fromEntries([...elements].map(({ name, value }) => [name, value]));
  }

  // Take over the settings of a video.
  fill(video) {
    const [width, height] = video.size.split("x");
    this.set({ ...video, guidance_scale_2: video.guidance_scale_2 ?? "", width, height });
    this.place.querySelector("details").open = true;
  }

  set(values) {
    for (const element of this.place.elements) {
      const value = values[element.name];
      if (value != null) element.value = element.name === "compute" ? Math.round(value * 100) : value;
    }
    this.describeCompute();
  }

  describeCompute() {
    const { compute } = this.place.elements;
    const value = Number(compute.value);
    this.place.querySelector("#compute-text").textContent = `${value}%`;
    compute.style.setProperty("--filled", `${((value - compute.min) / (compute.max - compute.min)) * 100}%`);
    this.place.querySelector("#compute-hint").textContent =
      value === 100 ? "Every token at every step: the model's own result." : `${value}% of the dense denoising work, spent where it matters most.`;
  }

  // Only what was changed: a default that is sent counts as the user's own choice.
  fields() {
    const { elements } = this.place;
    const changed = (name) => elements[name].value !== this.untouched[name];
    const { width, height, compute, ...asked } = Object.fromEntries(
      [...elements]
        .filter(({ name, type, value }) => name && type !== "file" && (value !== "" || name === "negative_prompt"))
        .filter(({ name }) => name === "prompt" || (TOGETHER.find((names) => names.includes(name)) ?? [name]).some(changed))
        // A form without a text says nothing of it; a blank one says that there is none.
        .map((input) => [input.name, valueOf(input) === "" ? " " : valueOf(input)]),
    );
    if (width) asked.size = `${width}x${height}`;
    if (compute && asked.quality == null) asked.compute = compute / 100; // one of the two; the slider always has a value
    return asked;
  }

  async submit() {
    const button = this.place.querySelector("#create");
    this.complain("");
    button.disabled = true;
    try {
      this.actions.onMade(await api.create(this.fields(), this.place.elements.image.files[0]));
    } catch (error) {
      if (!this.actions.askForKey(error)) this.complain(error.message);
    } finally {
      button.disabled = false;
    }
  }

  complain(text) {
    this.error.textContent = text;
    this.error.hidden = !text;
  }
}

const typeOf = (property) => (property.anyOf ?? [property]).find(({ type }) => type !== "null");

// The input of a setting. A switch that is left alone is deduced, so it has three states.
function entry(name, property) {
  const { type, minimum, exclusiveMinimum, maximum } = typeOf(property);
  const choices = type === "boolean" ? ["true", "false"] : typeOf(property).enum;
  if (choices) return el("select", { name }, ...["", ...choices].map((value) => el("option", { value }, value || "chosen for you")));
  if (["string", "array"].includes(type)) return el("input", { name, type: "text" });
  const step = type === "integer" ? 1 : "any";
  return el("input", { name, type: "number", min: minimum ?? exclusiveMinimum ?? "", max: maximum ?? "", step, placeholder: "chosen for you" });
}

function valueOf({ type, value }) {
  if (["number", "range"].includes(type)) return Number(value);
  return type === "select-one" && ["true", "false"].includes(value) ? value === "true" : value;
}

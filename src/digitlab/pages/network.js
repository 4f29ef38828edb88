// ---- the form of a network, and its drawing ------------------------------------------------------

const lesson = new Map();  // runs of this server by number: {number, name, state, steps, moments, epochs}
const isPlay = () => document.body.dataset.view === "play";
const SEARCHED = ["model.widths", "model.hidden", "model.batch_norm", "model.dropout", "optim.learning_rate", "trainer.epochs"];
const wordsOf = (key) => key === "optim.name" ? "optimizer" : key.split(".").at(-1).replaceAll("_", " ").replace(/s$/, key.startsWith("model.") ? "" : "s");
const UNITS = { shift: "pixels", rotate: "degrees", scale: "0.1 is 10 %", shear: "degrees", erase: "pixels", stroke: "pixels" };
const isOfImages = (key) => key.startsWith("data.augment."), isOfModel = (key) => key.startsWith("model.");
const FIELD_GROUPS = { model: isOfModel, augment: isOfImages, training: (key) => !isOfModel(key) && !isOfImages(key) };
let isValid = false, isBusy = false;  // what the form says can be trained; something trains
let form = null, values = {}, isFixed = false, checked = 0;

function make(tag, content = {}, ...children) {
  const element = Object.assign(document.createElement(tag), content);
  element.append(...children);
  return element;
}

async function send(path, content) {
  const options = { method: "POST", body: JSON.stringify(content), headers: { "Content-Type": "application/json" } };
  const response = await fetch(path, options).catch(() => null);
  const reply = await response?.json().catch(() => null);
  return response?.ok ? reply : { problem: reply?.detail ?? GONE };
}

function complain(text) { setText("problem", text ?? ""); $("problem").hidden = !text; }
const asked = (more = {}) => ({ values: isFixed ? withoutModel() : values, is_fixed: isFixed, ...more });
const withoutModel = () => Object.fromEntries(Object.entries(values).filter(([key]) => !key.startsWith("model.")));

function control(field, value, change) {
  const unit = isOfImages(field.key) ? UNITS[field.key.split(".").at(-1)] : "";
  const label = wordsOf(field.key) + (unit ? ` (${unit})` : ""), about = `${field.about} It must be ${field.rule}.`;
  const input = field.kind === "enum" ? make("select", {}, ...field.options.map((name) => new Option(name, name)))
    : make("input", { type: field.kind === "boolean" ? "checkbox" : "number", step: field.kind === "integer" ? 1 : "any" });
  for (const limit of ["min", "max"]) if (limit in field && input.type === "number") input[limit] = field[limit];
  if (input.type === "checkbox") input.checked = value;
  else input.value = value;
  input.dataset.key = field.key;
  input.addEventListener("input", () => {
    if (input.type === "number" && input.value === "") return;
    change(input.type === "checkbox" ? input.checked : input.type === "number" ? Number(input.value) : input.value);
    if (field.key.startsWith("model.")) isFixed = false;
    check();
  });
  return make("label", { title: about }, label, input);
}

function showForm() {
  const [layers, others] = [form.fields.slice(0, 4), form.fields.slice(4)];
  $("convolutions").replaceChildren(...values["model.widths"].map((_, i) => make("fieldset", {},
    make("legend", {}, `convolution ${i + 1}`),
    ...layers.map((field) => control(field, values[field.key][i], (value) => { values[field.key][i] = value; })),
    make("button", { disabled: values["model.widths"].length === 1, ariaLabel: `Remove convolution ${i + 1}`, onclick: () => changeLayers((list) => list.splice(i, 1)) }, "Remove"))));
  for (const [group, isIn] of Object.entries(FIELD_GROUPS)) $(`fields-${group}`).replaceChildren(...others.filter(({ key }) => isIn(key)).map((field) => control(field, values[field.key], (value) => { values[field.key] = value; })));
  check();
}

function changeLayers(change) {
  for (const field of form.fields.slice(0, 4)) change(values[field.key]);
  isFixed = false;
  showForm();
}

function setValues(given, fixed) {
  values = structuredClone({ ...form.values, ...given });
  isFixed = fixed;
  showForm();
}

async function check() {
  const number = ++checked, found = await send("/check", asked());
  if (number !== checked) return;  // another change came meanwhile
  complain(found.problem);
  isValid = !found.problem;
  enableTraining(isBusy);
  $("fixed").disabled = isFixed || !form.is_fixed;
  if (found.problem) return;
  $("drawn").replaceChildren(...found.layers.map(({ kind, shape, parameters }) => {
    const [channels, side] = shape.split("x").map(Number), block = make("div", { className: "block" });
    block.style.width = `${6 + 5 * Math.log2(1 + channels / (side ? 1 : 8))}px`;
    block.style.height = `${side ? 8 + 2 * side : 64}px`;
    return make("li", {}, block, make("span", {}, kind), make("span", {}, shape.replaceAll("x", " × ")), make("span", {}, parameters ? `${parameters.toLocaleString("en")} p.` : ""));
  }));
  setText("size", `${found.parameters.toLocaleString("en")} parameters`);
  setText("command", found.command);
}

$("add").addEventListener("click", () => changeLayers((list) => list.push(list.at(-1))));
$("fixed").addEventListener("click", () => setValues(withoutModel(), true));

async function startTraining() {
  const reply = await send("/train", asked());
  complain(reply.problem);
  if (!reply.problem) watched = reply.run;
}

$("train").addEventListener("click", startTraining);
$("stop").addEventListener("click", () => send("/control", { action: "stop" }));
$("pause").addEventListener("click", () => send("/control", { action: $("pause").textContent === "Pause" ? "pause" : "continue" }));

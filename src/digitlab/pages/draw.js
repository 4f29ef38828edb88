"use strict";
const $ = (id) => document.getElementById(id);
const paper = $("paper"), ink = paper.getContext("2d"), SIDE = paper.width;
const GONE = "The server does not answer: start it again.";
const MOST = 8 * 2 ** 20;  // bytes that the server takes
const READ = /^image\/(png|jpeg|webp|bmp|tiff|gif)$/;  // by the server
const actions = [];  // strokes {width, points} and images {file, bitmap}, the oldest first
let stroke = null;  // the one that is being drawn, of a pointer or of the keys
let pointer = null;  // its id
let announce = false;  // whether the next answer is read aloud: not at each pixel of a stroke

// ---- the drawing --------------------------------------------------------------------------------

function repaint() {
  ink.fillStyle = "#fff";
  ink.fillRect(0, 0, SIDE, SIDE);
  ink.strokeStyle = "#000";
  ink.lineCap = ink.lineJoin = "round";
  for (const action of actions) {
    if (action.bitmap) {
      const { width, height } = action.bitmap, scale = Math.min(SIDE / width, SIDE / height);
      ink.fillRect(0, 0, SIDE, SIDE);
      ink.drawImage(action.bitmap, (SIDE - width * scale) / 2, (SIDE - height * scale) / 2, width * scale, height * scale);
    } else if (action.points) {
      const [[x, y], ...rest] = action.points;
      ink.lineWidth = action.width;
      ink.beginPath();
      ink.moveTo(x, y);
      ink.lineTo(x + 0.01, y);  // a dot where there is one point
      for (const [nextX, nextY] of rest) ink.lineTo(nextX, nextY);
      ink.stroke();
    }
  }
}

function enable() { $("undo").disabled = $("clear").disabled = actions.length === 0; }

function changed() {
  enable();
  repaint();
  if (actions.length === 0) { fail(""); show(null); }
  ask();
}

function begin(point) {
  stroke = { width: Number($("width").value), points: [point] };
  actions.push(stroke);
  $("answer").setAttribute("aria-live", "off");
  changed();
}

function extend(points) {
  stroke.points.push(...points);
  changed();
}

function lift() {
  if (stroke) { $("answer").setAttribute("aria-live", "polite"); announce = true; ask(); }
  stroke = pointer = null;
  $("pen").classList.remove("down");
}

function undo() { lift(); actions.pop(); changed(); }
function clear() { lift(); actions.length = 0; changed(); }

function place(event) {
  const box = paper.getBoundingClientRect();
  return [(event.clientX - box.left) * SIDE / box.width, (event.clientY - box.top) * SIDE / box.height];
}

paper.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || pointer !== null) return;
  lift();
  pointer = event.pointerId;
  paper.setPointerCapture(pointer);
  $("pen").hidden = true;
  begin(place(event));
});
paper.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer || !stroke) return;
  const passed = event.getCoalescedEvents?.() ?? [];
  extend((passed.length ? passed : [event]).map(place));
});
for (const end of ["pointerup", "pointercancel"]) {
  paper.addEventListener(end, (event) => { if (event.pointerId === pointer) lift(); });
}

// ---- keys ---------------------------------------------------------------------------------------

const pen = [SIDE / 2, SIDE / 4];
const held = new Set();
const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function showPen() {
  const size = `${Number($("width").value) * paper.clientWidth / SIDE}px`;
  const [left, top] = pen.map((x) => `${x * 100 / SIDE}%`);
  Object.assign($("pen").style, { left, top, width: size, height: size });
  $("pen").hidden = false;
}

paper.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && !event.repeat && pointer === null) {
    if (stroke) lift();
    else { begin([...pen]); $("pen").classList.add("down"); }
  } else if (event.key === "Escape") lift();
  else if (WAYS[event.key] && pointer === null) {
    held.add(event.key);  // two arrows at once go aslant
    for (const key of held) {
      for (const axis of [0, 1]) {
        const next = pen[axis] + WAYS[key][axis] * (event.shiftKey ? 2 : 8);
        pen[axis] = Math.min(SIDE, Math.max(0, next));
      }
    }
    if (stroke) extend([[...pen]]);
  } else if (event.key !== " ") return;
  event.preventDefault();
  showPen();
});
paper.addEventListener("keyup", (event) => held.delete(event.key));
paper.addEventListener("focus", () => { if (paper.matches(":focus-visible")) showPen(); });
paper.addEventListener("blur", () => { held.clear(); if (pointer === null) lift(); $("pen").hidden = true; });
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z") undo();
  else if (["Delete", "Backspace"].includes(event.key) && !event.target.closest("input[type=number], select")) clear();
  else return;
  event.preventDefault();
});
$("undo").addEventListener("click", undo);
$("clear").addEventListener("click", clear);

// ---- images of the person's own -----------------------------------------------------------------

async function take(file) {
  let bitmap = null;
  try { bitmap = await createImageBitmap(file); } catch { /* the server may know the format */ }
  if (!bitmap && file.size > MOST) return fail(`${file.name}: more than ${MOST / 2 ** 20} MB`);
  lift();
  actions.push({ file, bitmap });
  changed();
}

$("file").addEventListener("change", () => {
  if ($("file").files.length) take($("file").files[0]);
  $("file").value = "";  // so that the same one can be chosen again
});
document.addEventListener("dragover", (event) => { event.preventDefault(); $("sheet").classList.add("over"); });
document.addEventListener("dragleave", () => $("sheet").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("sheet").classList.remove("over");
  if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  else fail("What was dropped is no file: save the image first.");
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files[0]);
  else fail("There is no image in the clipboard.");
});

function picture() {
  const last = actions.at(-1);
  const isKnown = !last.bitmap || READ.test(last.file.type);  // else the browser's pixels are sent
  if (last.file && last.file.size <= MOST && isKnown) return last.file;
  let from = paper;
  if (last.file) {  // too large to be sent as it is, or of a kind that the server does not read
    const scale = Math.min(1, 1024 / Math.max(last.bitmap.width, last.bitmap.height));
    from = document.createElement("canvas");
    [from.width, from.height] = [last.bitmap.width, last.bitmap.height].map((side) => Math.max(1, side * scale));
    from.getContext("2d").drawImage(last.bitmap, 0, 0, from.width, from.height);
  }
  return new Promise((done) => from.toBlob(done, "image/png"));
}

// ---- the answer ---------------------------------------------------------------------------------

let busy = false, again = false, retry = 0, alike = 0, turn = 0;

async function ask() {  // one request at a time; the newest drawing is always asked about
  if (busy) { again = true; return; }
  clearTimeout(retry);
  busy = true;
  try {
    do {
      again = false;
      if (actions.length && chosenRun()) await askOnce();
    } while (again);
  } finally {
    busy = false;
  }
}

async function askOnce() {
  const last = actions.at(-1), slow = setTimeout(() => setText("sure", "one moment …"), 700);
  const body = await picture();
  const type = body.type.startsWith("image/") ? body.type : "application/octet-stream";
  const options = { method: "POST", body, headers: { "Content-Type": type }, signal: AbortSignal.timeout(20000) };
  const run = encodeURIComponent(chosenRun()), mine = ++turn;
  clearTimeout(alike);
  const response = await fetch(`/explain?run=${run}`, options).catch(() => null);
  const reply = await response?.json().catch(() => null);
  clearTimeout(slow);
  if (!actions.length) return setText("sure", "");  // cleared meanwhile
  fail(reply ? reply.detail ?? "" : GONE);
  if (response?.ok && reply) {
    alike = setTimeout(askAlike, 500, mine, run, body, options.headers);
    return show(reply);
  }
  show(null);
  const wait = response?.headers.get("Retry-After");
  if (wait || !reply) retry = setTimeout(ask, 1000 * Number(wait ?? 2));
  else if (response?.status !== 503 && last.file && actions.at(-1) === last) {  // not an image: as if it had not been given
    actions.pop();
    enable();
  }
}

function setText(id, text) { if ($(id).textContent !== text) $(id).textContent = text; }
function fail(text) { setText("error", text); $("error").hidden = !text; }
const percent = (share) => share > 0.9995 && share < 1 ? "> 99.9 %" : `${(100 * share).toFixed(share % 1 < 0.0005 ? 0 : 1)} %`;

const bars = Array.from({ length: 10 }, (_, digit) => {
  const bar = document.createElement("div"), [name, progress, number] = ["span", "progress", "span"].map((tag) => document.createElement(tag));
  bar.className = "bar";
  name.textContent = digit;
  progress.max = 1;
  progress.value = 0;
  progress.setAttribute("aria-label", `Probability of ${digit}`);
  bar.append(name, progress, number);
  $("bars").append(bar);
  return { bar, name, progress, number };
});

function show(answer) {  // null: nothing is drawn, or not known
  const digit = answer?.status === "digit";
  $("answer").className = answer?.status ?? "";
  setText("answer", !answer ? "Draw a digit, or drop an image." : digit ? answer.label : answer.message);
  if (announce) { announce = false; $("answer").replaceChildren(new Text($("answer").textContent)); }
  const isOdd = answer?.status === "unsure" && answer.probability > 0.9;
  setText("sure", !answer?.probability ? "" : isOdd ? "unlike the digits that the network learned from" : `probability ${percent(answer.probability)}`);
  bars.forEach(({ bar, name, progress, number }, i) => {
    name.textContent = answer?.labels[i] ?? i;
    const share = answer?.probabilities[i];
    progress.value = share ?? 0;
    number.textContent = share === undefined ? "" : percent(share);
    bar.classList.toggle("best", answer?.digit === i);
  });
  const blank = Array(28).fill(Array(28).fill(0));
  paint($("seen"), answer?.seen ?? blank, (v) => [v, v, v, 255]);
  const reasons = answer?.attribution.length ? answer.attribution : blank;
  const reach = Math.max(1e-9, ...reasons.flat().map(Math.abs));
  const [speaks, against] = [colour("--for"), colour("--against")];
  paint($("reasons"), reasons, (v) => [...(v > 0 ? speaks : against), 255 * Math.abs(v) / reach]);
  setText("why", answer?.attribution.length ? `blue: evidence for ${answer.labels[answer.speaks_for]}, red: for ${answer.labels[answer.rather_than]}` : "which pixels led to the answer");
  showLayers(answer?.layers ?? []);
  if (!answer) showAlike({ nearest: [], fooling: null });
}

async function askAlike(mine, run, body, headers) {  // when the pen rests: it takes longer than an answer
  const options = { method: "POST", body, headers, signal: AbortSignal.timeout(20000) };
  const response = await fetch(`/likeness?run=${run}`, options).catch(() => null);
  const found = response?.ok ? await response.json().catch(() => null) : null;
  if (found && actions.length && mine === turn) showAlike(found);
}

function showAlike({ nearest, fooling }) {
  const blank = Array(28).fill(Array(28).fill(0));
  paint($("fooling"), fooling?.image ?? blank, (v) => [v, v, v, 255]);
  setText("fooled", fooling ? `changed a little, it is read as ${fooling.label}: no pixel by more than ${percent(fooling.largest_change)}` : "how little would fool it");
  $("alike").hidden = nearest.length === 0;
  $("nearest").replaceChildren(...nearest.map(({ label, image }) => {
    const [figure, canvas, caption] = ["figure", "canvas", "figcaption"].map((tag) => document.createElement(tag));
    canvas.width = canvas.height = 28;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `A training image of a ${label}`);
    paint(canvas, image, (v) => [v, v, v, 255]);
    caption.textContent = `a ${label}`;
    figure.append(canvas, caption);
    return figure;
  }));
}

function showLayers(layers, box = $("layers")) {
  const heads = layers.map((layer) => layer.name + (layer.count > layer.maps.length ? `: the ${layer.maps.length} that vary most` : ""));
  if (box.dataset.heads !== heads.join()) {  // another network
    box.dataset.heads = heads.join();
    box.replaceChildren(...layers.flatMap((layer, i) => {
      const [head, row] = ["h2", "div"].map((tag) => document.createElement(tag));
      head.textContent = heads[i];
      row.className = "maps";
      row.append(...layer.maps.map((map, j) => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [map[0].length, map.length];
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `${layer.name}, map ${j + 1}`);
        return canvas;
      }));
      return [head, row];
    }));
  }
  box.hidden = layers.length === 0;
  const shade = colour("--shade"), canvases = box.querySelectorAll("canvas");
  layers.flatMap((layer) => layer.maps).forEach((map, i) => paint(canvases[i], map, (v) => [...shade, v]));
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).split(",").map(Number);
}

function paint(canvas, rows, colours) {
  const picture = new ImageData(new Uint8ClampedArray(rows.flat().flatMap(colours)), rows[0].length, rows.length);
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

const GROUPS = { champion: "champions", train: "single runs", trial: "trials", live: "learning now" };

async function listRuns() {
  const runs = await (await fetch("/runs")).json(), chosen = $("run").value, groups = new Map();
  const live = [...lesson.values()].map((run) => ({ run_id: `live:${run.number}`, kind: "live", name: run.name }));
  for (const run of [...runs, ...live]) {
    const group = GROUPS[run.kind] ?? `${run.kind} runs`, share = run.accuracy == null ? "" : `, ${percent(run.accuracy)}`;
    if (!groups.has(group)) groups.set(group, Object.assign(document.createElement("optgroup"), { label: group }));
    groups.get(group).append(new Option(run.name + share + (run.started ? `, ${run.started}` : ""), run.run_id));
  }
  $("run").replaceChildren(...groups.values());
  if ([...$("run").options].some((option) => option.value === chosen)) $("run").value = chosen;
  return runs.length;
}

function chosenRun() {  // a recorded run, or the moment of one that is watched
  const run = lesson.get(Number($("run").value.split(":")[1]));
  return !run ? $("run").value : run.moments.length ? `live:${run.number}:${momentOf(run).step}` : "";
}

async function start() {
  try {
    const count = await listRuns();
    fail(count || isPlay() ? "" : "No run has weights yet: make one with `make train`.");
    ask();
  } catch {
    fail(GONE);
    setTimeout(start, 2000);
  }
}

$("run").addEventListener("change", ask);
$("width").addEventListener("input", () => { if (!$("pen").hidden) showPen(); });
repaint();

// ---- what a run learns, moment by moment ----------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg", WIDE = 640, HIGH = 300, EDGE = 44;
const STATES = { waiting: "starts", training: "is in training", paused: "is paused", finished: "is finished", failed: "has failed", interrupted: "was stopped" };
let watched = null;  // number of the run that the slider is of
let isNewest = true;  // whether the slider follows the run
let picked = null;  // of the chosen validation digit

function momentOf(run) {  // where the slider stands, or the last one before that step
  const shown = lesson.get(watched), step = shown?.moments[Number($("moment").value)]?.step ?? Infinity;
  return run.moments.findLast((moment) => moment.step <= step) ?? run.moments[0];
}

function receive(event) {
  if (event.kind === "session") { lesson.clear(); watched = null; enableTraining(false); return; }
  if (event.kind === "free") { enableTraining(false); showLadder(); listRuns(); return; }
  if (event.kind === "search") { setText("searched", `${event.name}: ${event.text}`); if (event.state === "running") enableTraining(true); showLadder(); return; }
  if (!lesson.has(event.run)) lesson.set(event.run, { number: event.run, moments: [], epochs: [] });
  const run = lesson.get(event.run);
  if (event.kind === "progress") $("progress").value = event.fraction;
  else if (event.kind === "run") receiveState(run, event);
  else if (event.kind === "epoch") {
    run.epochs.push(event);
    const { val_accuracy: accuracy, train_accuracy: training } = event.metrics;
    setText("state", `Epoch ${event.epoch} of ${run.of}: validation accuracy ${percent(accuracy ?? training)}.`);
  } else {
    run.moments.push(event);
    if (event.run === watched) showMoments();
    if ($("run").value === `live:${event.run}` && isNewest) ask();
  }
  if (event.kind !== "progress") drawCurve();
}

function receiveState(run, event) {
  Object.assign(run, { name: event.name, state: event.state, steps: event.steps ?? run.steps, of: event.epochs ?? run.of });
  const isOver = ["finished", "failed", "interrupted"].includes(event.state);
  enableTraining(!isOver);
  setText("pause", event.state === "paused" ? "Go on" : "Pause");
  setText("state", `${event.name} ${STATES[event.state]}${event.text ? `: ${event.text}` : ""}.`);
  if (event.state === "waiting") {
    [watched, isNewest, $("progress").value] = [run.number, true, 0];
    listRuns().then(() => { $("run").value = `live:${run.number}`; ask(); });
  }
  const options = [...lesson.values()].map(({ number, name }) => new Option(name, number)).reverse();
  const beside = $("beside").value;
  $("shown").replaceChildren(...options);
  $("shown").value = watched;
  $("beside").replaceChildren(new Option("none", ""), ...options.map((option) => option.cloneNode(true)));
  $("beside").value = beside;
}

function enableTraining(busy) {
  isBusy = busy;
  $("pause").disabled = $("stop").disabled = !busy;
  $("train").disabled = $("search").disabled = busy || !isValid;
}

// ---- curves: the first steps take as much room as all the later ones ------------------------------

function drawCurve() {
  const runs = [watched, Number($("beside").value)].map((number) => lesson.get(number)).filter((run) => run?.moments.length);
  const most = Math.max(10, ...runs.map((run) => run.steps ?? 0)), reach = Math.log1p(most / 10);
  const highest = Math.max(2.5, ...runs.flatMap((run) => run.moments.map((moment) => moment.loss)).filter(Number.isFinite));
  const x = (step) => EDGE + (WIDE - 2 * EDGE) * Math.log1p(step / 10) / reach;
  const y = (share) => HIGH - 30 - (HIGH - 50) * Math.max(0, Math.min(1, share));
  const parts = [];
  const add = (tag, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parts.push(element);
  };
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    add("line", { class: "grid", x1: EDGE, x2: WIDE - EDGE, y1: y(share), y2: y(share) });
    add("text", { x: EDGE - 6, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`);
    add("text", { x: WIDE - EDGE + 6, y: y(share) + 4 }, (share * highest).toFixed(1));
  }
  for (const step of [0, 10, 100, 1000, 10000].filter((each) => each < most * 0.8)) add("text", { x: x(step), y: HIGH - 8, "text-anchor": "middle" }, step.toLocaleString("en"));
  add("text", { x: x(most), y: HIGH - 8, "text-anchor": "middle" }, `step ${most.toLocaleString("en")}`);
  runs.forEach((run, i) => {
    const of = `run${i}`, sure = run.moments.filter((moment) => Number.isFinite(moment.loss));
    const line = (points) => points.map((point) => point.join()).join(" ");
    add("polyline", { class: of, points: line(run.moments.map((m) => [x(m.step), y(m.accuracy)])) });
    add("polyline", { class: `${of} loss`, points: line(sure.map((m) => [x(m.step), y(m.loss / highest)])) });
    for (const m of run.moments) add("circle", { class: of, cx: x(m.step), cy: y(m.accuracy), r: 3 });
    for (const m of sure) add("rect", { class: of, x: x(m.step) - 2.5, y: y(m.loss / highest) - 2.5, width: 5, height: 5 });
    for (const e of run.epochs.filter((epoch) => epoch.metrics.val_accuracy)) add("text", { class: of, x: x(e.step), y: y(e.metrics.val_accuracy) + 5, "text-anchor": "middle" }, "◆");
    const last = run.moments.at(-1);
    add("text", { class: of, x: EDGE + 8, y: 16 + 16 * i }, `${run.name}: ${percent(last.accuracy)} of ${last.images.toLocaleString("en")} images`);
  });
  const now = runs.length ? momentOf(runs[0]) : null;
  if (now) add("line", { class: "now", x1: x(now.step), x2: x(now.step), y1: y(0), y2: y(1) });
  $("curve").replaceChildren(...parts);
  $("curve").setAttribute("aria-label", runs.map((run) => `${run.name}: accuracy ${percent(run.moments.at(-1).accuracy)} of ${run.moments.at(-1).images.toLocaleString("en")} images, loss ${run.moments.at(-1).loss} at step ${run.moments.at(-1).step}`).join("; ") || "No run yet");
}

// ---- the network at a moment ----------------------------------------------------------------------

function showMoments() {
  const run = lesson.get(watched), slider = $("moment");
  if (!run?.moments.length) return;
  slider.disabled = false;
  slider.max = run.moments.length - 1;
  if (isNewest) slider.value = slider.max;
  const moment = momentOf(run), text = `step ${moment.step} of ${run.steps}: ${percent(moment.accuracy)} of ${moment.images.toLocaleString("en")} validation images read right`;
  setText("when", text);
  slider.setAttribute("aria-valuetext", text);
  drawCurve();
  look();
}

let isLooking = false, lookAgain = false;

async function look() {  // one request at a time, as for the drawing
  if (isLooking) { lookAgain = true; return; }
  isLooking = true;
  do {
    lookAgain = false;
    const runs = [...new Set([watched, Number($("beside").value)])].map((number) => lesson.get(number)).filter((run) => run?.moments.length);
    const found = await Promise.all(runs.map(async (run) => {
      const address = `/look?run=${run.number}&step=${momentOf(run).step}${picked === null ? "" : `&place=${picked}`}`;
      const response = await fetch(address).catch(() => null);
      return response?.ok ? [run, await response.json()] : null;
    }));
    showLooks(found.filter(Boolean));
  } while (lookAgain);
  isLooking = false;
}

function showLooks(found) {
  while ($("looks").children.length > found.length) $("looks").lastChild.remove();
  found.forEach(([run, seen], i) => {
    const box = $("looks").children[i] ?? $("looks").appendChild(make("div", {},
      make("h3"), make("div", { className: "filters" }), make("p", { className: "quiet" }, "The ten digits that it learns last; choose one to see what the layers make of it:"),
      make("div", { className: "last" }), make("div", { className: "made" })));
    box.children[0].textContent = `${run.name}: filters of the first layer`;
    fill(box.children[1], seen.filters.length, () => make("canvas", { ariaHidden: "true" }));
    seen.filters.forEach((rows, j) => paintAt(box.children[1].children[j], rows, (v) => [v, v, v, 255]));
    fill(box.children[3], seen.last.length, () => make("button", {}, make("canvas"), make("span")));
    seen.last.forEach((digit, j) => {
      const button = box.children[3].children[j], best = digit.probabilities.indexOf(Math.max(...digit.probabilities));
      paintAt(button.firstChild, digit.image, (v) => [255 - v, 255 - v, 255 - v, 255]);
      button.lastChild.textContent = best === digit.label ? `${seen.labels[best]} ✓ ${percent(digit.probabilities[best])}` : `is ${seen.labels[digit.label]}, read as ${seen.labels[best]} (${seen.labels[digit.label]}: ${percent(digit.probabilities[digit.label])})`;
      button.setAttribute("aria-pressed", digit.place === seen.chosen.place);
      button.onclick = () => { picked = digit.place; look(); };
    });
    showLayers(seen.layers, box.children[4]);
  });
}

function fill(box, count, create) {
  while (box.children.length > count) box.lastChild.remove();
  while (box.children.length < count) box.append(create());
}

function paintAt(canvas, rows, colours) {
  if (canvas.width !== rows[0].length || canvas.height !== rows.length) [canvas.width, canvas.height] = [rows[0].length, rows.length];
  paint(canvas, rows, colours);
}

$("moment").addEventListener("input", () => {
  isNewest = $("moment").value === $("moment").max;
  showMoments();
  if ($("run").value.startsWith("live:")) ask();
});
$("shown").addEventListener("change", () => { [watched, isNewest] = [Number($("shown").value), true]; showMoments(); });
$("beside").addEventListener("change", showMoments);

// ---- the ladder, the search, and what the page shows ----------------------------------------------

let isListing = false, listAgain = false;

async function showLadder() {
  if (!isPlay()) return;
  if (isListing) { listAgain = true; return; }
  isListing = true;
  do {
    listAgain = false;
    const rows = await fetch("/ladder").then((response) => response.json()).catch(() => []);
    $("ladder").replaceChildren(...rows.map((row) => {
      const use = () => { setValues(row.values, row.is_fixed); $("train").focus(); };
      const isOf = row.is_fixed || "model.widths" in row.values;  // a network that the form can show
      const title = isOf ? "Bring its settings back" : "Its network is none of this form's";
      const said = [row.changed, row.difference].filter(Boolean).join(": ");
      return make("tr", {},
        make("td", {}, make("button", { onclick: use, title, disabled: !isOf }, row.name)),
        make("td", {}, `${(100 * row.accuracy).toFixed(2)} %`), make("td", {}, said),
        make("td", {}, row.parameters.toLocaleString("en")), make("td", {}, row.seconds.toFixed(1)),
        make("td", {}, make("a", { href: `/save?run=${row.run_id}`, download: "" }, "one HTML file")));
    }));
  } while (listAgain);
  isListing = false;
}

$("search").addEventListener("click", async () => {
  const ticked = [...$("ticks").querySelectorAll("input:checked")].map((tick) => tick.value);
  const reply = await send("/search", asked({ ticked, minutes: Number($("minutes").value) }));
  if (reply.problem) setText("searched", reply.problem);
});

let events = null;

async function showView(view) {
  document.body.dataset.view = view;
  for (const id of ["lead", "lesson", "runs"]) $(id).hidden = !isPlay();
  setText("title", isPlay() ? "See it learn" : "Draw a digit");
  setText("switch", isPlay() ? "Draw only" : "Change a network, and watch it learn");
  if (isPlay() && !form) {
    form = await fetch("/form").then((response) => response.json());
    $("ticks").replaceChildren(...SEARCHED.map((key) => make("label", {}, make("input", { type: "checkbox", value: key, checked: key === "optim.learning_rate" }), wordsOf(key))));
    setValues({}, form.is_fixed);
    events = new EventSource("/events");
    events.onmessage = (message) => receive(JSON.parse(message.data));
    events.onerror = () => setText("state", GONE);
    showLadder();
  }
}

$("switch").addEventListener("click", () => showView(isPlay() ? "draw" : "play"));
showView(document.body.dataset.view);
start();

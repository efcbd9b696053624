// Recall or error of each layer and head at a step: a map of coloured cells, and a line of words for one of them.

function startHeads(runs) {
  const WORDS = { recall: "Recall", mse: "Output MSE" };
  const SMALLEST = 38; // pixels of a cell that shows its number
  let run = runs[0];
  let what = "recall";
  let step = 0;
  let cell = [0, 0];
  const [map, text] = ["heads-map", "heads-text"].map(byId);

  const levels = () => run[what][step] || [];
  const heads = () => Math.max(1, ...levels().map((layer) => layer.length));

  function range() {
    const known = run[what].flat(2).filter((value) => value !== null);
    return known.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  }

  function chooseRun(number) {
    run = runs[number];
    const kinds = ["recall", "mse"].filter((kind) => run[kind]);
    what = kinds[0];
    step = 0;
    fillSelect("heads-what", kinds.map((kind) => WORDS[kind]), (chosen) => {
      what = kinds[chosen];
      draw();
    });
    fillSelect("heads-step", run.steps.map((number) => `step ${number}`), (chosen) => {
      step = chosen;
      draw();
    });
    draw();
  }

  function draw() {
    const [low, high] = range();
    map.style.maxWidth = `${3.6 + 5 * heads()}rem`;
    const size = (map.clientWidth - 60) / heads();
    map.style.gridTemplateColumns = `3.6rem repeat(${heads()}, minmax(0, 1fr))`;
    map.style.setProperty("--cell", `${Math.min(Math.max(size, 10), 36)}px`);
    const every = Math.max(1, Math.ceil(22 / size));
    const top = Array.from({ length: heads() }, (_, head) => title(head % every ? "" : `${head}`, "head"));
    const rows = levels().flatMap((layer, row) => [
      title(row % every ? "" : `${row}`, "layer"),
      ...Array.from({ length: heads() }, (_, head) => filled(layer[head] ?? null, row, head, low, high, size)),
    ]);
    map.replaceChildren(title("head", "head all"), title("layer", "layer"), ...top, ...rows);
    scaleOf(low, high);
    choose(within(cell[0], levels().length), within(cell[1], heads()));
  }

  function title(words, kind) {
    return make("span", { class: `name ${kind}` }, [words]);
  }

  function filled(value, row, head, low, high, size) {
    const found = make("span", { "data-row": row, "data-head": head });
    if (value === null) return found;
    const colour = along(VIRIDIS, high > low ? (value - low) / (high - low) : 1);
    found.style.background = css(colour);
    found.style.color = readable(colour);
    const short = what === "recall" ? value.toFixed(2) : value.toExponential(0);
    if (size >= SMALLEST) found.textContent = short;
    return found;
  }

  function scaleOf(low, high) {
    const bar = make("i");
    bar.style.background = `linear-gradient(to right, ${VIRIDIS.map(css).join(", ")})`;
    byId("heads-scale").replaceChildren(`${WORDS[what]}, all steps: ${figures(low)}`, bar, figures(high));
  }

  function choose(row, head) {
    cell = [row, head];
    map.querySelector(".at")?.classList.remove("at");
    map.querySelector(`[data-row="${row}"][data-head="${head}"]`)?.classList.add("at");
    const value = levels()[row]?.[head];
    text.textContent = `Layer ${row}, head ${head}, step ${run.steps[step]}: ${WORDS[what].toLowerCase()} ${figures(value)}.`;
  }

  function pointed(event) {
    const place = event.target.closest("[data-row]");
    if (place) choose(Number(place.dataset.row), Number(place.dataset.head));
  }

  map.addEventListener("pointermove", pointed);
  map.addEventListener("pointerdown", pointed);
  arrows(map, () => [levels().length, heads()], () => cell, choose);
  fillSelect("heads-run", runs.map((entry) => entry.label), chooseRun);
  let width = 0;
  new ResizeObserver(() => {
    if (map.clientWidth !== width) draw();
    width = map.clientWidth;
  }).observe(map);
  chooseRun(0);
}

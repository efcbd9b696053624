// The picture of a mask: one pixel a block, frame borders above it, and a line of words for a pair of frames.

function startMask(masks) {
  let mask = masks[0];
  let pair = [0, 0];
  const [picture, map, lines, text] = ["mask-picture", "mask-map", "mask-lines", "mask-text"].map(byId);

  const frames = () => mask.shares.length; // text is one more
  const edge = (frame) => {
    const [count, height, width, words] = mask.grid;
    const token = frame > count ? count * height * width + words : frame * height * width;
    return token / (mask.block_size * mask.count);
  };
  const name = (frame) => (frame < mask.grid[0] ? `frame ${frame}` : "text");

  function colours() {
    const ramp = themed("--ramp");
    const bands = mask.legend.filter((entry) => entry.kind === "band").length;
    let band = 0;
    return mask.legend.map(({ kind }) => {
      if (kind !== "band") return themed(kind === "sink" ? "--sink" : "--text-block")[0];
      return along(ramp, band++ / Math.max(bands - 1, 1));
    });
  }

  function draw() {
    const kinds = [themed("--dropped")[0], ...colours()];
    picture.width = picture.height = mask.count;
    const context = picture.getContext("2d");
    const image = context.createImageData(mask.count, mask.count);
    let at = 0;
    for (let i = 0; i < mask.runs.length; i += 2) {
      const [red, green, blue] = kinds[mask.runs[i]];
      for (let end = at + 4 * mask.runs[i + 1]; at < end; at += 4) image.data.set([red, green, blue, 255], at);
    }
    context.putImageData(image, 0, 0);
    explain(kinds);
    drawLines();
  }

  function explain(kinds) {
    const [count, height, width, words] = mask.grid;
    const tail = words ? ` and ${words} tokens of text` : "";
    byId("mask-about").textContent =
      `${count} frames of ${height} × ${width} tokens${tail}, blocks of ${mask.block_size}; ` +
      `${(100 * mask.density).toFixed(1)} % of the token pairs are kept. Share of the kept blocks:`;
    const entries = mask.legend.map(({ label, share }, i) => [label, `${(100 * share).toFixed(0)} %`, kinds[i + 1]]);
    entries.push(["dropped", "", kinds[0]]);
    byId("mask-legend").replaceChildren(
      ...entries.map(([label, share, colour]) => {
        const sample = make("i");
        sample.style.background = css(colour);
        return make("li", {}, [sample, label, make("data", {}, [share])]);
      }),
    );
  }

  function drawLines() {
    const side = map.clientWidth;
    lines.setAttribute("viewBox", `0 0 ${side} ${side}`);
    const last = edge(frames()) * side;
    const places = Array.from({ length: frames() + 1 }, (_, frame) => edge(frame) * side);
    const path = side / frames() < 6 ? "" : places.map((at) => `M0 ${at}H${last}M${at} 0V${last}`).join("");
    const every = Math.ceil((frames() * 26) / side);
    const marks = [];
    for (let frame = 0; frame < frames(); frame++) {
      if (frame % every && frame !== mask.grid[0]) continue;
      const middle = (places[frame] + places[frame + 1]) / 2;
      const words = frame < mask.grid[0] ? String(frame) : "text";
      marks.push(word(words, middle, -7, "middle"), word(words, -7, middle + 4, "end"));
    }
    const turned = word("query frame", -30, last / 2, "middle");
    turned.setAttribute("transform", `rotate(-90 -30 ${last / 2})`);
    const [top, bottom, left, right] = [pair[0], pair[0] + 1, pair[1], pair[1] + 1].map((at) => places[at]);
    const frame = { x: left, y: top, width: right - left, height: bottom - top };
    lines.replaceChildren(
      make("path", { d: path }, [], "svg"),
      ...marks,
      word("key frame", last / 2, -26, "middle"),
      turned,
      make("rect", { ...frame, class: "halo" }, [], "svg"),
      make("rect", frame, [], "svg"),
    );
  }

  function word(words, x, y, anchor) {
    return make("text", { x, y, "text-anchor": anchor }, [words], "svg");
  }

  function choose(query, key) {
    pair = [query, key];
    text.textContent = sentence(query, key);
    drawLines();
  }

  function sentence(query, key) {
    const share = `${(100 * mask.shares[query][key]).toFixed(1)} % of the token pairs kept`;
    const head = `Query ${name(query)}, key ${name(key)}: `;
    const count = mask.grid[0];
    if (query >= count || key >= count) return `${head}${share}.`;
    const distance = Math.abs(query - key);
    const level = Math.floor(Math.log2(Math.max(distance, 1)));
    const [low, high] = [level ? 2 ** level : 0, Math.min(2 ** (level + 1) - 1, count - 1)];
    const apart = ["the same frame", "1 frame apart"][distance] || `${distance} frames apart`;
    const band = low < high ? `${low} to ${high}` : high;
    const sink = key === 0 && mask.legend.some((entry) => entry.kind === "sink") ? "; frame 0 is the sink" : "";
    return `${head}${apart}, band ${band}; ${share}${sink}.`;
  }

  function pointed(event) {
    const box = map.getBoundingClientRect();
    const find = (share) => {
      for (let frame = frames() - 1; frame > 0; frame--) if (share >= edge(frame)) return frame;
      return 0;
    };
    choose(find((event.clientY - box.top) / box.height), find((event.clientX - box.left) / box.width));
  }

  map.addEventListener("pointermove", pointed);
  map.addEventListener("pointerdown", pointed);
  arrows(map, () => [frames(), frames()], () => pair, choose);
  const labels = masks.map((entry) => `${entry.label}, density ${figures(entry.density)}`);
  fillSelect("mask-choice", labels, (number) => {
    mask = masks[number];
    draw();
    choose(0, 0);
  });
  new ResizeObserver(drawLines).observe(map);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
  choose(0, 0);
}

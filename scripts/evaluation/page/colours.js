"use strict";
// Colours and small helpers of the page; the files are joined in the order of report.py.

const VIRIDIS = ["#440154", "#46317e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"].map(rgb);

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** Colour at a share of the way through some colours, each [r, g, b]. */
function along(colours, share) {
  const place = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
  const low = Math.min(Math.floor(place), colours.length - 2);
  return colours[low].map((value, i) => Math.round(value + (place - low) * (colours[low + 1][i] - value)));
}

/** Relative luminance of WCAG 2. */
function luminance(colour) {
  const linear = colour.map((value) => value / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

/** Black or white, whichever reads better on a colour. */
function readable(colour) {
  return luminance(colour) > 0.179 ? "#000" : "#fff";
}

function css(colour) {
  return `rgb(${colour.join(" ")})`;
}

/** Colours of a custom property of page.css, which is a list of #rrggbb. */
function themed(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).split(",").map((hex) => rgb(hex.trim()));
}

/** A new element with attributes and children; SVG where `space` says so. */
function make(tag, attributes = {}, children = [], space = "") {
  const found = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...children);
  return found;
}

function byId(id) {
  return document.getElementById(id);
}

/** Fills a select with labels; hides it where there is no choice. `choose` gets the number chosen. */
function fillSelect(id, labels, choose) {
  const select = byId(id);
  select.replaceChildren(...labels.map((label, i) => make("option", { value: i }, [label])));
  select.closest(".chooser").hidden = labels.length < 2;
  select.onchange = () => choose(Number(select.value));
}

/** A number with three significant digits, as the tables have it. */
function figures(value) {
  if (value === null || value === undefined) return "not measured";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  if (size >= -4 && size < 7) return value.toFixed(Math.max(2 - size, 0)).replace("-", "−");
  const raised = String(size).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  return `${(value / 10 ** size).toFixed(2)} × 10${raised}`;
}

/** Keeps `value` from 0 to `end - 1`. */
function within(value, end) {
  return Math.min(Math.max(value, 0), end - 1);
}

/** Arrow keys, Home and End on a map of `rows()` by `columns()`; `move` gets the new place. */
function arrows(element, size, place, move) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  element.addEventListener("keydown", (event) => {
    const [rows, columns] = size();
    const [row, column] = place();
    let next = null;
    if (steps[event.key]) next = [row + steps[event.key][0], column + steps[event.key][1]];
    if (event.key === "Home") next = [row, 0];
    if (event.key === "End") next = [row, columns - 1];
    if (!next) return;
    event.preventDefault();
    move(within(next[0], rows), within(next[1], columns));
  });
}

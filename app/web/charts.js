// Line charts as SVG. Hovering, or the arrow keys, move a cursor; the legend then shows the values at it.

import { figure, h, svg } from "./dom.js";

const WIDTH = 480;
const HEIGHT = 220;
const LEFT = 46;
const RIGHT = 12;
const TOP = 10;
const BOTTOM = 26;
const COLOURS = 8;

/**
 * A chart of `lines`: [{name, points: [{x, y}], dashed, colour}], x ascending, y null where there is no value.
 * `unit` names the x axis; `floor` and `ceiling` bound the y axis where the values have natural bounds; `format` writes a
 * value, `tick` one beside the axis.
 */
export function chart(title, lines, { unit = "step", floor = null, ceiling = null, format = figure, tick = format, note = "" } = {}) {
  const drawn = lines.filter((line) => line.points.some((point) => point.y != null));
  const heading = h("figcaption", {}, title, h("small", {}, ` by ${unit}${note}`));
  if (!drawn.length) return h("figure", { class: "chart" }, heading, h("p", { class: "empty" }, "nothing yet"));

  const all = drawn.flatMap((line) => line.points.filter((point) => point.y != null));
  const x = scale(Math.min(...all.map((p) => p.x)), Math.max(...all.map((p) => p.x)), LEFT, WIDTH - RIGHT);
  const low = floor ?? Math.min(...all.map((p) => p.y));
  const high = ceiling ?? Math.max(...all.map((p) => p.y));
  const y = scale(low, high === low ? low + 1 : high, HEIGHT - BOTTOM, TOP);

  const picture = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0,
    "aria-label": `${title}. ${drawn.map((line) => `${line.name}: ${format(lastValue(line))}`).join(", ")}`,
  });
  picture.append(...axes(x, y, unit, tick));
  drawn.forEach((line, index) => {
    line.colour ??= index;
    picture.append(path(line, x, y));
  });
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  picture.append(cursor);
  const { legend, show } = legendOf(drawn, unit, format);

  const places = [...new Set(all.map((point) => point.x))].sort((a, b) => a - b);
  const look = (place) => {
    cursor.setAttribute("visibility", place == null ? "hidden" : "visible");
    if (place != null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(place));
    show(place);
  };
  let at = places.length - 1;
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const wanted = x.back(((event.clientX - box.left) / box.width) * WIDTH);
    at = nearest(places, wanted);
    look(places[at]);
  });
  picture.addEventListener("pointerleave", () => look(null));
  picture.addEventListener("blur", () => look(null));
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.min(places.length - 1, Math.max(0, at + move));
    look(places[at]);
  });
  return h("figure", { class: "chart" }, heading, picture, legend);
}

function scale(from, to, start, end) {
  const ratio = (end - start) / (to - from || 1);
  const place = (value) => start + (value - from) * ratio;
  place.back = (pixel) => from + (pixel - start) / ratio;
  place.from = from;
  place.to = to;
  return place;
}

/** Round numbers that divide a range into about `wanted` parts. */
function ticks(from, to, wanted) {
  const rough = (to - from || 1) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const places = [];
  for (let place = Math.ceil(from / step); place * step <= to + step * 1e-9; place += 1) {
    places.push(Number((place * step).toPrecision(12))); // without the dust of 0.1 + 0.2
  }
  return places;
}

function axes(x, y, unit, tick) {
  const parts = [];
  for (const value of ticks(y.from, y.to, 4)) {
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    parts.push(svg("text", { class: "tick", x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, tick(value)));
  }
  for (const value of ticks(x.from, x.to, 5).filter((place) => unit !== "epoch" || Number.isInteger(place))) {
    parts.push(svg("text", { class: "tick", x: x(value), y: HEIGHT - 9, "text-anchor": "middle" }, figure(value)));
  }
  return parts;
}

function path(line, x, y) {
  const style = `line colour-${line.colour % COLOURS}${line.dashed ? " dashed" : ""}`;
  const known = line.points.filter((point) => point.y != null);
  if (known.length === 1 || line.dots) {
    const dots = known.map((point) => svg("circle", { cx: x(point.x), cy: y(point.y), r: 3 }));
    return svg("g", { class: style }, dots, known.length > 1 && svg("polyline", { points: corners(known, x, y) }));
  }
  return svg("polyline", { class: style, points: corners(known, x, y) });
}

const corners = (points, x, y) => points.map((point) => `${x(point.x).toFixed(1)},${y(point.y).toFixed(1)}`).join(" ");

function legendOf(lines, unit, format) {
  const where = h("li", { class: "where" });
  const entries = lines.map((line) => {
    const value = h("b", {}, format(lastValue(line)));
    const swatch = svg("svg", { class: "swatch", viewBox: "0 0 20 8", "aria-hidden": "true" },
      svg("polyline", { class: `line colour-${line.colour % COLOURS}${line.dashed ? " dashed" : ""}`, points: "0,4 20,4" }));
    return { line, value, item: h("li", {}, swatch, line.name, " ", value) };
  });
  const show = (place) => {
    where.textContent = place == null ? "" : `${unit} ${figure(place)}`;
    for (const { line, value } of entries) {
      value.textContent = format(place == null ? lastValue(line) : valueAt(line, place));
    }
  };
  return { legend: h("ul", { class: "legend" }, entries.map((entry) => entry.item), where), show };
}

const lastValue = (line) => line.points.findLast((point) => point.y != null)?.y;

/** The value at a place: the last one that was known there. */
const valueAt = (line, place) => line.points.findLast((point) => point.x <= place && point.y != null)?.y;

const nearest = (places, wanted) =>
  places.reduce((best, place, index) => (Math.abs(place - wanted) < Math.abs(places[best] - wanted) ? index : best), 0);

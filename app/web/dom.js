// Elements and words. Everything shown goes through textContent: labels and texts may hold HTML.

/** An element: attributes, listeners under `on…`, then children; strings become text, null and false nothing. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

const MISSING = "–";

export const percent = (share, digits = 1) => (share == null ? MISSING : `${(100 * share).toFixed(digits)} %`);

export const count = (number) => (number == null ? MISSING : number.toLocaleString("en"));

/** A number with as many digits as a reader can use. */
export function figure(number) {
  if (number == null) return MISSING;
  if (number === 0) return "0";
  return Math.abs(number) < 0.001 || Math.abs(number) >= 1e6 ? number.toExponential(1) : String(+number.toPrecision(4));
}

export function duration(seconds) {
  if (seconds == null) return MISSING;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
  return `${Math.round(seconds / 86400)} days`;
}

/** A moment as its age, with the moment itself on hover. */
export function age(moment) {
  const seconds = Math.max(0, (Date.now() - new Date(moment)) / 1000);
  const rough = seconds < 60 ? duration(seconds) : duration(seconds).split(" ").slice(0, 2).join(" ");
  return h("time", { datetime: moment, title: new Date(moment).toLocaleString() }, `${rough} ago`);
}

export const words = (name) => name.replaceAll("_", " ");

export const status = (name) => h("span", { class: `status ${name}` }, name);

export function bar(share, label) {
  return h("progress", { max: 1, value: share, "aria-label": label }, percent(share, 0));
}

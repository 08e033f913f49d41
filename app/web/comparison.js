// Comparisons: the list, and one with its table and charts.

import { download, get, post } from "./api.js";
import { chart } from "./charts.js";
import { age, bar, count, duration, h, percent, status } from "./dom.js";

const MILLISECONDS = 3000;
const MISSING = "–";
const COLUMNS = ["Arm", "Status", "Accuracy", "Macro-F1", "Difference in macro-F1", "Rank", "Seen", "Trained on", "Share", "Time", "GPU memory"];
const FORMATS = { Markdown: ["markdown", "md"], CSV: ["csv", "csv"], LaTeX: ["latex", "tex"] };
const SERIES = ["ratio", "influence_mean", "validation_loss", "validation_macro_f1"];

/** The list, a page at a time. */
export async function showComparisons(main, signal, attempt) {
  const rows = h("tbody");
  const older = h("button", { class: "quiet" }, "Older →");
  main.replaceChildren(h("h1", {}, "Comparisons"), h("div", { class: "scroll" }, h("table", { class: "comparisons" },
    h("thead", {}, h("tr", {}, ["Comparison", "Arms", "Seeds", "Status", "Progress", "Age"].map((name) => h("th", { scope: "col" }, name)))), rows)),
  older);
  const load = async (after) => {
    const page = await get(`/comparisons?limit=20${after ? `&after=${after}` : ""}`, signal);
    if (signal.aborted) return;
    rows.append(...page.data.map(listRow));
    if (!rows.childElementCount) main.append(h("p", { class: "empty" }, "No comparisons yet; ", h("code", {}, "understudy compare SPEC.json"), " starts one."));
    older.hidden = !page.has_more;
    older.onclick = () => attempt(() => load(page.next));
  };
  await load(null);
}

function listRow(told) {
  const name = told.name ?? told.id;
  return h("tr", {}, h("td", {}, h("a", { href: `#/comparisons/${encodeURIComponent(told.id)}` }, name)),
    h("td", { class: "number" }, count(told.spec.arms.length)), h("td", { class: "number" }, count(told.spec.seeds.length)),
    h("td", {}, status(told.status)), h("td", {}, bar(told.progress, `Progress of ${name}`)), h("td", {}, age(told.created_at)));
}

/** Fill `main` with the comparison and keep it up to date until `signal` aborts or it has ended. */
export async function showComparison(main, id, signal, attempt) {
  const path = `/comparisons/${encodeURIComponent(id)}`;
  const parts = { head: h("div"), actions: h("div", { class: "actions" }), table: h("section"), charts: h("section") };
  let shown = null;
  const refresh = async () => {
    const told = await get(path, signal);
    document.title = `${told.name ?? told.id} · Understudy`;
    parts.head.replaceChildren(...heading(told));
    parts.table.replaceChildren(table(told), h("p", { class: "hint" }, caption(told)));
    const ended = told.status + told.arms.map((arm) => arm.status + arm.macro_f1.runs).join();
    if (ended !== shown) { // not at every look: a button must not lose the focus, nor a chart its cursor
      shown = ended;
      parts.actions.replaceChildren(...actions(told, path, attempt, refresh));
      const metrics = await metricsOf(told, signal);
      if (!signal.aborted) parts.charts.replaceChildren(h("h2", {}, "Charts"), h("div", { class: "charts" }, charts(told, metrics)));
    }
    return told.is_terminal;
  };
  main.replaceChildren(h("p", {}, h("a", { href: "#/comparisons" }, "← Comparisons")), parts.head, parts.actions, parts.table, parts.charts);
  if (await refresh()) return;
  const timer = setInterval(() => document.hidden || attempt(async () => { if (await refresh()) clearInterval(timer); }), MILLISECONDS);
  signal.addEventListener("abort", () => clearInterval(timer));
}

function heading(told) {
  return [
    h("h1", {}, told.name ?? told.id, " ", status(told.status)),
    h("p", { class: "hint" }, h("code", {}, told.id), " · ", age(told.created_at),
      told.eta_seconds != null ? ` · about ${duration(told.eta_seconds)} left` : ""),
    told.warnings.length > 0 && h("ul", { class: "warnings" }, told.warnings.map((warning) => h("li", {}, warning.message))),
    bar(told.progress, "Progress of the comparison"),
  ].filter(Boolean);
}

function actions(told, path, attempt, refresh) {
  const name = told.name ?? told.id;
  const buttons = Object.entries(FORMATS).map(([label, [format, suffix]]) => h("button", {
    onclick: () => attempt(() => download(`${path}/table?format=${format}`, `${name}.${suffix}`, () => {})),
  }, `Table as ${label}`));
  if (told.is_terminal) return buttons;
  return [...buttons, h("button", { class: "cancel", onclick: () => {
    if (window.confirm("Cancel every run that has not ended?")) attempt(async () => { await post(`${path}/cancel`); await refresh(); });
  } }, "Cancel")];
}

// --- the table --------------------------------------------------------------------------------------------------------

function table(told) {
  const memory = told.arms.some((arm) => arm.gpu_memory_bytes != null);
  const shown = memory ? COLUMNS : COLUMNS.slice(0, -1);
  return h("div", { class: "scroll" }, h("table", { class: "arms" },
    h("thead", {}, h("tr", {}, shown.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, teachers(told).map(([name, scores]) => row([name, "", percent(scores.accuracy), percent(scores.macro_f1)], shown.length)),
      told.arms.map((arm) => row([
        armName(arm), status(arm.status), spread(arm.accuracy), spread(arm.macro_f1), difference(arm.difference),
        arm.rank == null ? MISSING : arm.rank.toFixed(1), count(whole(arm.seen)), count(whole(arm.selected)), percent(arm.share),
        duration(arm.seconds), arm.gpu_memory_bytes == null ? MISSING : `${(arm.gpu_memory_bytes / 2 ** 30).toFixed(1)} GiB`,
      ], shown.length)))));
}

function teachers(told) {
  const own = told.arms.map((arm) => [`Teacher of ${arm.name}`, arm.teacher]);
  return [["Teacher", told.teacher], ...own].filter(([, scores]) => scores);
}

function row(cells, columns) {
  const filled = [...cells, ...Array(columns).fill(MISSING)].slice(0, columns);
  return h("tr", {}, filled.map((cell, index) => (index ? h("td", { class: index > 1 && "number" }, cell) : h("th", { scope: "row" }, cell))));
}

function armName(arm) {
  const links = arm.runs.map((run) => h("a", { href: `#/jobs/${encodeURIComponent(run.job_id)}`, title: run.status }, run.seed)).flatMap((link) => [" ", link]);
  return h("span", {}, arm.name, h("small", {}, " seeds", links));
}

const whole = (number) => (number == null ? null : Math.round(number));

const spread = ({ mean, sd }) => (mean == null ? MISSING : `${(100 * mean).toFixed(1)}${sd == null ? "" : ` ± ${(100 * sd).toFixed(1)}`} %`);

function difference(found) {
  if (!found) return MISSING;
  const [mean, low, high] = ["mean", "low", "high"].map((name) => signed(100 * found.macro_f1[name]));
  return h("span", {}, mean, h("small", {}, ` [${low}, ${high}]`));
}

const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(1)}`;

const caption = (told) => `Scores on the test set, mean ± standard deviation over the seeds. Difference: to ${told.arms[0].name}, with its 95 % `
  + "paired-bootstrap interval. Rank: by macro-F1, averaged over the seeds that every arm has finished.";

// --- charts -----------------------------------------------------------------------------------------------------------

/** The series of each arm's first run, by the arm's name. */
async function metricsOf(told, signal) {
  const query = SERIES.map((name) => `name=${name}`).join("&");
  const found = await Promise.all(told.arms.map((arm) => get(`/jobs/${encodeURIComponent(arm.runs[0].job_id)}/metrics?${query}`, signal)));
  return new Map(told.arms.map((arm, index) => [arm.name, new Map(found[index].data.map(({ name, points }) => [name, points]))]));
}

function charts(told, metrics) {
  const share = { floor: 0, ceiling: 1, format: percent, tick: (value) => percent(value, 0) };
  const lines = (series, x, style = {}) => told.arms.map((arm, index) => ({
    name: arm.name, colour: index, ...style, points: (metrics.get(arm.name).get(series) ?? []).map((point) => ({ x: point[x], y: point.value })),
  }));
  const seed = `, seed ${told.spec.seeds[0]}`;
  const scored = told.arms.map((arm, index) => ({ name: arm.name, colour: index, points: [{ x: 100 * arm.share, y: arm.macro_f1.mean }] }))
    .filter((_, index) => told.arms[index].share != null);
  const bounds = scored.length > 1 ? {} : { floor: 0, ceiling: 1 };
  const drawn = [
    chart("Macro-F1 on the test set", scored, { ...share, floor: null, ceiling: null, ...bounds, unit: "% trained on" }),
    chart("Selected share", lines("ratio", "step"), { ...share, note: seed }),
    chart("Validation macro-F1", lines("validation_macro_f1", "epoch", { dots: true }), { ...share, unit: "epoch", note: seed }),
    chart("Validation loss", lines("validation_loss", "step", { dots: true }), { note: seed }),
  ];
  const influence = lines("influence_mean", "step").filter((line) => line.points.length);
  return influence.length ? [...drawn, chart("Mean influence", influence, { note: seed })] : drawn;
}

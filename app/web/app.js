// The dashboard: a form for the key, the lists of jobs and comparisons, and a page for each. The address after # says which.

import { Refused, get, key } from "./api.js";
import { showComparison, showComparisons } from "./comparison.js";
import { age, bar, h, percent, status } from "./dom.js";
import { showJob } from "./job.js";

const LIST_MILLISECONDS = 3000;
const STATUSES = ["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"];

const main = document.getElementById("main");
const problem = document.getElementById("problem");
const forget = document.getElementById("forget");
let leaving = new AbortController();

/** Show what the address asks for, after ending what the last page had going. */
async function route() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  complain(null);
  forget.hidden = !key.get();
  document.title = "Understudy";
  if (!key.get()) return askForKey();
  const [, page, id] = location.hash.split("/");
  try {
    if (page === "jobs" && id) await showJob(main, decodeURIComponent(id), signal, attempt(signal));
    else if (page === "comparisons" && id) await showComparison(main, decodeURIComponent(id), signal, attempt(signal));
    else if (page === "comparisons") await showComparisons(main, signal, attempt(signal));
    else await showJobs(signal);
  } catch (error) {
    if (!signal.aborted) main.replaceChildren(); // the page before is not what was asked for
    answer(error, signal);
  }
}

/** Runs an action of a page; what goes wrong is said above the page, and an invalid key is asked for again. */
function attempt(signal) {
  return async (action) => {
    try {
      const result = await action();
      if (!signal.aborted) complain(null);
      return result;
    } catch (error) {
      answer(error, signal);
      return undefined;
    }
  };
}

function answer(error, signal) {
  if (signal.aborted || error.name === "AbortError") return;
  if (error instanceof Refused && error.status === 401) {
    key.forget();
    route();
  }
  complain(error instanceof Refused ? error.message : `The server cannot be reached (${error.message}).`);
}

function complain(sentence) {
  problem.hidden = !sentence;
  problem.textContent = sentence ?? "";
}

// --- the key --------------------------------------------------------------------------------------------------------

function askForKey() {
  // Without a name the field is never part of a form's own submission, and so never of a URL.
  const field = h("input", { id: "key", type: "password", autocomplete: "off", required: true, placeholder: "us_…" });
  const form = h("form", { class: "key" },
    h("h1", {}, "Which key?"),
    h("label", { for: "key" }, "API key"), field,
    h("button", {}, "Show the jobs"),
    h("p", { class: "hint" }, "It stays in this tab until you close it. ", h("code", {}, "understudy up"),
      " writes one to ", h("code", {}, "data/api-key"), "; ", h("code", {}, "understudy keys create"), " makes others."));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(field.value.trim());
    route();
  });
  main.replaceChildren(form);
  field.focus();
}

forget.addEventListener("click", () => {
  key.forget();
  route();
});

// --- the list -------------------------------------------------------------------------------------------------------

async function showJobs(signal) {
  let pages = [null]; // the `after` of every page up to the one that is shown
  const filter = h("select", { id: "status", onchange: () => turn([null]) },
    h("option", { value: "" }, "every status"), STATUSES.map((name) => h("option", { value: name }, name)));
  const rows = h("tbody");
  const table = h("table", { class: "jobs" }, h("thead", {}, h("tr", {},
    ["Job", "Method", "Status", "Progress", "Selected", "Macro-F1", "Age"].map((name) => h("th", { scope: "col" }, name)))), rows);
  const empty = h("div", { class: "empty", hidden: true });
  const newer = h("button", { class: "quiet", onclick: () => turn(pages.slice(0, -1)) }, "← Newer");
  const older = h("button", { class: "quiet" }, "Older →");
  const body = h("div", { class: "scroll" }, table);
  main.replaceChildren(h("div", { class: "bar" }, h("h1", {}, "Jobs"), h("label", { for: "status" }, "Show "), filter),
    body, empty, h("div", { class: "bar" }, newer, older));

  const run = attempt(signal);
  const turn = (next) => {
    pages = next;
    run(load);
  };
  async function load() {
    const query = new URLSearchParams({ limit: 20 });
    if (filter.value) query.set("status", filter.value);
    if (pages.at(-1)) query.set("after", pages.at(-1));
    const asked = pages;
    const page = await get(`/jobs?${query}`, signal);
    if (asked !== pages || signal.aborted) return;
    const focused = document.activeElement?.getAttribute("href");
    rows.replaceChildren(...page.data.map(jobRow));
    if (focused) rows.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
    body.hidden = !page.data.length;
    empty.hidden = Boolean(page.data.length);
    empty.replaceChildren(...(filter.value ? [h("p", {}, `No job is ${filter.value}.`)] : firstSteps()));
    newer.hidden = pages.length === 1;
    older.hidden = !page.has_more;
    older.onclick = () => turn([...pages, page.next]);
  }
  await load();
  repeat(LIST_MILLISECONDS, signal, () => run(load));
}

function jobRow(job) {
  const score = job.metrics.test_macro_f1 ?? job.metrics.validation_macro_f1;
  const split = job.metrics.test_macro_f1 != null ? "test" : "validation";
  return h("tr", {},
    h("td", {}, h("a", { href: `#/jobs/${encodeURIComponent(job.id)}` }, job.name ?? job.id)),
    h("td", {}, job.method),
    h("td", {}, status(job.status)),
    h("td", {}, bar(job.progress, `Progress of ${job.name ?? job.id}`), h("small", {}, job.is_terminal ? "" : ` ${job.phase ?? ""}`)),
    h("td", { class: "number" }, percent(job.selection?.ratio)),
    h("td", { class: "number" }, percent(score), score != null && h("small", {}, ` ${split}`)),
    h("td", {}, age(job.created_at)));
}

function firstSteps() {
  return [
    h("h2", {}, "No jobs yet"),
    h("p", {}, "A job turns unlabeled texts into a classifier. Start one from the directory that holds them:"),
    h("pre", {}, "understudy submit --dataset texts.jsonl \\\n  --label 'billing=questions about invoices' --label 'delivery=where is my parcel'"),
    h("p", {}, "or with ", h("code", {}, "POST /jobs"), ", as ", h("a", { href: "/docs" }, "the API"), " says."),
  ];
}

/** Do something every so often while the page is looked at. */
function repeat(milliseconds, signal, action) {
  const timer = setInterval(() => document.hidden || action(), milliseconds);
  signal.addEventListener("abort", () => clearInterval(timer));
}

window.addEventListener("hashchange", async () => {
  await route();
  main.focus();
});
route();

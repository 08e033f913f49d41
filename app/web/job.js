// One job: its phases, events and charts while it runs, its scores and samples, and what can be done with it.

import { download, followEvents, get, post } from "./api.js";
import { chart } from "./charts.js";
import { age, bar, count, duration, figure, h, percent, status, words } from "./dom.js";

const JOB_MILLISECONDS = 2000;
const EVENTS_SHOWN = 300;
const CLASSES_SHOWN = 8;
const MEANS_SHOWN = 12;
const SAMPLES_PER_PAGE = 20;
const TEXTS_AT_ONCE = 64;
const SAMPLE_COLUMNS = ["Row", "Text", "Label", "Confidence", "Teacher's threshold", "Uncertainty", "Student's threshold", "Selected", "Why"];

const MOVES = {
  pause: { from: ["queued", "running"], label: "Pause" },
  resume: { from: ["paused"], label: "Resume" },
  retry: { from: ["failed", "cancelled"], label: "Retry" },
  cancel: { from: ["queued", "running", "pausing", "paused"], label: "Cancel", ask: "Cancel this job? Its worker stops." },
};

const ORDERS = {
  row: "as in the dataset",
  "-confidence": "teacher most sure first",
  confidence: "teacher least sure first",
  "-student_uncertainty": "student least sure first",
  student_uncertainty: "student most sure first",
  "-selected": "most often selected first",
  selected: "least often selected first",
  influence: "most harmful first (lgtm)",
};

/** Fill `main` with the job and keep it up to date until `signal` aborts. `attempt` runs what may be refused. */
export async function showJob(main, id, signal, attempt) {
  const path = `/jobs/${encodeURIComponent(id)}`;
  let job = await get(path, signal);
  document.title = `${job.name ?? job.id} · Understudy`;
  const parts = {
    head: h("div"), actions: h("div", { class: "actions" }), phases: h("section"), scores: h("section"), tryIt: h("section"),
    charts: h("section"), events: h("ol", { class: "events", role: "log" }), samples: new Samples(path, job, signal, attempt),
  };
  main.replaceChildren(h("p", {}, h("a", { href: "#/" }, "← Jobs")), parts.head, parts.actions, parts.phases, parts.scores, parts.tryIt,
    parts.charts, h("section", {}, h("h2", {}, "Events"), parts.events), parts.samples.section, specification(job));

  const series = new Series(path, signal);
  let shown = null;
  let drawn = null;
  const charted = () => `${series.size} ${job.is_terminal}`;
  const render = () => {
    parts.head.replaceChildren(...heading(job));
    parts.phases.replaceChildren(h("h2", {}, "Phases"), phases(job));
    if (shown !== job.status + job.best_checkpoint_id) { // not at every look: a button must not lose the focus
      shown = job.status + job.best_checkpoint_id;
      parts.actions.replaceChildren(...actions(job, path, attempt, refresh));
      parts.scores.replaceChildren(...scores(job));
      parts.tryIt.replaceChildren(...tryIt(job, attempt));
      if (parts.samples.isEmpty) attempt(() => parts.samples.load(0));
    }
    const looking = parts.charts.matches(":hover, :focus-within"); // nor a chart its cursor
    if (drawn !== charted() && !looking) {
      drawn = charted();
      const figures = charts(series).filter((figure) => !job.is_terminal || !figure.querySelector(".empty"));
      parts.charts.replaceChildren(h("h2", {}, "Training"), h("div", { class: "charts" }, figures));
      parts.charts.hidden = !figures.length;
    }
    follow();
  };

  async function refresh() {
    job = await get(path, signal);
    await series.update();
    if (!signal.aborted) render();
  }

  let following = false;
  let last = 0;
  async function follow() {
    if (following || (job.is_terminal && last > 0)) return;
    following = true;
    await attempt(() => followEvents(encodeURIComponent(id), last, signal, (event) => {
      last = event.seq;
      parts.events.prepend(eventItem(event));
      if (parts.events.childElementCount > EVENTS_SHOWN) parts.events.lastElementChild.remove();
      if (event.type === "training.epoch" && parts.samples.isEmpty) attempt(() => parts.samples.load(0));
    }));
    following = false;
  }

  await series.update();
  render();
  const timer = setInterval(() => {
    if (!document.hidden && !(job.is_terminal && drawn === charted())) attempt(refresh);
  }, JOB_MILLISECONDS);
  signal.addEventListener("abort", () => clearInterval(timer));
}

// --- what it is and how far it is -------------------------------------------------------------------------------------

function heading(job) {
  const facts = [
    ["Method", job.method],
    ["Teacher", [job.spec.teacher.kind, job.spec.teacher.model].filter(Boolean).join(" · ")],
    ["Student", job.spec.student.model],
    ["Classes", count(job.labeling.labels.length)],
    ["Selected", job.selection ? `${count(job.selection.selected)} of ${count(job.selection.seen)} (${percent(job.selection.ratio)})` : "–"],
    ["Teacher tokens", `${count(job.labeling.tokens)}, saved by the cache ${count(job.labeling.tokens_saved)}`],
    ["Attempt", count(job.attempt)],
    ...(job.comparison_id ? [["Comparison", h("a", { href: `#/comparisons/${encodeURIComponent(job.comparison_id)}` }, job.arm)]] : []),
  ];
  const took = job.started_at && job.finished_at && (new Date(job.finished_at) - new Date(job.started_at)) / 1000;
  return [
    h("h1", {}, job.name ?? job.id, " ", status(job.status)),
    h("p", { class: "hint" }, h("code", {}, job.id), " · ", age(job.created_at),
      took ? ` · took ${duration(took)}` : "", job.eta_seconds != null ? ` · about ${duration(job.eta_seconds)} left` : ""),
    job.error && h("p", { class: "error" }, h("b", {}, `${job.error.code}: `), job.error.message),
    job.warnings.length > 0 && h("ul", { class: "warnings" }, job.warnings.map((warning) => h("li", {}, warning.message))),
    bar(job.progress, "Progress of the job"),
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
  ].filter(Boolean);
}

function phases(job) {
  return h("ul", { class: "phases" }, job.phases.map((phase) => {
    const state = phase.finished_at ? "finished" : phase.started_at ? "running" : "waiting";
    const end = phase.finished_at ? new Date(phase.finished_at) : job.finished_at ? new Date(job.finished_at) : new Date();
    const seconds = phase.started_at ? (end - new Date(phase.started_at)) / 1000 : null;
    const done = phase.finished_at ? phase.total : phase.done;
    return h("li", {}, h("b", {}, phase.name), bar(phase.total ? done / phase.total : Number(Boolean(phase.finished_at)), `Phase ${phase.name}`),
      h("span", {}, `${count(done)} of ${count(phase.total)}`), h("small", {}, state === "waiting" ? "waiting" : duration(seconds)));
  }));
}

function eventItem(event) {
  return h("li", { class: event.level },
    h("time", { datetime: event.at }, new Date(event.at).toLocaleTimeString()), h("code", {}, event.type), event.message);
}

function specification(job) {
  return h("details", {}, h("summary", {}, "Specification"), h("pre", {}, JSON.stringify(job.spec, null, 2)));
}

// --- what can be done -------------------------------------------------------------------------------------------------

function actions(job, path, attempt, refresh) {
  const buttons = Object.entries(MOVES).filter(([, move]) => move.from.includes(job.status)).map(([verb, move]) =>
    h("button", { class: verb, onclick: async (event) => {
      if (move.ask && !window.confirm(move.ask)) return;
      event.currentTarget.disabled = true;
      await attempt(async () => { await post(`${path}/${verb}`); await refresh(); });
      event.target.disabled = false;
    } }, move.label));
  return job.best_checkpoint_id ? [downloadButton(job, attempt), ...buttons] : buttons;
}

function downloadButton(job, attempt) {
  const label = "Download the checkpoint";
  return h("button", { class: "main", onclick: async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    const path = `/checkpoints/${encodeURIComponent(job.best_checkpoint_id)}/download`;
    await attempt(() => download(path, `${job.best_checkpoint_id}.tar`, (share) => {
      button.textContent = `Downloading, ${percent(share, 0)}`;
    }));
    button.textContent = label;
    button.disabled = false;
  } }, label);
}

// --- teacher against student ------------------------------------------------------------------------------------------

function scores(job) {
  if (!job.evaluation) return [];
  const rows = [];
  for (const split of ["test", "validation"]) {
    const scored = job.evaluation[split];
    for (const model of ["teacher", "student"]) {
      const score = scored?.[model];
      if (!score) continue;
      const name = scored.source === "dataset" ? split : `${split} (${words(scored.source)})`;
      rows.push(h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, model),
        h("td", { class: "number" }, withInterval(score.accuracy, score.accuracy_interval)),
        h("td", { class: "number" }, withInterval(score.macro_f1, score.macro_f1_interval)),
        h("td", { class: "number" }, percent(score.expected_calibration_error)),
        h("td", { class: "number" }, count(score.rows))));
    }
  }
  const heads = ["Set", "Model", "Accuracy", "Macro-F1", "Calibration error", "Rows"];
  const pseudo = job.evaluation.pseudo_labels;
  return [
    h("h2", {}, "Scores"),
    h("div", { class: "scroll" }, h("table", { class: "scores" },
      h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows))),
    h("p", { class: "hint" }, "In brackets: 95 % bootstrap intervals. The test set was looked at once, after the checkpoint was chosen. ",
      pseudo ? `The teacher's labels of the train rows agree with their own in ${percent(pseudo.accuracy)} of ${count(pseudo.rows)}.` : ""),
    classScores(job.evaluation),
  ];
}

function withInterval(value, interval) {
  return [percent(value), interval && h("small", {}, ` [${interval.map((end) => (100 * end).toFixed(1)).join(", ")}]`)];
}

function classScores(evaluation) {
  const split = evaluation.test ? "test" : "validation";
  const { student, teacher } = evaluation[split] ?? {};
  if (!student?.per_class) return h("p");
  return h("details", {}, h("summary", {}, `F1 of each class on the ${split} set`), h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, ["Class", "Teacher", "Student", "Rows"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, Object.entries(student.per_class).map(([label, score]) => h("tr", {}, h("th", { scope: "row" }, label),
      h("td", { class: "number" }, percent(teacher?.per_class?.[label]?.f1)), h("td", { class: "number" }, percent(score.f1)),
      h("td", { class: "number" }, count(score.support))))))));
}

// --- the student on texts of one's own --------------------------------------------------------------------------------

function tryIt(job, attempt) {
  if (!job.best_checkpoint_id) return [];
  const field = h("textarea", { id: "texts", rows: 3, placeholder: "One text a line" });
  const answers = h("tbody");
  const table = h("table", { hidden: true }, h("thead", {}, h("tr", {},
    ["Text", "Label", "Confidence", ""].map((name) => h("th", { scope: "col" }, name)))), answers);
  const ask = async () => {
    const texts = field.value.split("\n").map((text) => text.trim()).filter(Boolean).slice(0, TEXTS_AT_ONCE);
    if (!texts.length) return;
    const { data } = await post(`/checkpoints/${encodeURIComponent(job.best_checkpoint_id)}/predict`, { texts });
    answers.replaceChildren(...data.map((found, index) => h("tr", {}, h("td", { class: "text" }, texts[index]), h("td", {}, found.label),
      h("td", { class: "number" }, percent(found.confidence)), h("td", {}, found.abstain ? "abstains" : ""))));
    table.hidden = false;
  };
  return [h("h2", {}, "Try it"), h("label", { for: "texts" }, "Texts to classify"), field,
    h("div", { class: "actions" }, h("button", { onclick: () => attempt(ask) }, "Classify")), h("div", { class: "scroll" }, table)];
}

// --- charts -----------------------------------------------------------------------------------------------------------

/** The job's metric series, fetched from the last known step on. */
class Series {
  constructor(path, signal) {
    this.path = path;
    this.signal = signal;
    this.points = new Map(); // name -> Map(step -> point)
    this.last = 0;
  }

  async update() {
    const answer = await get(`${this.path}/metrics?from_step=${this.last}`, this.signal);
    for (const { name, points } of answer.data) {
      if (!this.points.has(name)) this.points.set(name, new Map());
      for (const point of points) {
        this.points.get(name).set(point.step, point);
        this.last = Math.max(this.last, point.step);
      }
    }
  }

  get size() {
    return [...this.points.values()].reduce((sum, points) => sum + points.size, 0);
  }

  line(name, { x = "step", label = name, ...style } = {}) {
    const points = [...(this.points.get(name)?.values() ?? [])].map((point) => ({ x: point[x], y: point.value }));
    return { name: label, points, ...style };
  }

  /** What stands after `prefix/` in the names of the series. */
  classes(prefix) {
    return [...this.points.keys()].filter((name) => name.startsWith(`${prefix}/`)).map((name) => name.slice(prefix.length + 1));
  }
}

function charts(series) {
  const share = { floor: 0, ceiling: 1, format: percent, tick: (value) => percent(value, 0) };
  const perClass = (prefix) => {
    const classes = series.classes(prefix);
    const lines = classes.slice(0, CLASSES_SHOWN).map((label, index) => series.line(`${prefix}/${label}`, { label, colour: index }));
    return { lines, note: classes.length > lines.length ? `, the first ${lines.length} of ${classes.length} classes` : "" };
  };
  const ratios = perClass("class_ratio");
  const window = Math.max(1, Math.round(Math.max(0, ...ratios.lines.map((line) => line.points.length)) / MEANS_SHOWN));
  const mean = window > 1 ? `, means of ${window} points` : "";
  const teacher = perClass("threshold_teacher");
  const student = perClass("threshold_student");
  return [
    chart("Selected share", [series.line("ratio", { label: "selected" })], share),
    chart("Selected share of each class", ratios.lines.map((line) => means(line, window)), { ...share, note: mean + ratios.note }),
    chart("Training loss", [series.line("train_loss", { label: "loss" })], { floor: 0 }),
    chart("Teacher's thresholds", teacher.lines, { ...share, note: teacher.note }),
    chart("Student's thresholds", student.lines, { floor: 0, note: `, in nats${student.note}` }),
    ...(series.points.has("influence_mean") ? [chart("Influence", [
      series.line("influence_p90", { label: "90th percentile" }),
      series.line("influence_mean", { label: "mean" }),
      series.line("influence_p10", { label: "10th percentile" }),
    ])] : []),
    chart("Validation", [
      series.line("validation_macro_f1", { x: "epoch", label: "macro-F1", dots: true }),
      series.line("validation_accuracy", { x: "epoch", label: "accuracy", dots: true, dashed: true }),
      series.line("epoch_ratio", { x: "epoch", label: "selected share", dots: true }),
    ], { ...share, unit: "epoch" }),
  ];
}

/** A class has few rows in a batch, so its share jumps; the mean of each point and those before it can be read. */
function means(line, window) {
  const points = line.points.map((point, index) => {
    const known = line.points.slice(Math.max(0, index + 1 - window), index + 1).filter(({ y }) => y != null);
    return { x: point.x, y: known.length ? known.reduce((sum, { y }) => sum + y, 0) / known.length : null };
  });
  return { ...line, points };
}

// --- samples ----------------------------------------------------------------------------------------------------------

/** The ledger: filters, a table, and a button for the rows after those shown. */
class Samples {
  constructor(path, job, signal, attempt) {
    Object.assign(this, { path, signal, attempt, latest: 0 });
    this.decision = this.choice("decision", [["", "all"], ["selected", "selected"], ["rejected", "rejected"]]);
    this.label = this.choice("label", [["", "all"], ...job.labeling.labels.map((name) => [name, name])]);
    this.order = this.choice("order", Object.entries(ORDERS));
    this.rows = h("tbody");
    this.table = h("div", { class: "scroll", hidden: true }, h("table", { class: "samples" },
      h("thead", {}, h("tr", {}, SAMPLE_COLUMNS.map((name) => h("th", { scope: "col" }, name)))), this.rows));
    this.empty = h("p", { class: "empty" });
    this.more = h("button", { class: "quiet", hidden: true }, "More rows");
    const field = (select, label) => h("span", { class: "field" }, h("label", { for: select.id }, label), select);
    this.section = h("section", {}, h("h2", {}, "Samples"), h("div", { class: "bar" },
      field(this.decision, "Decision"), field(this.label, "Teacher's label"), field(this.order, "Order"),
      h("button", { class: "quiet", onclick: () => attempt(() => this.load(0)) }, "Look again")), this.table, this.empty, this.more);
  }

  choice(id, options) {
    return h("select", { id, onchange: () => this.attempt(() => this.load(0)) },
      options.map(([value, text]) => h("option", { value }, text)));
  }

  get isEmpty() {
    return !this.rows.childElementCount;
  }

  async load(after) {
    const mine = ++this.latest;
    const query = new URLSearchParams({ limit: SAMPLES_PER_PAGE, after, order: this.order.value });
    if (this.decision.value) query.set("decision", this.decision.value);
    if (this.label.value) query.set("label", this.label.value);
    let page = { data: [], has_more: false };
    let sentence = "No row is like that.";
    try {
      page = await get(`${this.path}/samples?${query}`, this.signal);
    } catch (error) {
      if (error.code !== "not_ready") throw error;
      sentence = error.message;
    }
    if (mine !== this.latest || this.signal.aborted) return;
    if (after === 0) this.rows.replaceChildren();
    this.rows.append(...page.data.map(sampleRow));
    this.table.hidden = this.isEmpty;
    this.empty.textContent = this.isEmpty ? sentence : "";
    this.more.hidden = !page.has_more;
    this.more.onclick = () => this.attempt(() => this.load(page.next));
  }
}

function sampleRow(sample) {
  const text = sample.text_pair == null ? sample.text : [sample.text, h("br"), h("i", {}, sample.text_pair)];
  const number = (value, format = figure) => h("td", { class: "number" }, format(value));
  return h("tr", {}, h("td", { class: "number" }, sample.line ?? sample.row), h("td", { class: "text" }, text),
    h("td", {}, sample.label ?? "–"), number(sample.confidence, (value) => percent(value)), number(sample.teacher_threshold, (value) => percent(value)),
    number(sample.student_uncertainty), number(sample.student_threshold),
    h("td", { class: "number" }, `${sample.selected} of ${sample.offered}`), h("td", {}, sample.error ?? words(sample.reason)));
}

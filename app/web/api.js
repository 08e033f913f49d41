// The HTTP API: the key stays in this tab's session storage and travels as a header, never in a URL.

const SLOT = "understudy-key";
const RETRY_MILLISECONDS = 2000;

export const key = {
  get: () => sessionStorage.getItem(SLOT),
  set: (value) => sessionStorage.setItem(SLOT, value),
  forget: () => sessionStorage.removeItem(SLOT),
};

/** What the server refused: its sentence, status and code. */
export class Refused extends Error {
  constructor(problem, status) {
    super(problem.detail ?? `The server answered ${status}.`);
    this.status = status;
    this.code = problem.code;
  }
}

async function send(path, options = {}) {
  const headers = { Authorization: `Bearer ${key.get()}`, ...options.headers };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (!response.ok) throw new Refused(await response.json().catch(() => ({})), response.status);
  return response;
}

export const get = async (path, signal) => (await send(path, { signal })).json();

export const post = async (path, body) => (await send(path, body === undefined ? { method: "POST" } : {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
})).json();

/** The events of a job after `last`, as they happen, until its end or until `signal` aborts; takes up a broken stream. */
export async function followEvents(jobId, last, signal, onEvent) {
  // EventSource cannot send an Authorization header, so the stream is read by hand.
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", "Last-Event-ID": String(last) };
      const response = await send(`/jobs/${jobId}/events`, { headers, signal });
      for await (const event of serverSentEvents(response.body)) {
        last = event.seq;
        onEvent(event);
      }
      return; // the server closes the stream after the last event of a job that has ended
    } catch (error) {
      if (signal.aborted || (error instanceof Refused && error.status < 500)) throw error;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
    }
  }
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n/); // a \r at the end of a chunk waits in `rest` for its \n
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      if (line === "" && data.length) {
        yield JSON.parse(data.join("\n"));
        data = [];
      }
    }
  }
}

/** Save a checkpoint under a name: straight to disk where the browser can, else by way of memory. */
export async function download(path, name, onProgress) {
  // Asked for first: a browser shows the dialog only right after the click.
  const file = window.showSaveFilePicker ? await window.showSaveFilePicker({ suggestedName: name }) : null;
  const response = await send(path);
  const total = Number(response.headers.get("Content-Length"));
  let done = 0;
  const counter = new TransformStream({
    transform(chunk, controller) {
      done += chunk.byteLength;
      onProgress(total ? done / total : 0);
      controller.enqueue(chunk);
    },
  });
  const stream = response.body.pipeThrough(counter);
  if (file) {
    await stream.pipeTo(await file.createWritable());
    return;
  }
  const url = URL.createObjectURL(await new Response(stream).blob());
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
